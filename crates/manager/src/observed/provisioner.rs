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

/// The span of a call that carries an order.
macro_rules! order_span {
    ($name:literal, $provisioner:expr, $order:expr) => {
        info_span!(
            $name,
            provisioner = $provisioner,
            challenge.id = %$order.challenge,
            instance.identity = %$order.identity,
            scenario.digest = $order.digest,
            lock.token = $order.generation,
            outcome = Empty,
            error.type = Empty,
        )
    };
}

impl ObservedProvisioner {
    pub(crate) fn new(inner: Arc<dyn Provisioner>, instruments: Instruments) -> Self {
        Self { inner, instruments }
    }

    async fn step<T>(&self, name: &'static str, span: Span, work: impl Future<Output = Result<T>>) -> Result<T> {
        step(&self.instruments, self.inner.name(), name, span, work).await
    }
}

/// Does a step of provisioning in its span; how it ends and how long it takes is recorded.
pub(super) async fn step<T>(
    instruments: &Instruments,
    provisioner: &'static str,
    name: &'static str,
    span: Span,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let active = instruments.provision.start_step(provisioner, name);
    let started = Instant::now();
    let result = work.instrument(span.clone()).await;
    drop(active);
    let outcome = result.as_ref().err().map_or("ok", |error| error.code());
    instruments.provision.record_step(provisioner, name, outcome, started.elapsed());
    span.record("outcome", outcome);
    if let Err(error) = &result {
        span.record("error.type", outcome);
        span.in_scope(|| context::fail_span(error.to_string()));
    }
    result
}

#[async_trait]
impl Provisioner for ObservedProvisioner {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    async fn up(&self, order: &Order) -> Result<Outputs> {
        let span = order_span!("provision.up", self.inner.name(), order);
        self.step("up", span, self.inner.up(order)).await
    }

    async fn update(&self, order: &Order) -> Result<Outputs> {
        let span = order_span!("provision.update", self.inner.name(), order);
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
