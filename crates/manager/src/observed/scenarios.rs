//! Measures the preparation of scenarios: `provision.prepare`, the first step of a launch.

use std::sync::Arc;

use async_trait::async_trait;
use gauntlet_domain::{Additional, Identity, LaunchPlan, Pinned, Placement, PreparedScenario, Result, Scenarios};
use gauntlet_telemetry::instruments::Instruments;
use tracing::{field::Empty, info_span};

use super::provisioner::step;

/// Measures each `prepare` call of the inner scenarios.
pub(crate) struct ObservedScenarios {
    inner: Arc<dyn Scenarios>,
    provisioner: &'static str,
    instruments: Instruments,
}

impl ObservedScenarios {
    pub(crate) fn new(inner: Arc<dyn Scenarios>, provisioner: &'static str, instruments: Instruments) -> Self {
        Self { inner, provisioner, instruments }
    }
}

#[async_trait]
impl Scenarios for ObservedScenarios {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        self.inner.resolve(reference).await
    }

    fn flag_key(&self) -> Option<String> {
        self.inner.flag_key()
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        flag_key: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        let span = info_span!(
            "provision.prepare",
            instance.identity = %identity,
            scenario.digest = scenario.digest,
            outcome = Empty,
            error.type = Empty,
        );
        let work = self.inner.prepare(scenario, identity, flag_key, additional);
        step(&self.instruments, self.provisioner, "prepare", span, work).await
    }

    async fn render(&self, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan> {
        self.inner.render(prepared, placement).await
    }
}
