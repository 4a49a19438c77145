//! What a use case takes from its caller: the time, randomness, a trace and a clock; and how long it may wait and retry.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;

use crate::{Error, Identity, LockOptions, Result};

/// A source of randomness.
pub trait Entropy: Send + Sync {
    /// Returns 64 bits that cannot be guessed.
    fn next_u64(&self) -> u64;
}

/// A monotonic clock, for deadlines and for pauses between attempts.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Returns the time since a fixed moment. Never decreases.
    fn elapsed(&self) -> Duration;

    /// Waits for `pause`.
    async fn sleep(&self, pause: Duration);
}

/// The context of one call of a use case.
#[derive(Clone)]
pub struct Call {
    /// When the call happens, in wall-clock time.
    pub now: Timestamp,
    /// The trace of the call, in W3C traceparent form.
    pub traceparent: Option<String>,
    /// Randomness for identities, choices and jitter.
    pub entropy: Arc<dyn Entropy>,
    /// The clock of deadlines and pauses.
    pub clock: Arc<dyn Clock>,
}

impl Call {
    pub(crate) fn new_identity(&self) -> Identity {
        Identity::from_bits(self.entropy.next_u64())
    }

    /// A random share of `delay`: at least half of it, and less than the whole.
    pub(crate) fn jitter(&self, delay: Duration) -> Duration {
        let half = delay / 2;
        half + half.mul_f64((self.entropy.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Options for a lock that this call takes only if nobody holds it.
    pub(crate) fn without_waiting(&self) -> LockOptions {
        LockOptions { traceparent: self.traceparent.clone(), ..LockOptions::default() }
    }
}

/// The moment at which a call stops waiting for locks, by its clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Duration);

impl Deadline {
    pub(crate) fn after(call: &Call, timeout: Duration) -> Self {
        Self(call.clock.elapsed().saturating_add(timeout))
    }

    fn remaining(self, call: &Call) -> Duration {
        self.0.saturating_sub(call.clock.elapsed())
    }

    /// Options for a lock that the call waits for until this deadline.
    pub(crate) fn lock_options(self, call: &Call) -> LockOptions {
        LockOptions { traceparent: call.traceparent.clone(), timeout: self.remaining(call) }
    }
}

/// The longest that the first pause between two attempts may be. It doubles with each further pause, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// The attempts of a use case that reads, decides and then writes on condition that nothing changed: [`Error::Conflict`] means try again.
pub(crate) struct Attempts<'a> {
    call: &'a Call,
    deadline: Deadline,
    immediate: u32,
    begun: u32,
}

impl<'a> Attempts<'a> {
    /// `immediate` attempts follow each other without a pause; the first is one of them.
    pub(crate) fn new(call: &'a Call, deadline: Deadline, immediate: u32) -> Self {
        Self { call, deadline, immediate, begun: 0 }
    }

    /// Begins the next attempt and returns its number, counted from 0.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the pause before the attempt would reach the deadline.
    pub(crate) async fn next(&mut self) -> Result<u32> {
        let attempt = self.begun;
        if let Some(paused) = attempt.checked_sub(self.immediate) {
            let bound = FIRST_PAUSE.saturating_mul(1 << paused.min(15)).min(MAX_PAUSE);
            let pause = self.call.jitter(bound);
            if pause >= self.deadline.remaining(self.call) {
                return Err(Error::Conflict);
            }
            self.call.clock.sleep(pause).await;
        }
        self.begun = attempt.saturating_add(1);
        Ok(attempt)
    }

    /// Options for a lock that this attempt waits for.
    pub(crate) fn lock_options(&self) -> LockOptions {
        self.deadline.lock_options(self.call)
    }
}
