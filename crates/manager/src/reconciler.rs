//! Runs the reconciler ([`Gauntlet::reconcile`]) in this replica, periodically and on request.

use std::time::Duration;

use gauntlet_domain::{Error, Gauntlet, ReconcileReport, Result};
use gauntlet_telemetry::context;
use tokio::sync::watch;
use tracing::{Instrument as _, field::Empty, info_span};

use crate::{call::call_now, signals::Signals, tasks::Tasks};

/// The pause after a pass that failed as a whole.
const RETRY_DELAY: Duration = Duration::from_secs(2);

/// The loop that reconciles.
pub(crate) struct Reconciler {
    signals: Signals,
    recovered: watch::Sender<bool>,
}

impl Reconciler {
    /// A reconciler that runs a pass whenever `signals` request one.
    pub(crate) fn new(signals: Signals) -> Self {
        Self { signals, recovered: watch::Sender::new(false) }
    }

    /// Becomes true when the first pass is complete.
    pub(crate) fn recovered(&self) -> watch::Receiver<bool> {
        self.recovered.subscribe()
    }

    /// Starts the loop. The first pass begins at once: it finds the work that a crash left behind.
    pub(crate) fn start(self, tasks: &Tasks, gauntlet: &Gauntlet, interval: Duration) {
        let Self { signals, recovered } = self;
        let gauntlet = gauntlet.clone();
        tasks.spawn("reconcile", |stop| async move {
            loop {
                let pass = async { gauntlet.reconcile(&call_now()).await };
                let reconciled = tokio::select! {
                    // The next start continues what a pass was doing, as after a crash.
                    () = stop.cancelled() => return,
                    reconciled = run_reconcile(pass, &signals) => reconciled,
                };
                if reconciled {
                    recovered.send_replace(true);
                } else {
                    // While the store is down, each failed call requests a pass, which would fail too.
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(RETRY_DELAY) => {}
                    }
                    if !*recovered.borrow() {
                        continue;
                    }
                }
                // 75% to 125% of the interval, so that replicas spread their passes.
                let pause = interval.mul_f64(0.75 + 0.5 * rand::random::<f64>());
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = signals.reconcile_requested() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
    }
}

/// Runs a pass in a span of its own. Returns whether it is complete; single items may have failed.
pub(crate) async fn run_reconcile(pass: impl Future<Output = Result<ReconcileReport>>, signals: &Signals) -> bool {
    let span = info_span!(
        parent: None,
        "reconcile",
        reconcile.recovered = Empty,
        reconcile.resumed = Empty,
        reconcile.revived = Empty,
        reconcile.orphans = Empty,
        reconcile.failures = Empty,
        error.type = Empty,
    );
    async {
        match pass.await {
            Ok(done) => {
                let span = tracing::Span::current();
                span.record("reconcile.recovered", done.recovered);
                span.record("reconcile.resumed", done.resumed);
                span.record("reconcile.revived", done.restarted);
                span.record("reconcile.orphans", done.orphans_removed);
                span.record("reconcile.failures", done.failures.len());
                if done.recovered + done.resumed + done.restarted + done.orphans_removed > 0 {
                    tracing::info!(
                        recovered = done.recovered,
                        revived = done.restarted,
                        resumed = done.resumed,
                        orphans = done.orphans_removed,
                        "reconciled"
                    );
                }
                for challenge in &done.pools {
                    signals.request_pool_check(challenge);
                }
                for error in &done.failures {
                    tracing::warn!(error.type = error.code(), %error, "cannot reconcile an item; retrying later");
                }
                if let Some(error) = done.failures.first() {
                    record_error(error);
                }
                true
            }
            Err(error) => {
                tracing::warn!(error.type = error.code(), %error, "cannot reconcile; retrying later");
                record_error(&error);
                false
            }
        }
    }
    .instrument(span)
    .await
}

fn record_error(error: &Error) {
    tracing::Span::current().record("error.type", error.code());
    context::fail_span(error.to_string());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use futures::FutureExt as _;
    use gauntlet_coordination::Coordination;
    use gauntlet_domain::Settings;
    use gauntlet_testing::fakes::{FakeProvisioner, FakeScenarios, IgnoredFacts};
    use opentelemetry::trace::{Status, TracerProvider as _};
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    use tracing::instrument::WithSubscriber as _;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[tokio::test]
    async fn running_pass_does_not_delay_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let (provisioner, scenarios) = (Arc::new(FakeProvisioner::default()), Arc::new(FakeScenarios::default()));
        let mut listing = provisioner.hold("list");
        let gauntlet =
            Gauntlet::new(Arc::new(store), provisioner, scenarios, Arc::new(IgnoredFacts), Settings::default());
        let tasks = Tasks::default();
        Reconciler::new(Signals::default()).start(&tasks, &gauntlet, Duration::from_secs(3600));
        listing.arrived().await;
        assert_eq!(tasks.drain(Duration::from_secs(10)).await, 0);
    }

    #[tokio::test]
    async fn failed_first_pass_is_repeated_without_waiting_for_the_interval() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let failed = AtomicBool::new(false);
        let provisioner = FakeProvisioner::default().before(move |_| {
            let first = !failed.swap(true, Ordering::SeqCst);
            let result = if first { Err(Error::Internal("fails once".into())) } else { Ok(()) };
            std::future::ready(result).boxed()
        });
        let scenarios = Arc::new(FakeScenarios::default());
        let gauntlet = Gauntlet::new(
            Arc::new(store),
            Arc::new(provisioner),
            scenarios,
            Arc::new(IgnoredFacts),
            Settings::default(),
        );
        let (tasks, reconciler) = (Tasks::default(), Reconciler::new(Signals::default()));
        let mut recovered = reconciler.recovered();
        tokio::time::pause();
        reconciler.start(&tasks, &gauntlet, Duration::from_secs(3600));
        let repeated = recovered.wait_for(|recovered| *recovered);
        tokio::time::timeout(Duration::from_secs(60), repeated).await.expect("a second pass").unwrap();
    }

    #[tokio::test]
    async fn span_of_a_failed_pass_has_the_error() {
        let exporter = InMemorySpanExporter::default();
        let traces = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(traces.tracer("test"));
        let pass = async { Err(Error::Internal("the disk is full".into())) };
        let subscriber = tracing_subscriber::registry().with(layer);
        assert!(!run_reconcile(pass, &Signals::default()).with_subscriber(subscriber).await);
        let spans = exporter.get_finished_spans().unwrap();
        let [span] = spans.as_slice() else { panic!("one span: {spans:?}") };
        assert!(matches!(&span.status, Status::Error { description } if description.contains("the disk is full")));
        let code = span.attributes.iter().find(|attribute| attribute.key.as_str() == "error.type").unwrap();
        assert_eq!(code.value.as_str(), Error::Internal(String::new()).code());
    }
}
