use std::fmt;

use async_trait::async_trait;
use gauntlet_domain::{Additional, Identity, LaunchPlan, Pinned, Placement, PreparedScenario, Result, Scenarios};

use crate::fixtures::pinned;

type Resolve = Box<dyn Fn(&str) -> Result<Pinned> + Send + Sync>;

/// Resolves every reference, by default to a digest of its text, and renders empty plans.
pub struct FakeScenarios(Resolve);

impl FakeScenarios {
    /// Decides what becomes of a reference.
    pub fn resolving(resolve: impl Fn(&str) -> Result<Pinned> + Send + Sync + 'static) -> Self {
        Self(Box::new(resolve))
    }
}

impl Default for FakeScenarios {
    fn default() -> Self {
        Self::resolving(|reference| Ok(pinned(reference)))
    }
}

impl fmt::Debug for FakeScenarios {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeScenarios")
    }
}

#[async_trait]
impl Scenarios for FakeScenarios {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        (self.0)(reference)
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
