//! The use cases as the transports call them: at the current time, in the current trace, and independent of whether the client stays connected.

use gauntlet_domain::{
    Additional, Call, Challenge, ChallengeId, ChallengeUpdate, Error, Gauntlet, Instance, NewChallenge, Result,
    SourceId, Stream, UpdateReport,
};
use jiff::Timestamp;

use crate::{call::call_now, signals::Signals, tasks::Tasks};

/// The use cases as the transports call them. Changes continue when the future of their call is dropped. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct Operations {
    gauntlet: Gauntlet,
    tasks: Tasks,
    signals: Signals,
}

impl Operations {
    pub(crate) fn new(gauntlet: Gauntlet, tasks: Tasks, signals: Signals) -> Self {
        Self { gauntlet, tasks, signals }
    }

    /// Spawns a read that does not end with its caller. It must end on its own.
    pub(crate) fn spawn_read(&self, read: impl Future<Output = ()> + Send + 'static) {
        drop(self.tasks.spawn_operation(read));
    }

    /// Runs a change in a task. If it fails by a fault, requests a reconcile pass, as it may have left work unfinished.
    async fn run<T, F>(&self, work: impl FnOnce(Gauntlet, Call) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let result = match self.tasks.spawn_operation(work(self.gauntlet.clone(), call_now())).await {
            Ok(result) => result,
            Err(error) => Err(Error::Internal(format!("the operation did not complete: {error}"))),
        };
        if result.as_ref().is_err_and(Error::is_fault) {
            self.signals.request_reconcile();
        }
        result
    }

    pub(crate) async fn create_challenge(&self, new: NewChallenge) -> Result<Challenge> {
        let created = self.run(|gauntlet, call| async move { gauntlet.create_challenge(&call, new).await }).await?;
        if created.bounds.min() > 0 {
            self.signals.request_pool_check(&created.id);
        }
        Ok(created)
    }

    pub(crate) async fn retrieve_challenge(&self, id: &ChallengeId) -> Result<(Challenge, Vec<Instance>)> {
        self.gauntlet.retrieve_challenge(id).await
    }

    pub(crate) fn query_challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)> {
        self.gauntlet.query_challenges()
    }

    pub(crate) async fn update_challenge(&self, id: ChallengeId, update: ChallengeUpdate) -> Result<UpdateReport> {
        let updated =
            self.run(|gauntlet, call| async move { gauntlet.update_challenge(&call, &id, update).await }).await?;
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

    pub(crate) async fn delete_challenge(&self, id: ChallengeId) -> Result<()> {
        self.run(|gauntlet, call| async move { gauntlet.delete_challenge(&call, &id).await }).await
    }

    pub(crate) async fn create_instance(
        &self,
        challenge: ChallengeId,
        source: SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        self.run(|gauntlet, call| async move { gauntlet.create_instance(&call, &challenge, &source, additional).await })
            .await
    }

    pub(crate) async fn retrieve_instance(&self, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        self.gauntlet.retrieve_instance(challenge, source).await
    }

    pub(crate) fn query_instances(&self, source: Option<&SourceId>) -> Stream<'_, Instance> {
        self.gauntlet.query_instances(source)
    }

    pub(crate) fn expired_instances(&self) -> Stream<'_, Instance> {
        self.gauntlet.expired_instances(Timestamp::now())
    }

    pub(crate) async fn renew_instance(&self, challenge: ChallengeId, source: SourceId) -> Result<Instance> {
        self.run(|gauntlet, call| async move { gauntlet.renew_instance(&call, &challenge, &source).await }).await
    }

    pub(crate) async fn delete_instance(&self, challenge: ChallengeId, source: SourceId) -> Result<()> {
        self.run(|gauntlet, call| async move { gauntlet.delete_instance(&call, &challenge, &source).await }).await
    }

    pub(crate) async fn delete_expired_instance(
        &self,
        challenge: ChallengeId,
        source: SourceId,
        since: Timestamp,
    ) -> Result<bool> {
        self.run(
            |gauntlet, call| async move { gauntlet.delete_expired_instance(&call, &challenge, &source, since).await },
        )
        .await
    }
}

#[cfg(test)]
mod tests;
