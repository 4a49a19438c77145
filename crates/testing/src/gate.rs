//! Stopping a task at a named point until the test lets it go on.

use std::{sync::Mutex, time::Duration};

use tokio::sync::oneshot;

use crate::poll::TIMEOUT;

/// The points at which a fake stops its callers. A point that no test has closed is passed without waiting.
#[derive(Debug, Default)]
pub struct Gates(Mutex<Vec<Closed>>);

#[derive(Debug)]
struct Closed {
    point: &'static str,
    arrived: oneshot::Sender<()>,
    opened: oneshot::Receiver<()>,
}

/// A closed gate. It stops one caller: the next to arrive. Dropping it opens the gate.
#[derive(Debug)]
pub struct Gate {
    arrived: oneshot::Receiver<()>,
    open: oneshot::Sender<()>,
}

impl Gates {
    /// Closes the gate at `point` for the next caller that arrives there. Closed several times, it stops as many callers, in order.
    pub fn close(&self, point: &'static str) -> Gate {
        let ((arrive, arrived), (open, opened)) = (oneshot::channel(), oneshot::channel());
        self.0.lock().unwrap().push(Closed { point, arrived: arrive, opened });
        Gate { arrived, open }
    }

    /// Called by the fake: waits here if a test closed the gate at `point`.
    pub async fn pass(&self, point: &str) {
        let gate = {
            let mut gates = self.0.lock().unwrap();
            gates.iter().position(|gate| gate.point == point).map(|at| gates.remove(at))
        };
        if let Some(Closed { arrived, opened, .. }) = gate {
            // A test that dropped its gate lets everybody pass.
            let _ = arrived.send(());
            let _ = opened.await;
        }
    }
}

impl Gate {
    /// Waits until a caller has arrived at the gate.
    ///
    /// # Panics
    /// When none arrives within [`TIMEOUT`].
    pub async fn arrived(&mut self) {
        within(TIMEOUT, "a caller arrives at the gate", &mut self.arrived).await.expect("the gates still exist");
    }

    /// Lets the caller go on.
    pub fn open(self) {
        // Without a caller there is nobody to let go.
        let _ = self.open.send(());
    }
}

/// Awaits a future that must complete within `timeout`.
///
/// # Panics
/// When it does not; the message names `what`.
pub async fn within<T>(timeout: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(timeout, future).await.unwrap_or_else(|_| panic!("not within {timeout:?}: {what}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_gate_stops_the_next_caller_only() {
        let gates = Arc::new(Gates::default());
        let mut gate = gates.close("up");
        gates.pass("down").await;
        let stopped = tokio::spawn({
            let gates = gates.clone();
            async move { gates.pass("up").await }
        });
        gate.arrived().await;
        gates.pass("up").await;
        assert!(!stopped.is_finished());
        gate.open();
        stopped.await.unwrap();
        drop(gates.close("up"));
        gates.pass("up").await;
    }
}
