//! Challenges, instances, pools: the use cases and the ports they need.
//!
//! This crate makes decisions and does no I/O of its own. It knows no wire format, reads no environment and no clock, and spawns nothing. Each
//! [`Call`] brings time, randomness and the caller's trace. Side effects go through the ports [`Store`], [`Provisioner`], [`Scenarios`] and
//! [`Facts`].
//!
//! Every change with a side effect has three steps: *intent, act, commit*. A transaction records the intent and takes ownership. The
//! provisioner acts, idempotently. A second transaction records the outcome, and is refused if the ownership was lost. A crash in between leaves
//! an unfinished record, which [`Gauntlet::reconcile`] finds and finishes.

mod call;
mod challenge;
mod challenges;
mod error;
mod facts;
mod gauntlet;
mod id;
mod instance;
mod instances;
mod plan;
mod pool;
mod provisioner;
mod provisioning;
mod reconcile;
mod replenish;
mod scenarios;
mod store;

pub use call::{Call, Clock, Entropy};
pub use challenge::{Challenge, ChallengeUpdate, Rollout, expiry};
pub use challenges::{NewChallenge, UpdateReport};
pub use error::{Error, Result};
pub use facts::{Fact, Facts, OperationOutcome, RecoveryAction};
pub use gauntlet::{Gauntlet, Settings};
pub use id::{ChallengeId, Identity, InvalidId, SourceId};
pub use instance::{Assignment, Failure, Instance, InstanceKey, Operation, Phase, PhaseName, Strategy, Target};
pub use plan::{Isolation, LaunchPlan, Limits, Placement, PortHold, PortSpec, Probe, Protocol, Readiness};
pub use pool::{PoolBounds, shortfall};
pub use provisioner::{LaunchRequest, Outputs, ProvisionedInstance, Provisioner};
pub use reconcile::ReconcileReport;
pub use replenish::{PoolJob, PoolPlan};
pub use scenarios::{Additional, Pinned, PreparedScenario, Scenarios};
pub use store::{
    Acquired, Census, Change, Intent, Layered, LockGuard, LockKind, LockLayer, LockOptions, Outcome, Ownership, Pool,
    Snapshot, Store, Stored, Stream, Unfinished, Version, WaitStats,
};
