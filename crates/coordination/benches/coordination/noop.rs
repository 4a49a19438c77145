//! The use cases on a real store and a provisioner that runs nothing, for benches and tests of the store.

use std::sync::Arc;

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeId, Gauntlet, Identity, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner,
    Result, Settings, Store,
};
pub(crate) use gauntlet_testing::call::call_now;
use gauntlet_testing::fakes::{FakeScenarios, IgnoredFacts};

/// The use cases on a store.
pub(crate) fn gauntlet(store: Arc<dyn Store>) -> Gauntlet {
    gauntlet_with(store, Arc::new(NoopProvisioner))
}

/// The use cases on a store and a provisioner.
pub(crate) fn gauntlet_with(store: Arc<dyn Store>, provisioner: Arc<dyn Provisioner>) -> Gauntlet {
    Gauntlet::new(store, provisioner, Arc::new(FakeScenarios::default()), Arc::new(IgnoredFacts), Settings::default())
}

/// Launches nothing and keeps no state, so that only the store is measured.
#[derive(Debug)]
pub(crate) struct NoopProvisioner;

#[async_trait]
impl Provisioner for NoopProvisioner {
    fn name(&self) -> &'static str {
        "noop"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement::default())
    }

    async fn up(&self, _: &LaunchRequest) -> Result<Outputs> {
        Ok(Outputs { connection_info: "http://ctf.test:31337".to_owned(), flags: vec!["CTF{flag}".to_owned()] })
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.up(request).await
    }

    async fn down(&self, _: &ChallengeId, _: &Identity, _: u64) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        Ok(Vec::new())
    }
}
