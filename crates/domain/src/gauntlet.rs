//! [`Gauntlet`]: the ports that the use cases run on, their settings, and helpers that they share.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;

use crate::{
    Call, ChallengeId, Fact, Facts, Operation, OperationOutcome, Provisioner, Result, Scenarios, Store,
    call::{Attempts, Deadline},
};

/// Limits of the use cases.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long one call waits for locks and retries, all in all.
    pub lock_timeout: Duration,
    /// How many instances of one challenge one call works on at once.
    pub concurrency: usize,
    /// The delay before the first retry of a failed instance. Each further failure doubles it.
    pub retry_initial_delay: Duration,
    /// The longest delay between two retries of a failed instance.
    pub retry_max_delay: Duration,
    /// The highest value that `min` and `max` of a challenge's pool may have. A stored challenge that exceeds it is treated as if it had
    /// exactly this value.
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

/// The use cases. Cloning is cheap: clones share the ports.
#[derive(Clone)]
pub struct Gauntlet {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) provisioner: Arc<dyn Provisioner>,
    pub(crate) scenarios: Arc<dyn Scenarios>,
    pub(crate) facts: Arc<dyn Facts>,
    pub(crate) settings: Settings,
}

impl Gauntlet {
    /// Creates the use cases over these ports.
    pub fn new(
        store: Arc<dyn Store>,
        provisioner: Arc<dyn Provisioner>,
        scenarios: Arc<dyn Scenarios>,
        facts: Arc<dyn Facts>,
        settings: Settings,
    ) -> Self {
        Self { store, provisioner, scenarios, facts, settings }
    }

    /// The store, for reads that need no use case.
    pub fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// The deadline of a call that starts waiting now.
    pub(crate) fn deadline(&self, call: &Call) -> Deadline {
        Deadline::after(call, self.settings.lock_timeout)
    }

    /// Attempts until [`Gauntlet::deadline`], the first `immediate` of them without a pause.
    pub(crate) fn attempts<'a>(&self, call: &'a Call, immediate: u32) -> Attempts<'a> {
        Attempts::new(call, self.deadline(call), immediate)
    }

    /// Records the outcome of an operation on an instance, and returns the result unchanged.
    pub(crate) fn record_operation<T>(
        &self,
        challenge: &ChallengeId,
        operation: Operation,
        result: Result<T>,
    ) -> Result<T> {
        let outcome = OperationOutcome::of(&result);
        self.facts.record(Fact::InstanceOperation { challenge: challenge.clone(), operation, outcome });
        result
    }

    /// Runs one job per item, at most [`Settings::concurrency`] at once. Results come in order of completion.
    pub(crate) async fn run_concurrently<I, T, F>(&self, items: Vec<I>, job: impl Fn(I) -> F) -> Vec<T>
    where
        F: Future<Output = T>,
    {
        futures::stream::iter(items).map(job).buffer_unordered(self.settings.concurrency.max(1)).collect().await
    }
}
