//! Waiting for a condition with a deadline, instead of sleeping for a fixed time.
//!
//! A condition is a closure that returns a `bool`, an `Option` or a `Result`. Polling ends with the first `true`, `Some` or `Ok`, whose value
//! is returned; when the deadline passes, the test panics with the last error.
//!
//! ```
//! # async fn example(store: &std::collections::HashSet<u32>) {
//! gauntlet_testing::eventually("the store is empty", async || store.is_empty()).await;
//! # }
//! ```

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// The default timeout: longer than anything takes on a busy machine, so that only a real hang reaches it.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The default pause between two attempts.
pub const INTERVAL: Duration = Duration::from_millis(5);

/// What a polled closure may return.
pub trait Attempt {
    /// What a successful attempt yields.
    type Value;

    /// The value, or why the condition does not hold yet.
    ///
    /// # Errors
    /// The condition does not hold yet.
    fn into_result(self) -> Result<Self::Value, String>;
}

impl Attempt for bool {
    type Value = ();

    fn into_result(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("still false".to_owned()) }
    }
}

impl<T> Attempt for Option<T> {
    type Value = T;

    fn into_result(self) -> Result<T, String> {
        self.ok_or_else(|| "still none".to_owned())
    }
}

impl<T, E: Display> Attempt for Result<T, E> {
    type Value = T;

    fn into_result(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// How long to poll, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poll {
    timeout: Duration,
    interval: Duration,
}

impl Default for Poll {
    fn default() -> Self {
        Self::within(TIMEOUT)
    }
}

impl Poll {
    /// Polls every [`INTERVAL`] for at most `timeout`.
    #[must_use]
    pub const fn within(timeout: Duration) -> Self {
        Self { timeout, interval: INTERVAL }
    }

    /// Changes the pause between two attempts.
    #[must_use]
    pub const fn every(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Polls on tokio's clock until the attempt succeeds, and returns its value.
    ///
    /// # Panics
    /// When the timeout passes, also while an attempt is still running; the message names `what` and the last error.
    pub async fn until<A: Attempt>(self, what: &str, mut attempt: impl AsyncFnMut() -> A) -> A::Value {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let mut last = "the first attempt has not returned".to_owned();
        loop {
            match tokio::time::timeout_at(deadline, attempt()).await.map(Attempt::into_result) {
                Ok(Ok(value)) => return value,
                Ok(Err(error)) if tokio::time::Instant::now() < deadline => last = error,
                Ok(Err(error)) => self.fail(what, &error),
                Err(_) => self.fail(what, &last),
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    /// Polls on this thread until the attempt succeeds, and returns its value.
    ///
    /// # Panics
    /// When the timeout passes; the message names `what` and the last error.
    #[track_caller]
    pub fn until_blocking<A: Attempt>(self, what: &str, mut attempt: impl FnMut() -> A) -> A::Value {
        self.try_until_blocking(|| attempt().into_result()).unwrap_or_else(|error| self.fail(what, &error))
    }

    /// Polls on this thread until the attempt succeeds.
    ///
    /// # Errors
    /// The last error, when the timeout passes.
    pub fn try_until_blocking<T, E>(self, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
        let deadline = Instant::now() + self.timeout;
        loop {
            match attempt() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(self.interval),
                result => return result,
            }
        }
    }

    #[track_caller]
    fn fail(self, what: &str, error: &str) -> ! {
        panic!("not within {:?}: {what}: {error}", self.timeout)
    }
}

/// Waits until the condition holds, polling every [`INTERVAL`] for at most [`TIMEOUT`]; see [`Poll::until`].
///
/// # Panics
/// When the timeout passes.
pub async fn eventually<A: Attempt>(what: &str, attempt: impl AsyncFnMut() -> A) -> A::Value {
    Poll::default().until(what, attempt).await
}

/// As [`eventually`], for tests without a runtime; blocks this thread.
///
/// # Panics
/// When the timeout passes.
#[track_caller]
pub fn eventually_blocking<A: Attempt>(what: &str, attempt: impl FnMut() -> A) -> A::Value {
    Poll::default().until_blocking(what, attempt)
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    const SHORT: Poll = Poll::within(Duration::from_millis(20)).every(Duration::from_millis(1));

    fn message(panic: Box<dyn std::any::Any + Send>) -> String {
        *panic.downcast().unwrap()
    }

    #[test]
    fn the_first_success_is_returned() {
        let mut attempts = 0..;
        let value = eventually_blocking("the third attempt", || attempts.next().filter(|attempt| *attempt == 2));
        assert_eq!((value, attempts.next()), (2, Some(3)));
        eventually_blocking("a bool", || true);
    }

    #[test]
    fn timeout_reports_the_last_error() {
        let mut attempts = 0;
        let panic = catch_unwind(move || {
            SHORT.until_blocking("a failing attempt", || {
                attempts += 1;
                Err::<(), _>(if attempts == 1 { "first" } else { "last" })
            });
        });
        assert_eq!(message(panic.unwrap_err()), "not within 20ms: a failing attempt: last");
        assert_eq!(SHORT.try_until_blocking(|| Err::<(), _>(7)), Err(7));
    }

    #[tokio::test(start_paused = true)]
    async fn async_polling_ends_a_hanging_attempt() {
        let hanging = tokio::spawn(eventually("an attempt that hangs", async || std::future::pending::<bool>().await));
        let panic = hanging.await.unwrap_err().into_panic();
        assert_eq!(message(panic), "not within 60s: an attempt that hangs: the first attempt has not returned");
        let mut attempts = 0..;
        assert_eq!(eventually("the third", async || attempts.next().filter(|attempt| *attempt == 2)).await, 2);
    }
}
