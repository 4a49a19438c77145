//! An instance: one running copy of a challenge, for one source or waiting in the pool.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::{ChallengeId, Identity, Operation, Outputs, Pinned, SourceId, Strategy};

/// Template values: keys are any text.
pub type Additional = BTreeMap<String, String>;

/// Where an instance is kept: one seat per (challenge, source), and one per pooled instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceKey {
    /// The challenge.
    pub challenge: ChallengeId,
    /// The seat within it.
    pub assignment: Assignment,
}

/// A seat within a challenge.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Assignment {
    /// Claimed by a source.
    Source(SourceId),
    /// In the pool, under the identity it was first given (an update may give its resources another).
    Pool(Identity),
}

impl Assignment {
    /// The source, when claimed.
    pub fn source(&self) -> Option<&SourceId> {
        match self {
            Self::Source(source) => Some(source),
            Self::Pool(_) => None,
        }
    }

    /// Whether nobody has claimed it yet.
    pub fn is_pooled(&self) -> bool {
        matches!(self, Self::Pool(_))
    }
}

/// An instance, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Where it is kept.
    pub key: InstanceKey,
    /// What its resources are labelled with.
    pub identity: Identity,
    /// What is being done with it, or went wrong.
    pub phase: Phase,
    /// When it was created or claimed.
    pub since: Timestamp,
    /// When it was last renewed; its creation counts.
    pub last_renew: Timestamp,
    /// When it ends, if ever.
    pub until: Option<Timestamp>,
    /// The scenario it runs.
    pub scenario: Pinned,
    /// The challenge revision it has applied.
    pub applied_revision: u64,
    /// Its own template values, over the challenge's.
    pub additional: Additional,
    /// How players reach it.
    pub connection_info: String,
    /// What proves it solved.
    pub flags: Vec<String>,
    /// An update that has been recorded and not yet applied: what it is to become.
    pub target: Option<Target>,
    /// The trace of the call that created it, in W3C traceparent form.
    pub traceparent: Option<String>,
}

/// What an instance is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The identity of its resources then; another one where resources are replaced.
    pub identity: Identity,
    /// The scenario it will run.
    pub scenario: Pinned,
    /// The challenge revision it will have applied.
    pub revision: u64,
    /// How it gets there.
    pub strategy: Strategy,
}

/// What is being done with an instance. The first, third and fourth are working phases: somebody owns the work, or a crash left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Being brought up for the first time.
    Provisioning,
    /// Running.
    Ready,
    /// On its way to its [`Target`].
    Updating,
    /// Being taken down.
    Deleting,
    /// Something went wrong and will be tried again.
    Failed(Failure),
}

/// What went wrong with an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// During what.
    pub during: Operation,
    /// The operator's text.
    pub reason: String,
    /// Since when it has been failing.
    pub since: Timestamp,
    /// How many tries have failed.
    pub attempts: u32,
    /// When the next try is due.
    pub retry_at: Timestamp,
}

impl Phase {
    /// Whether work is under way, or was when a crash came.
    pub fn is_working(&self) -> bool {
        matches!(self, Self::Provisioning | Self::Updating | Self::Deleting)
    }
}

impl Instance {
    /// Whether its end has passed.
    pub fn expired(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// Whether the v1 API shows it: claimed, and past its first provisioning.
    pub fn is_visible(&self) -> bool {
        !self.key.assignment.is_pooled()
            && self.phase != Phase::Provisioning
            && (self.phase == Phase::Ready || self.has_run())
    }

    /// Whether it is what a create left that failed and could not be undone.
    pub(crate) fn is_failed_create(&self) -> bool {
        matches!(self.phase, Phase::Failed(_)) && !self.has_run()
    }

    /// Whether it was ever given to its source: it is then known how it is reached.
    fn has_run(&self) -> bool {
        !self.connection_info.is_empty() || !self.flags.is_empty()
    }

    pub(crate) fn mark_ready(&mut self, outputs: Outputs) {
        self.connection_info = outputs.connection_info;
        self.flags = outputs.flags;
        self.phase = Phase::Ready;
    }

    pub(crate) fn apply_target(&mut self, target: Target) {
        self.identity = target.identity;
        self.scenario = target.scenario;
        self.applied_revision = target.revision;
        self.target = None;
    }

    /// Every identity its resources may be labelled with.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        let next = self.target.as_ref().map(|target| &target.identity).filter(|next| **next != self.identity);
        std::iter::once(&self.identity).chain(next)
    }
}
