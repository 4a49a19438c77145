//! What the use cases share: the ports, and what comes in with a call.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::StreamExt as _;
use jiff::Timestamp;

use crate::{Fact, Facts, Identity, LockOptions, Operation, OperationOutcome, Provisioner, Result, Scenarios, Store};

/// Randomness, handed in.
pub trait Entropy: Send + Sync {
    /// 64 random bits, from a source that cannot be guessed.
    fn next_u64(&self) -> u64;
}

/// The time that passes, handed in: for deadlines, and for pauses between attempts.
#[async_trait]
pub trait Clock: Send + Sync {
    /// How long it is since some fixed moment. Never goes back.
    fn elapsed(&self) -> Duration;

    /// Returns after that long.
    async fn sleep(&self, pause: Duration);
}

/// What comes in with a call: when, from where, chance, and the time that passes.
#[derive(Clone)]
pub struct Call {
    /// The time the call is taken to happen at.
    pub now: Timestamp,
    /// The trace of the call, in W3C traceparent form.
    pub traceparent: Option<String>,
    /// Randomness.
    pub entropy: Arc<dyn Entropy>,
    /// The time that passes.
    pub clock: Arc<dyn Clock>,
}

/// Until when a call waits for others, by its clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Duration);

/// The pause before the second attempt that follows a conflict, and the longest; each is about twice the one before.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

impl Deadline {
    /// What is left of it.
    fn left(self, call: &Call) -> Duration {
        self.0.saturating_sub(call.clock.elapsed())
    }

    /// Waits a while after so many attempts that met a conflict; [`crate::Error::Conflict`] if no time is left for another.
    pub(crate) async fn pause(self, call: &Call, conflicts: u32) -> Result<()> {
        let pause = call.jitter(PAUSE.saturating_mul(1 << conflicts.min(16)).min(LONGEST_PAUSE));
        if pause >= self.left(call) {
            return Err(crate::Error::Conflict);
        }
        call.clock.sleep(pause).await;
        Ok(())
    }
}

impl Call {
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_bits(self.entropy.next_u64())
    }

    /// Between half of `delay` and the whole of it.
    pub(crate) fn jitter(&self, delay: Duration) -> Duration {
        let half = delay / 2;
        half + half.mul_f64((self.entropy.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }
}

/// Bounds on what a use case does.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a call waits in all for whoever owns what it needs.
    pub lock_timeout: Duration,
    /// How many instances of one challenge are worked on at once.
    pub concurrency: usize,
    /// The delay before the first retry of a failed instance; doubles with each try.
    pub retry_initial_delay: Duration,
    /// The longest delay between two tries.
    pub retry_max_delay: Duration,
    /// The most that a challenge's `min` or `max` may be. One that was stored with more is treated as if it had this.
    pub pool_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lock_timeout: Duration::from_secs(30),
            concurrency: 8,
            retry_initial_delay: Duration::from_secs(5),
            retry_max_delay: Duration::from_secs(300),
            pool_max: 1000,
        }
    }
}

/// The use cases over their ports.
#[derive(Clone)]
pub struct Gauntlet {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provisioner: Arc<dyn Provisioner>,
    pub(crate) scenarios: Arc<dyn Scenarios>,
    pub(crate) facts: Arc<dyn Facts>,
    pub(crate) settings: Settings,
}

impl Gauntlet {
    /// Puts the use cases over their ports.
    pub fn new(
        store: Arc<dyn Store>,
        provisioner: Arc<dyn Provisioner>,
        scenarios: Arc<dyn Scenarios>,
        facts: Arc<dyn Facts>,
        settings: Settings,
    ) -> Self {
        Self { store, provisioner, scenarios, facts, settings }
    }

    /// The store, for reads that no rule stands over.
    pub fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// From now on.
    pub(crate) fn deadline(&self, call: &Call) -> Deadline {
        Deadline(call.clock.elapsed().saturating_add(self.settings.lock_timeout))
    }

    /// Whoever is waited for is waited for until then, and not at all after it.
    pub(crate) fn by(&self, call: &Call, deadline: Deadline) -> LockOptions {
        LockOptions { traceparent: call.traceparent.clone(), timeout: deadline.left(call) }
    }

    pub(crate) fn counted<T>(
        &self,
        challenge: &crate::ChallengeId,
        operation: Operation,
        result: Result<T>,
    ) -> Result<T> {
        let outcome = OperationOutcome::of(&result);
        self.facts.record(Fact::InstanceOperation { challenge: challenge.clone(), operation, outcome });
        result
    }

    /// Runs one job per item, a few at once, and answers every result.
    pub(crate) async fn each<I, T, F>(&self, items: Vec<I>, job: impl Fn(I) -> F) -> Vec<T>
    where
        F: Future<Output = T>,
    {
        futures::stream::iter(items).map(job).buffer_unordered(self.settings.concurrency.max(1)).collect().await
    }
}
