//! The instances of this machine, used only once their directory is known to belong to this store.

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeId, Identity, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Result,
};
use gauntlet_provision::process::{Ends, Process};
use tokio::sync::OnceCell;

use crate::backends::Backend;

/// The process provisioner of one store. Claims its directory for the store before the first call; until that succeeds, calls fail.
pub(crate) struct Claimed {
    processes: Process,
    backend: Backend,
    claimed: OnceCell<()>,
}

impl Claimed {
    pub(crate) fn new(processes: Process, backend: Backend) -> Self {
        Self { processes, backend, claimed: OnceCell::new() }
    }

    /// Claims the directory for the store, unless that has been done.
    ///
    /// # Errors
    /// The store does not respond, or the directory belongs to another store.
    pub(crate) async fn claim(&self) -> Result<()> {
        let claim = async || {
            let store = self.backend.store_id(&format!("{:016x}", rand::random::<u64>())).await?;
            self.processes.claim(&store).await
        };
        self.claimed.get_or_try_init(claim).await.copied()
    }

    /// Watches for instances that exit by themselves.
    pub(crate) fn exits(&self) -> Result<Ends> {
        self.processes.ends()
    }

    /// Stops every instance, as [`Process::halt`] does; does nothing if the directory is not claimed, as it may belong to another store.
    pub(crate) async fn halt(&self) -> Result<usize> {
        if self.claimed.initialized() { self.processes.halt().await } else { Ok(0) }
    }
}

#[async_trait]
impl Provisioner for Claimed {
    fn name(&self) -> &'static str {
        self.processes.name()
    }

    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        ports: &[PortSpec],
    ) -> Result<Placement> {
        self.claim().await?;
        self.processes.reserve(challenge, identity, generation, ports).await
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.claim().await?;
        self.processes.up(request).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.claim().await?;
        self.processes.update(request).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        self.claim().await?;
        self.processes.down(challenge, identity, generation).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        self.claim().await?;
        self.processes.list().await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{path::Path, sync::Arc};

    use gauntlet_coordination::Coordination;
    use gauntlet_domain::Error;
    use gauntlet_provision::process;

    use super::*;

    async fn on(store: &Path, instances: &Path) -> Claimed {
        let store = Coordination::embedded(store, "replica".into()).await.unwrap();
        let processes = Process::new(process::Config::new(instances)).unwrap();
        Claimed::new(processes, Backend::Embedded(Arc::new(store)))
    }

    #[tokio::test]
    async fn instances_of_another_store_are_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, instances] = ["one", "two", "instances"].map(|name| dir.path().join(name));
        let first = on(&one, &instances).await;
        assert_eq!(first.list().await.unwrap(), []);
        first.backend.shutdown().await;

        let other = on(&two, &instances).await;
        let (identity, challenge) = (Identity::from_bits(1), ChallengeId::new("web").unwrap());
        let listed = other.list().await.map(|_| ());
        for refused in [other.claim().await, listed, other.down(&challenge, &identity, 1).await] {
            assert!(matches!(refused, Err(Error::Provision { step: "claim", .. })), "{refused:?}");
        }
        assert_eq!(other.halt().await, Ok(0));

        let again = on(&one, &instances).await;
        again.claim().await.unwrap();
    }
}
