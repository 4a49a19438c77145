//! The one place that spawns: every task has a name, an owner and an end.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// The tasks of one manager. Cloning shares them.
#[derive(Clone, Default)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// A loop that ends when it is told by the token that it is given.
    pub(crate) fn background<F>(&self, name: &'static str, run: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = run(self.stop.clone());
        self.tracker.spawn(async move {
            task.await;
            tracing::debug!(task = name, "ended");
        });
    }

    /// An operation that goes on when whoever asked for it goes away; it stays in the caller's span.
    pub(crate) fn operation<T, F>(&self, operation: F) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.tracker.spawn(operation.in_current_span())
    }

    /// Tells every loop to end and waits for all tasks; answers how many were still running after `patience`.
    pub(crate) async fn drain(&self, patience: Duration) -> usize {
        self.stop.cancel();
        self.tracker.close();
        let _ = tokio::time::timeout(patience, self.tracker.wait()).await;
        self.tracker.len()
    }
}
