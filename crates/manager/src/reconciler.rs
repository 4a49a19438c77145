//! The reconciler: finds work that a crash or a failure left and finishes or undoes it. Periodic and on request, idempotent, in every replica.

use std::time::Duration;

use gauntlet_domain::{Error, Gauntlet, Reconciled, Result};
use gauntlet_telemetry::context;
use tokio::sync::watch;
use tracing::{Instrument as _, field::Empty, info_span};

use crate::{call::call_now, signals::Signals, tasks::Tasks};

/// After a pass that could read nothing: how long signals wait, and how long the first pass waits for its next try.
const AGAIN: Duration = Duration::from_secs(2);

/// The loop that reconciles.
pub(crate) struct Reconciler {
    signals: Signals,
    settled: watch::Sender<bool>,
}

impl Reconciler {
    /// A reconciler that runs a pass whenever `signals` request one.
    pub(crate) fn new(signals: Signals) -> Self {
        Self { signals, settled: watch::Sender::new(false) }
    }

    /// Whether the first pass has been over everything.
    pub(crate) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Starts the loop. The first pass runs at once: a restart finds what a crash left.
    pub(crate) fn start(self, tasks: &Tasks, gauntlet: &Gauntlet, every: Duration) {
        let Self { signals, settled } = self;
        let gauntlet = gauntlet.clone();
        tasks.spawn("reconcile", |stop| async move {
            loop {
                let pass = async { gauntlet.reconcile(&call_now()).await };
                let reconciled = tokio::select! {
                    // What a pass was at is on record, as after a crash: the next start goes on with it.
                    () = stop.cancelled() => return,
                    reconciled = run_reconcile(pass, &signals) => reconciled,
                };
                if reconciled {
                    settled.send_replace(true);
                } else {
                    // While the store is away every call that fails asks for a pass, which would fail too.
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(AGAIN) => {}
                    }
                    if !*settled.borrow() {
                        continue;
                    }
                }
                // Between three quarters and five quarters of the period, so that replicas do not march in step.
                let pause = every.mul_f64(0.75 + 0.5 * rand::random::<f64>());
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = signals.reconcile_requested() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
    }
}

/// Does a pass in its span. Answers whether it has been over all that it is for, whatever came of each.
pub(crate) async fn run_reconcile(pass: impl Future<Output = Result<Reconciled>>, signals: &Signals) -> bool {
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
                    tracing::warn!(error.type = error.code(), %error, "not reconciled, will be tried again");
                }
                if let Some(error) = done.failures.first() {
                    failed(error);
                }
                true
            }
            Err(error) => {
                tracing::warn!(error.type = error.code(), %error, "could not reconcile, will be tried again");
                failed(&error);
                false
            }
        }
    }
    .instrument(span)
    .await
}

fn failed(error: &Error) {
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
    use gauntlet_domain::{ChallengeId, Found, Identity, Order, Outputs, Provisioner, Settings};

    use super::*;
    use crate::fixture::{Noted, Played};

    /// A machine that never says what is on it.
    #[derive(Default)]
    struct Silent(AtomicBool);

    #[async_trait]
    impl Provisioner for Silent {
        fn name(&self) -> &'static str {
            "silent"
        }

        async fn up(&self, _: &Order) -> Result<Outputs> {
            std::future::pending().await
        }

        async fn update(&self, _: &Order) -> Result<Outputs> {
            std::future::pending().await
        }

        async fn down(&self, _: &ChallengeId, _: &Identity, _: u64) -> Result<()> {
            std::future::pending().await
        }

        async fn list(&self) -> Result<Vec<Found>> {
            self.0.store(true, Ordering::SeqCst);
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn running_pass_does_not_use_up_the_drain() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let (machine, facts) = (Arc::new(Silent::default()), Arc::new(Noted::default()));
        let gauntlet = Gauntlet::new(Arc::new(store), machine.clone(), Arc::new(Played), facts, Settings::default());
        let tasks = Tasks::default();
        Reconciler::new(Signals::default()).start(&tasks, &gauntlet, Duration::from_secs(3600));
        let under_way = async {
            while !machine.0.load(Ordering::SeqCst) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), under_way).await.unwrap();
        assert_eq!(tasks.drain(Duration::from_secs(10)).await, 0);
    }
}
