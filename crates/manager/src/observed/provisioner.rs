//! The provisioner, observed: `provision.*` spans, `gauntlet.provision.duration` and `gauntlet.provision.active`.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use gauntlet_domain::{ChallengeId, Found, Identity, Order, Outputs, Provisioner, Result};
use gauntlet_telemetry::{context, instruments::Instruments};
use tracing::{Instrument as _, Span, field::Empty, info_span};

/// Measures every call of the provisioner behind it.
pub(crate) struct ObservedProvisioner {
    inner: Arc<dyn Provisioner>,
    instruments: Instruments,
}

impl ObservedProvisioner {
    pub(crate) fn new(inner: Arc<dyn Provisioner>, instruments: Instruments) -> Self {
        Self { inner, instruments }
    }

    async fn step<T>(&self, step: &'static str, span: Span, work: impl Future<Output = Result<T>>) -> Result<T> {
        let active = self.instruments.provision.begin(self.inner.name(), step);
        let started = Instant::now();
        let result = work.instrument(span.clone()).await;
        drop(active);
        let outcome = result.as_ref().err().map_or("ok", |error| error.code());
        self.instruments.provision.finished(self.inner.name(), step, outcome, started.elapsed());
        span.record("outcome", outcome);
        if let Err(error) = &result {
            span.record("error.type", outcome);
            span.in_scope(|| context::fail_span(error.to_string()));
        }
        result
    }
}

#[async_trait]
impl Provisioner for ObservedProvisioner {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    async fn up(&self, order: &Order) -> Result<Outputs> {
        let span = info_span!(
            "provision.up",
            provisioner = self.inner.name(),
            challenge.id = %order.challenge,
            instance.identity = %order.identity,
            scenario.digest = order.digest,
            lock.token = order.generation,
            outcome = Empty,
            error.type = Empty,
        );
        self.step("up", span, self.inner.up(order)).await
    }

    async fn update(&self, order: &Order) -> Result<Outputs> {
        let span = info_span!(
            "provision.update",
            provisioner = self.inner.name(),
            challenge.id = %order.challenge,
            instance.identity = %order.identity,
            scenario.digest = order.digest,
            lock.token = order.generation,
            outcome = Empty,
            error.type = Empty,
        );
        self.step("update", span, self.inner.update(order)).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let span = info_span!(
            "provision.down",
            provisioner = self.inner.name(),
            challenge.id = %challenge,
            instance.identity = %identity,
            lock.token = generation,
            outcome = Empty,
            error.type = Empty,
        );
        self.step("down", span, self.inner.down(challenge, identity, generation)).await
    }

    async fn list(&self) -> Result<Vec<Found>> {
        self.inner.list().await
    }
}
