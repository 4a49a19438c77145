//! The port to the backend that runs instances.

use async_trait::async_trait;

use crate::{ChallengeId, Identity, LaunchPlan, Placement, PortSpec, Result};

/// Everything that is needed to launch one instance. The resources are labelled with challenge, identity and generation.
#[derive(Debug, Clone)]
pub struct LaunchRequest {
    /// The challenge.
    pub challenge: ChallengeId,
    /// The identity.
    pub identity: Identity,
    /// The fencing token of the request: one lower than the recorded generation changes nothing.
    pub generation: u64,
    /// The digest of the scenario that the plan was rendered from.
    pub digest: String,
    /// The reservation that the plan was rendered for.
    pub placement: Placement,
    /// What to run.
    pub plan: LaunchPlan,
}

/// What players need of a running instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outputs {
    /// How players reach it.
    pub connection_info: String,
    /// The flags that prove the challenge solved; secret.
    pub flags: Vec<String>,
}

/// The resources of one instance, identified by their labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvisionedInstance {
    /// The challenge.
    pub challenge: ChallengeId,
    /// The identity.
    pub identity: Identity,
    /// The highest generation recorded for it.
    pub generation: u64,
    /// False once the instance is due to be launched again: it ended on its own or with its machine, and its restart delay has passed.
    pub alive: bool,
}

/// Launches and removes instances.
///
/// A launch is three calls: [`reserve`](Self::reserve) the ports, render the plan for them
/// ([`Scenarios::render`](crate::Scenarios::render)), then [`up`](Self::up) or [`update`](Self::update).
///
/// Every call is idempotent and fenced: it may be repeated after a crash, and it fails with [`Error::Fenced`](crate::Error::Fenced) and
/// changes nothing if a higher generation is recorded for that identity.
///
/// # Cancel safety
/// Dropping a call's future leaves at most partly done work, which repeating the call or [`down`](Self::down) completes.
#[async_trait]
pub trait Provisioner: Send + Sync {
    /// The name on spans and metrics, such as `process`.
    fn name(&self) -> &'static str;

    /// Reserves the instance's directory and a port for each of `ports`. An identity keeps the port that it already has under a name.
    ///
    /// The reservation is recorded and lasts until [`down`](Self::down); restarts of the manager don't end it. A running instance is not
    /// disturbed.
    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        ports: &[PortSpec],
    ) -> Result<Placement>;

    /// Launches the instance and waits until it is ready, at most for the plan's readiness timeout. An instance that already runs under that
    /// identity is kept, and its outputs are returned.
    ///
    /// # Errors
    /// [`Error::PortTaken`](crate::Error::PortTaken) if another program has a reserved port, or the reservation was given up. Reserve and
    /// render again, then retry.
    async fn up(&self, request: &LaunchRequest) -> Result<Outputs>;

    /// As [`up`](Self::up), but replaces an instance that runs from another plan.
    ///
    /// # Errors
    /// As [`up`](Self::up).
    async fn update(&self, request: &LaunchRequest) -> Result<Outputs>;

    /// Stops the instance, removes its resources and gives back its ports. Succeeds if there are none.
    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()>;

    /// Lists the resources of all instances, whichever manager made them.
    async fn list(&self) -> Result<Vec<ProvisionedInstance>>;
}
