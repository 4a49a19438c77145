//! Background work: the reconciler, periodic and signalled, and the refill of pools. One code path each, idempotent, in every replica.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use gauntlet_domain::{ChallengeId, Error, Gauntlet};
use gauntlet_telemetry::context;
use tokio::sync::{Notify, mpsc, watch};
use tracing::{Instrument as _, field::Empty, info_span};

use crate::{operations::call_now, tasks::Tasks};

/// Pools waiting to be tended; past this many the periodic pass picks them up.
const POOL_QUEUE: usize = 1024;
/// Pools tended at once.
const POOLS_AT_ONCE: usize = 4;
/// After a pass that could read nothing: how long signals wait, and how long the first pass waits for its next try.
const AGAIN: Duration = Duration::from_secs(2);

/// How the rest of the manager asks for background work. Never blocks; asking twice is asking once.
#[derive(Clone)]
pub(crate) struct Signals {
    reconcile: Arc<Notify>,
    pools: mpsc::Sender<(ChallengeId, Option<String>)>,
}

impl Signals {
    /// Asks for a reconcile pass soon.
    pub(crate) fn reconcile(&self) {
        self.reconcile.notify_one();
    }

    /// Asks for a challenge's pool to be looked at, on behalf of the current trace.
    pub(crate) fn pool(&self, challenge: &ChallengeId) {
        if self.pools.try_send((challenge.clone(), context::current_traceparent())).is_err() {
            self.reconcile();
        }
    }
}

/// The receiving side, until [`Background::start`].
pub(crate) struct Background {
    reconcile: Arc<Notify>,
    pools: mpsc::Receiver<(ChallengeId, Option<String>)>,
    settled: watch::Sender<bool>,
}

/// Both sides of the signals.
pub(crate) fn signals() -> (Signals, Background) {
    let reconcile = Arc::new(Notify::new());
    let (sender, receiver) = mpsc::channel(POOL_QUEUE);
    let background = Background { reconcile: reconcile.clone(), pools: receiver, settled: watch::Sender::new(false) };
    (Signals { reconcile, pools: sender }, background)
}

impl Background {
    /// Whether the first reconcile pass has been over everything.
    pub(crate) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Starts both loops. The first reconcile pass runs at once: a restart finds what a crash left.
    pub(crate) fn start(self, tasks: &Tasks, gauntlet: &Gauntlet, every: Duration) {
        let Self { reconcile, mut pools, settled } = self;
        let reconciler = gauntlet.clone();
        tasks.background("reconcile", |stop| async move {
            loop {
                if run_reconcile(&reconciler).await {
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
                    () = reconcile.notified() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
        let tender = gauntlet.clone();
        tasks.background("pools", |stop| async move {
            let queue = async_stream(&mut pools);
            let work = queue.for_each_concurrent(POOLS_AT_ONCE, |(challenge, origin)| tend(&tender, challenge, origin));
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }
}

fn async_stream<T>(receiver: &mut mpsc::Receiver<T>) -> impl futures::Stream<Item = T> {
    futures::stream::poll_fn(move |cx| receiver.poll_recv(cx))
}

/// Answers whether it has been over everything, whatever came of each.
async fn run_reconcile(gauntlet: &Gauntlet) -> bool {
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
        match gauntlet.reconcile(&call_now()).await {
            Ok(done) => {
                let span = tracing::Span::current();
                span.record("reconcile.recovered", done.recovered);
                span.record("reconcile.resumed", done.resumed);
                span.record("reconcile.revived", done.revived);
                span.record("reconcile.orphans", done.orphans);
                span.record("reconcile.failures", done.failures.len());
                if done.recovered + done.resumed + done.revived + done.orphans > 0 {
                    tracing::info!(
                        recovered = done.recovered,
                        revived = done.revived,
                        resumed = done.resumed,
                        orphans = done.orphans,
                        "reconciled"
                    );
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

async fn tend(gauntlet: &Gauntlet, challenge: ChallengeId, origin: Option<String>) {
    let span = info_span!(parent: None, "pool.refill", challenge.id = %challenge, error.type = Empty);
    if let Some(origin) = &origin {
        context::link(&span, origin);
    }
    async {
        if let Err(error) = gauntlet.tend_pool(&call_now(), &challenge).await {
            tracing::warn!(error.type = error.code(), %error, %challenge, "pool not tended, will be tried again");
            failed(&error);
        }
    }
    .instrument(span)
    .await;
}

fn failed(error: &Error) {
    tracing::Span::current().record("error.type", error.code());
    context::fail_span(error.to_string());
}
