//! The reconciler: finds work that a crash or a failure left and finishes or undoes it. Periodic and on request, idempotent, in every replica.

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
                    signals.request_refill(challenge);
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
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use async_trait::async_trait;
    use gauntlet_coordination::Coordination;
    use gauntlet_domain::{
        ChallengeId, Identity, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Settings,
    };

    use gauntlet_testing::eventually;

    use super::*;
    use crate::fixture::{Noted, Played};

    /// A provisioner whose calls never return.
    #[derive(Default)]
    struct Hanging(AtomicBool);

    #[async_trait]
    impl Provisioner for Hanging {
        fn name(&self) -> &'static str {
            "hanging"
        }

        async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
            std::future::pending().await
        }

        async fn up(&self, _: &LaunchRequest) -> Result<Outputs> {
            std::future::pending().await
        }

        async fn update(&self, _: &LaunchRequest) -> Result<Outputs> {
            std::future::pending().await
        }

        async fn down(&self, _: &ChallengeId, _: &Identity, _: u64) -> Result<()> {
            std::future::pending().await
        }

        async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
            self.0.store(true, Ordering::SeqCst);
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn running_pass_does_not_delay_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let (provisioner, facts) = (Arc::new(Hanging::default()), Arc::new(Noted::default()));
        let gauntlet =
            Gauntlet::new(Arc::new(store), provisioner.clone(), Arc::new(Played), facts, Settings::default());
        let tasks = Tasks::default();
        Reconciler::new(Signals::default()).start(&tasks, &gauntlet, Duration::from_secs(3600));
        eventually("a pass to list instances", async || provisioner.0.load(Ordering::SeqCst)).await;
        assert_eq!(tasks.drain(Duration::from_secs(10)).await, 0);
    }
}
