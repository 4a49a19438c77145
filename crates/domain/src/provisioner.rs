//! The port to whatever runs instances.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{ChallengeId, Identity, Plan, Result};

/// What to bring up. Everything brought up is labelled with challenge, identity and generation.
#[derive(Debug, Clone)]
pub struct Order {
    /// The challenge.
    pub challenge: ChallengeId,
    /// The identity.
    pub identity: Identity,
    /// The fencing token of whoever orders: an order older than what is there must change nothing.
    pub generation: u64,
    /// The digest of the scenario that the plan was made from.
    pub digest: String,
    /// What to run.
    pub plan: Arc<dyn Plan>,
}

/// What came up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outputs {
    /// How players reach it.
    pub connection_info: String,
    /// What proves it solved; secret.
    pub flags: Vec<String>,
}

/// Resources that are there, by their labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The challenge.
    pub challenge: ChallengeId,
    /// The identity.
    pub identity: Identity,
    /// The generation that brought them up.
    pub generation: u64,
    /// False for what ended by itself, or with its machine, and is due to be brought up again. What ends again and again is left alone for
    /// a while each time, and is not due before that.
    pub alive: bool,
}

/// Brings instances up and down. Every call is idempotent and may be repeated after a crash; dropping a call's future leaves at most a
/// partly done job that repeating the call, or [`Provisioner::down`], puts right.
#[async_trait]
pub trait Provisioner: Send + Sync {
    /// Its name on spans and metrics, such as `process`.
    fn name(&self) -> &'static str;

    /// Brings it up and waits until it is ready. What is up already under that identity is kept and answered. Bounded by the plan's
    /// readiness timeout.
    async fn up(&self, order: &Order) -> Result<Outputs>;

    /// Makes what runs under that identity run the order's plan, keeping its ports, and waits until it is ready.
    async fn update(&self, order: &Order) -> Result<Outputs>;

    /// Takes down whatever is labelled with that identity; nothing there is success.
    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()>;

    /// Everything that is there, whoever brought it up.
    async fn list(&self) -> Result<Vec<Found>>;
}
