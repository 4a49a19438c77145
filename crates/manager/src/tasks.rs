//! The one place that spawns: every task of the manager is told to stop and is waited for.

use std::{future::Future, time::Duration};

use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// The tasks of one manager. Cloning shares them.
#[derive(Clone, Default)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// Spawns a task that ends on its own or when the token is cancelled. It runs outside the caller's span.
    #[track_caller]
    pub(crate) fn spawn<F>(&self, name: &'static str, run: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = run(self.stop.clone());
        self.tracker.spawn(async move {
            task.await;
            tracing::debug!(task = name, "task ended");
        });
    }

    /// Spawns the work of a call, in the caller's span. It continues when the caller is dropped, and [`Tasks::drain`] waits for it.
    #[track_caller]
    pub(crate) fn spawn_operation<T, F>(&self, operation: F) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.tracker.spawn(operation.in_current_span())
    }

    /// Cancels the token and waits until all tasks have ended and their futures are dropped, at most for `timeout`. Tasks can still be spawned
    /// meanwhile, and are waited for too: running calls spawn their operations. Returns how many tasks are still running.
    pub(crate) async fn drain(&self, timeout: Duration) -> usize {
        self.stop.cancel();
        self.tracker.close();
        let _ = tokio::time::timeout(timeout, self.tracker.wait()).await;
        self.tracker.len()
    }
}

/// Runs blocking work now and then at every `interval`, one run at a time, until `stop` is cancelled. A run that has begun is completed.
pub(crate) async fn repeat_blocking(
    interval: Duration,
    stop: CancellationToken,
    work: impl Fn() + Clone + Send + 'static,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if let Err(error) = tokio::task::spawn_blocking(work.clone()).await {
            tracing::error!(%error, "a periodic check failed; it is repeated");
        }
    }
}
