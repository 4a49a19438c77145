//! Use cases on instances: create (or claim from the pool), retrieve, query, renew, delete.

use futures::TryStreamExt as _;
use jiff::Timestamp;

use crate::{
    Additional, Assignment, Call, Challenge, ChallengeId, Error, Fact, Gauntlet, Instance, InstanceKey, Intent,
    Operation, Phase, Result, Snapshot, SourceId, Stored, Strategy, Stream, Target,
    provisioning::{UpdateFallback, new_instance},
};

/// Attempts that may use a cached snapshot. A conflict puts what it read into the cache, so that the second cached attempt has new data.
const MAX_CACHED_ATTEMPTS: u32 = 2;

/// Attempts without a pause: the cached ones, and the first that reads from the store.
const IMMEDIATE_ATTEMPTS: u32 = MAX_CACHED_ATTEMPTS + 1;

impl Gauntlet {
    /// Gives the source an instance: one from the pool if the pool has one, otherwise a new one. Returns once the instance is ready.
    ///
    /// If the instance cannot be launched, its resources are removed and nothing is stored.
    ///
    /// # Cancel safety
    /// Dropping the future may leave an unfinished instance, which [`Gauntlet::reconcile`] finishes or removes.
    pub async fn create_instance(
        &self,
        call: &Call,
        challenge: &ChallengeId,
        source: &SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        let result = self.create(call, challenge, source, additional).await;
        self.record_operation(challenge, Operation::Create, result)
    }

    async fn create(
        &self,
        call: &Call,
        id: &ChallengeId,
        source: &SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        let mut attempts = self.attempts(call, IMMEDIATE_ATTEMPTS);
        loop {
            let attempt = attempts.next().await?;
            let check = |snapshot| check_create(snapshot, call, id, source);
            let (challenge, mut pooled) = match self.check_snapshot(attempt, id, source, check).await? {
                CreateCheck::Allowed(challenge, pooled) => (*challenge, pooled),
                CreateCheck::Unfinished(key) => {
                    self.remove_failed_create(call, &key).await?;
                    continue;
                }
            };
            let key = InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) };
            let new = Instance {
                until: challenge.value.expiry(call.now),
                additional: additional.clone(),
                ..new_instance(call, &challenge.value, key, call.new_identity(), self.scenarios.flag_key())
            };
            let keeps_pool = challenge.value.bounds.min() > 0;
            // A rollout has yet to reach the others.
            pooled.retain(|stored| stored.value.applied_revision >= challenge.value.content_revision);
            if !pooled.is_empty() {
                let chosen = pooled.swap_remove((call.entropy.next_u64() % pooled.len() as u64) as usize);
                let claimed = claim_pooled(&chosen.value, new);
                match self.store.claim(&challenge, &chosen, &claimed, &attempts.lock_options()).await {
                    Err(Error::Conflict) => continue,
                    Err(error) => return Err(error),
                    Ok(guard) => {
                        self.facts.record(Fact::PoolClaim { challenge: id.clone(), hit: true });
                        return match guard {
                            None => Ok(claimed),
                            Some(guard) => {
                                let fallback = UpdateFallback::TearDown;
                                self.apply_update(call, guard, &challenge.value, claimed, fallback).await
                            }
                        };
                    }
                }
            }
            match self.store.begin_create(&challenge, &new, None, &attempts.lock_options()).await {
                Err(Error::Conflict) => {}
                Err(error) => return Err(error),
                Ok(guard) => {
                    if keeps_pool {
                        self.facts.record(Fact::PoolClaim { challenge: id.clone(), hit: false });
                    }
                    return self.provision(call, guard, &challenge.value, new).await;
                }
            }
        }
    }

    /// Removes the rest of a create that failed and could not be undone, unless another replica is doing that.
    async fn remove_failed_create(&self, call: &Call, key: &InstanceKey) -> Result<()> {
        match self.store.begin(key, Intent::Recover, &call.without_waiting()).await {
            Err(Error::Conflict) => Ok(()),
            Err(error) => Err(error),
            Ok((guard, instance)) => self.recover_instance(call, guard, instance).await,
        }
    }

    /// Returns what `check` makes of a snapshot. Early attempts use the cached snapshot if `check` accepts it. A cached snapshot may be stale,
    /// so it never causes a refusal: the store is read before that.
    async fn check_snapshot<T>(
        &self,
        attempt: u32,
        id: &ChallengeId,
        source: &SourceId,
        check: impl Fn(Snapshot) -> Result<T>,
    ) -> Result<T> {
        let cached = if attempt < MAX_CACHED_ATTEMPTS { self.store.cached_snapshot(id, source) } else { None };
        if let Some(accepted) = cached.filter(Snapshot::agrees).and_then(|snapshot| check(snapshot).ok()) {
            return Ok(accepted);
        }
        check(self.store.snapshot(id, source).await?)
    }

    /// Returns the source's instance.
    ///
    /// # Errors
    /// [`Error::InstanceNotFound`], also when the challenge is unknown or the instance is still being created.
    pub async fn retrieve_instance(&self, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let snapshot = self.store.snapshot(challenge, source).await?;
        snapshot
            .instance
            .map(|stored| stored.value)
            .filter(Instance::is_visible)
            .ok_or_else(|| Error::InstanceNotFound(challenge.clone(), source.clone()))
    }

    /// Returns the source's instances of all challenges, or every source's when `None`. Takes no lock and writes nothing.
    pub fn query_instances(&self, source: Option<&SourceId>) -> Stream<'_, Instance> {
        Box::pin(
            self.store.instances_by_source(source).try_filter(|instance| std::future::ready(instance.is_visible())),
        )
    }

    /// Returns the claimed instances that have expired at `now`, the longest overdue first, except those still being created. Takes no lock
    /// and writes nothing. Costs as much as it returns, however many instances there are.
    pub fn expired_instances(&self, now: Timestamp) -> Stream<'_, Instance> {
        // No instance outlives its challenge, so the instances' own ends suffice.
        Box::pin(self.store.expired(now).try_filter(|instance| std::future::ready(instance.is_visible())))
    }

    /// Restarts the timeout of the source's instance.
    pub async fn renew_instance(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let result = self.renew(call, challenge, source).await;
        self.record_operation(challenge, Operation::Renew, result)
    }

    async fn renew(&self, call: &Call, id: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let mut attempts = self.attempts(call, IMMEDIATE_ATTEMPTS);
        loop {
            let attempt = attempts.next().await?;
            let check = |snapshot| check_renew(snapshot, call, id, source);
            let (challenge, stored) = self.check_snapshot(attempt, id, source, check).await?;
            let (last_renew, until) = challenge.renewal(stored.value.last_renew, call.now);
            let renewed = Instance { last_renew, until, ..stored.value.clone() };
            match self.store.rewrite(&stored, &renewed, &attempts.lock_options()).await {
                Err(Error::Conflict) => {}
                result => return result.map(|()| renewed),
            }
        }
    }

    /// Deletes the source's instance, and returns once its resources are removed. If they cannot be removed, the instance is kept as failed
    /// and its deletion is retried.
    pub async fn delete_instance(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<()> {
        let result = self.delete(call, challenge, source).await;
        self.record_operation(challenge, Operation::Delete, result)
    }

    async fn delete(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<()> {
        let key = InstanceKey { challenge: challenge.clone(), assignment: Assignment::Source(source.clone()) };
        let options = self.deadline(call).lock_options(call);
        match self.store.begin(&key, Intent::Delete, &options).await {
            Ok((guard, instance)) => self.tear_down(call, guard, instance, Operation::Delete).await,
            Err(Error::Conflict) => Err(match self.store.challenge(challenge).await? {
                None => Error::ChallengeNotFound(challenge.clone()),
                Some(_) => Error::InstanceNotFound(challenge.clone(), source.clone()),
            }),
            Err(error) => Err(error),
        }
    }

    /// Deletes the source's instance if it is still the one created at `since` and has expired at the call's time. Returns whether it was: an
    /// instance that has been renewed, or that replaced the expired one, is left alone.
    ///
    /// # Errors
    /// Those of [`Gauntlet::delete_instance`]; [`Error::InstanceNotFound`] also when the challenge is unknown.
    pub async fn delete_expired_instance(
        &self,
        call: &Call,
        challenge: &ChallengeId,
        source: &SourceId,
        since: Timestamp,
    ) -> Result<bool> {
        let result = self.delete_expired(call, challenge, source, since).await;
        match result {
            // No operation took place.
            Ok(false) => result,
            _ => self.record_operation(challenge, Operation::Delete, result),
        }
    }

    async fn delete_expired(
        &self,
        call: &Call,
        challenge: &ChallengeId,
        source: &SourceId,
        since: Timestamp,
    ) -> Result<bool> {
        let key = InstanceKey { challenge: challenge.clone(), assignment: Assignment::Source(source.clone()) };
        let mut attempts = self.attempts(call, 1);
        let mut marked = false;
        loop {
            attempts.next().await?;
            let Some(stored) = self.store.instance(&key).await? else {
                return if marked { Ok(true) } else { Err(Error::InstanceNotFound(challenge.clone(), source.clone())) };
            };
            // A marked instance is never renewed, so one with another creation time has replaced it.
            if stored.value.since != since || (!marked && !stored.value.is_expired(call.now)) {
                return Ok(marked);
            }
            // One transaction marks exactly the version that has been checked. From then on the instance will be deleted, by us or by recovery.
            let deleting = Instance { phase: Phase::Deleting, ..stored.value.clone() };
            match self.store.rewrite(&stored, &deleting, &attempts.lock_options()).await {
                Err(Error::Conflict) => continue,
                other => other?,
            }
            marked = true;
            match self.store.begin(&key, Intent::Recover, &attempts.lock_options()).await {
                Ok((guard, instance)) if instance.since == since => {
                    return self.tear_down(call, guard, instance, Operation::Delete).await.map(|()| true);
                }
                Ok(_) => return Ok(true),
                // A reconciler took the instance first. The next attempt waits for it.
                Err(Error::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether a source may be given an instance.
enum CreateCheck {
    /// Yes: the challenge, and its ready pooled instances.
    Allowed(Box<Stored<Challenge>>, Vec<Stored<Instance>>),
    /// Not before the rest of an earlier create, stored under this key, is removed.
    Unfinished(InstanceKey),
}

fn check_create(snapshot: Snapshot, call: &Call, id: &ChallengeId, source: &SourceId) -> Result<CreateCheck> {
    let Snapshot { challenge, instance, pooled } = snapshot;
    let challenge = challenge.filter(|c| !c.value.deleting).ok_or_else(|| Error::ChallengeNotFound(id.clone()))?;
    let existing = instance.map(|stored| stored.value);
    if existing.as_ref().is_some_and(|existing| !existing.is_failed_create()) {
        return Err(Error::InstanceExists(id.clone(), source.clone()));
    }
    if challenge.value.is_expired(call.now) {
        return Err(Error::ChallengeExpired(id.clone()));
    }
    Ok(match existing {
        Some(existing) => CreateCheck::Unfinished(existing.key),
        None => CreateCheck::Allowed(Box::new(challenge), pooled),
    })
}

/// Returns the challenge and the instance if the instance may be renewed.
fn check_renew(
    snapshot: Snapshot,
    call: &Call,
    id: &ChallengeId,
    source: &SourceId,
) -> Result<(Challenge, Stored<Instance>)> {
    let challenge = snapshot.challenge.ok_or_else(|| Error::ChallengeNotFound(id.clone()))?.value;
    if challenge.timeout.is_none() {
        return Err(Error::ChallengeNoRenewal(id.clone()));
    }
    let stored = snapshot
        .instance
        .filter(|stored| stored.value.is_visible())
        .ok_or_else(|| Error::InstanceNotFound(id.clone(), source.clone()))?;
    if stored.value.is_expired(call.now) {
        return Err(Error::InstanceExpired(id.clone(), source.clone()));
    }
    Ok((challenge, stored))
}

/// The record of a pooled instance once claimed: key, times and template values of `new`, resources of `pooled`. If `new` has template values
/// of its own, the resources have to be updated in place.
fn claim_pooled(pooled: &Instance, new: Instance) -> Instance {
    let target = (!new.additional.is_empty()).then(|| Target {
        identity: pooled.identity.clone(),
        scenario: new.scenario.clone(),
        revision: new.applied_revision,
        strategy: Strategy::UpdateInPlace,
    });
    Instance {
        identity: pooled.identity.clone(),
        phase: if target.is_some() { Phase::Updating } else { Phase::Ready },
        connection_info: pooled.connection_info.clone(),
        flags: pooled.flags.clone(),
        flag_key: pooled.flag_key.clone(),
        target,
        ..new
    }
}
