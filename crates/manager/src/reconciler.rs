//! The reconciler: finishes or undoes the work that a crash or a failure left unfinished. Every replica runs it, periodically and on request.

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
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::Arc;

    use gauntlet_coordination::Coordination;
    use gauntlet_domain::Settings;
    use gauntlet_testing::fakes::{FakeProvisioner, FakeScenarios, IgnoredFacts};

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
}
