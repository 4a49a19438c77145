//! Measures the provisioner: `provision.*` spans, `gauntlet.provision.duration` and `gauntlet.provision.active`.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeId, Identity, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Result,
};
use gauntlet_telemetry::{context, instruments::Instruments};
use tracing::{Instrument as _, Span, field::Empty, info_span};

/// Measures every call of the inner provisioner but `list`.
pub(crate) struct ObservedProvisioner {
    inner: Arc<dyn Provisioner>,
    instruments: Instruments,
}

/// The span of a launch.
macro_rules! launch_span {
    ($name:literal, $provisioner:expr, $request:expr) => {
        info_span!(
            $name,
            provisioner = $provisioner,
            challenge.id = %$request.challenge,
            instance.identity = %$request.identity,
            scenario.digest = $request.digest,
            lock.token = $request.generation,
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

/// Runs a provisioning step in its span; records its outcome and duration.
pub(super) async fn step<T>(
    instruments: &Instruments,
    provisioner: &'static str,
    name: &'static str,
    span: Span,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let result = measure(instruments, provisioner, name, work.instrument(span.clone())).await;
    span.record("outcome", outcome(&result));
    if let Err(error) = &result {
        span.record("error.type", error.code());
        span.in_scope(|| context::fail_span(error.to_string()));
    }
    result
}

/// Records the outcome and duration of a provisioning step.
async fn measure<T>(
    instruments: &Instruments,
    provisioner: &'static str,
    name: &'static str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let active = instruments.provision.start_step(provisioner, name);
    let started = Instant::now();
    let result = work.await;
    drop(active);
    instruments.provision.record_step(provisioner, name, outcome(&result), started.elapsed());
    result
}

fn outcome<T>(result: &Result<T>) -> &'static str {
    result.as_ref().err().map_or("ok", |error| error.code())
}

#[async_trait]
impl Provisioner for ObservedProvisioner {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        ports: &[PortSpec],
    ) -> Result<Placement> {
        // The backend makes the span, `provision.allocate`.
        let work = self.inner.reserve(challenge, identity, generation, ports);
        measure(&self.instruments, self.inner.name(), "allocate", work).await
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        let span = launch_span!("provision.up", self.inner.name(), request);
        self.step("up", span, self.inner.up(request)).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        let span = launch_span!("provision.update", self.inner.name(), request);
        self.step("update", span, self.inner.update(request)).await
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

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        self.inner.list().await
    }
}
