//! The use cases on a store and on nothing else: ports that have nothing to do. For benches and tests.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use gauntlet_domain::{
    Additional, Call, ChallengeId, Clock, Entropy, Fact, Facts, Gauntlet, Identity, LaunchPlan, LaunchRequest, Outputs,
    Pinned, Placement, PortSpec, PreparedScenario, ProvisionedInstance, Provisioner, Result, Scenarios, Settings,
    Store,
};
use jiff::Timestamp;

/// A call that happens now.
pub(crate) fn call() -> Call {
    Call { now: Timestamp::now(), traceparent: None, entropy: Arc::new(Counter), clock: Arc::new(Counter) }
}

/// The use cases on a store.
pub(crate) fn gauntlet(store: Arc<dyn Store>) -> Gauntlet {
    Gauntlet::new(store, Arc::new(Nothing), Arc::new(Nothing), Arc::new(Nothing), Settings::default())
}

/// Different each time, which is all that is asked of it here.
struct Counter;

impl Entropy for Counter {
    fn next_u64(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }
}

#[async_trait]
impl Clock for Counter {
    fn elapsed(&self) -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    async fn sleep(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}

/// Brings up nothing, at once.
#[derive(Debug)]
pub(crate) struct Nothing;

impl Facts for Nothing {
    fn record(&self, _: Fact) {}
}

#[async_trait]
impl Scenarios for Nothing {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        Ok(Pinned { reference: reference.to_owned(), digest: format!("sha256:{}", "ab".repeat(32)) })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, _: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        Ok(LaunchPlan::default())
    }
}

#[async_trait]
impl Provisioner for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
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
