//! Scenarios, observed: `provision.prepare`, between the decision to bring an instance up and the provisioner.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use gauntlet_domain::{Additional, Identity, Pinned, Plan, Result, Scenarios};
use gauntlet_telemetry::{context, instruments::Instruments};
use tracing::{Instrument as _, field::Empty, info_span};

/// Measures each preparation by the scenarios behind it.
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

    async fn plan(&self, scenario: &Pinned, identity: &Identity, additional: &Additional) -> Result<Arc<dyn Plan>> {
        let span = info_span!(
            "provision.prepare",
            instance.identity = %identity,
            scenario.digest = scenario.digest,
            outcome = Empty,
            error.type = Empty,
        );
        let started = Instant::now();
        let result = self.inner.plan(scenario, identity, additional).instrument(span.clone()).await;
        let outcome = result.as_ref().err().map_or("ok", |error| error.code());
        self.instruments.provision.finished(self.provisioner, "prepare", outcome, started.elapsed());
        span.record("outcome", outcome);
        if let Err(error) = &result {
            span.record("error.type", outcome);
            span.in_scope(|| context::fail_span(error.to_string()));
        }
        result
    }
}
