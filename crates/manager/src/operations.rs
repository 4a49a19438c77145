//! The use cases as the transports call them: at the current time, in the current trace, and independent of whether the client stays connected.

use std::sync::Arc;

use futures::StreamExt as _;
use gauntlet_domain::{
    Additional, Call, Challenge, ChallengeId, ChallengeUpdate, Error, Gauntlet, Instance, NewChallenge, Result,
    SourceId, Stream, UpdateReport,
};
use jiff::Timestamp;
use tokio::sync::Semaphore;

use crate::{audit, call::call_now, caller::Caller, signals::Signals, tasks::Tasks};

/// The use cases as the transports call them. Changes continue when the future of their call is dropped. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Operations {
    gauntlet: Gauntlet,
    tasks: Tasks,
    signals: Signals,
    /// A permit for each change that may run, also those whose client has disconnected.
    running: Arc<Semaphore>,
}

impl Operations {
    /// `changes` is how many may run at the same time.
    pub(crate) fn new(gauntlet: Gauntlet, tasks: Tasks, signals: Signals, changes: usize) -> Self {
        Self { gauntlet, tasks, signals, running: Arc::new(Semaphore::new(changes)) }
    }

    /// Spawns a read that does not end with its caller. It must end on its own.
    pub(crate) fn spawn_read(&self, read: impl Future<Output = ()> + Send + 'static) {
        drop(self.tasks.spawn_operation(read));
    }

    /// Runs a change in a task, which also writes its audit record. If it fails by a fault, requests a reconcile pass, as it may have left work
    /// unfinished.
    async fn run<T, F>(&self, record: audit::Pending, work: impl FnOnce(Gauntlet, Call) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.run_with_outcome(record, work, |_| "ok").await
    }

    /// The same for a change whose result may have failures: `outcome` returns what the audit record says.
    async fn run_with_outcome<T, F>(
        &self,
        record: audit::Pending,
        work: impl FnOnce(Gauntlet, Call) -> F,
        outcome: fn(&T) -> &'static str,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let Ok(permit) = self.running.clone().try_acquire_owned() else {
            record.end(Error::Overloaded.code());
            return Err(Error::Overloaded);
        };
        let work = work(self.gauntlet.clone(), call_now());
        let audited = async move {
            let result = work.await;
            drop(permit);
            record.end(result.as_ref().map_or_else(Error::code, outcome));
            result
        };
        let result = match self.tasks.spawn_operation(audited).await {
            Ok(result) => result,
            Err(error) => Err(Error::Internal(format!("the operation did not complete: {error}"))),
        };
        if result.as_ref().is_err_and(Error::is_fault) {
            self.signals.request_reconcile();
        }
        result
    }

    pub(crate) async fn create_challenge(&self, record: audit::Pending, new: NewChallenge) -> Result<Challenge> {
        let created =
            self.run(record, |gauntlet, call| async move { gauntlet.create_challenge(&call, new).await }).await?;
        if created.bounds.min() > 0 {
            self.signals.request_pool_check(&created.id);
        }
        Ok(created)
    }

    pub(crate) async fn retrieve_challenge(&self, id: &ChallengeId) -> Result<(Challenge, Vec<Instance>)> {
        self.gauntlet.retrieve_challenge(id).await
    }

    /// The challenges that the caller sees.
    pub(crate) fn query_challenges(&self, caller: &Caller) -> Stream<'_, (Challenge, Vec<Instance>)> {
        visible(caller, self.gauntlet.query_challenges(), |(challenge, _)| &challenge.id)
    }

    pub(crate) async fn update_challenge(
        &self,
        record: audit::Pending,
        id: ChallengeId,
        update: ChallengeUpdate,
    ) -> Result<UpdateReport> {
        let updated = self
            .run_with_outcome(
                record,
                |gauntlet, call| async move { gauntlet.update_challenge(&call, &id, update).await },
                |report| report.failures.first().map_or("ok", Error::code),
            )
            .await?;
        for error in &updated.failures {
            tracing::warn!(error.type = error.code(), %error, challenge = %updated.challenge.id, "cannot update an instance; retrying later");
        }
        if !updated.failures.is_empty() {
            self.signals.request_reconcile();
        }
        // Lowered bounds may leave too many instances in the pool.
        self.signals.request_pool_check(&updated.challenge.id);
        Ok(updated)
    }

    pub(crate) async fn delete_challenge(&self, record: audit::Pending, id: ChallengeId) -> Result<()> {
        self.run(record, |gauntlet, call| async move { gauntlet.delete_challenge(&call, &id).await }).await
    }

    pub(crate) async fn create_instance(
        &self,
        record: audit::Pending,
        challenge: ChallengeId,
        source: SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        self.run(record, |gauntlet, call| async move {
            gauntlet.create_instance(&call, &challenge, &source, additional).await
        })
        .await
    }

    pub(crate) async fn retrieve_instance(&self, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        self.gauntlet.retrieve_instance(challenge, source).await
    }

    /// The instances of the challenges that the caller sees.
    pub(crate) fn query_instances(&self, caller: &Caller, source: Option<&SourceId>) -> Stream<'_, Instance> {
        visible(caller, self.gauntlet.query_instances(source), |instance| &instance.key.challenge)
    }

    /// The expired instances of the challenges that the caller sees.
    pub(crate) fn expired_instances(&self, caller: &Caller) -> Stream<'_, Instance> {
        visible(caller, self.gauntlet.expired_instances(Timestamp::now()), |instance| &instance.key.challenge)
    }

    pub(crate) async fn renew_instance(
        &self,
        record: audit::Pending,
        challenge: ChallengeId,
        source: SourceId,
    ) -> Result<Instance> {
        self.run(record, |gauntlet, call| async move { gauntlet.renew_instance(&call, &challenge, &source).await })
            .await
    }

    pub(crate) async fn delete_instance(
        &self,
        record: audit::Pending,
        challenge: ChallengeId,
        source: SourceId,
    ) -> Result<()> {
        self.run(record, |gauntlet, call| async move { gauntlet.delete_instance(&call, &challenge, &source).await })
            .await
    }

    pub(crate) async fn delete_expired_instance(
        &self,
        record: audit::Pending,
        challenge: ChallengeId,
        source: SourceId,
        since: Timestamp,
    ) -> Result<bool> {
        self.run(record, |gauntlet, call| async move {
            gauntlet.delete_expired_instance(&call, &challenge, &source, since).await
        })
        .await
    }
}

/// Leaves out the items of challenges that the caller doesn't see. Errors stay.
fn visible<'a, T: Send + 'a>(
    caller: &Caller,
    items: Stream<'a, T>,
    challenge: fn(&T) -> &ChallengeId,
) -> Stream<'a, T> {
    if caller.may_use_all() {
        return items;
    }
    let caller = caller.clone();
    let is_visible = move |item: &Result<T>| item.as_ref().map_or(true, |item| caller.may_use(challenge(item)));
    items.filter(move |item| std::future::ready(is_visible(item))).boxed()
}

#[cfg(test)]
mod tests;
