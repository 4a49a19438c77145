//! Use cases on challenges: create, retrieve, query, update, delete, and how an update or a deletion reaches the instances.

use futures::TryStreamExt as _;
use jiff::Timestamp;

use crate::{
    Additional, Call, Challenge, ChallengeId, ChallengeUpdate, Error, Gauntlet, Instance, Intent, LockGuard, LockKind,
    Operation, Phase, PoolBounds, Result, Rollout, Stored, Strategy, Stream, Target, call::Deadline,
    provisioning::UpdateFallback,
};

/// A challenge to create.
#[derive(Debug, Clone)]
pub struct NewChallenge {
    /// Its id.
    pub id: ChallengeId,
    /// The scenario's reference.
    pub scenario: String,
    /// How long an instance lives after its creation or last renewal.
    pub timeout: Option<std::time::Duration>,
    /// When all instances expire, renewed or not.
    pub until: Option<Timestamp>,
    /// The values given to the scenario's templates.
    pub additional: Additional,
    /// How many instances to keep ready.
    pub min: i64,
    /// How many instances, claimed and pooled, not to exceed; 0 is no bound.
    pub max: i64,
}

/// What an update did.
#[derive(Debug)]
pub struct UpdateReport {
    /// The challenge after the update.
    pub challenge: Challenge,
    /// Its claimed instances.
    pub instances: Vec<Instance>,
    /// Failures of single instances. Each failure of an operation is also stored with its instance.
    pub failures: Vec<Error>,
}

impl Gauntlet {
    /// Creates a challenge. Its pool is filled later: see [`Gauntlet::plan_pool`].
    pub async fn create_challenge(&self, call: &Call, new: NewChallenge) -> Result<Challenge> {
        let limit = i64::from(self.settings.pool_max);
        let bounds = PoolBounds::new(new.min, new.max)
            .filter(|_| new.min <= limit && new.max <= limit)
            .ok_or(Error::PoolOutOfBounds { min: new.min, max: new.max, limit })?;
        // A duplicate is refused before the scenario is fetched, which may be expensive.
        if self.store.challenge(&new.id).await?.is_some() {
            return Err(Error::ChallengeExists(new.id));
        }
        let scenario = self.scenarios.resolve(&new.scenario).await?;
        let challenge = Challenge {
            id: new.id,
            scenario,
            timeout: new.timeout,
            until: new.until,
            additional: new.additional,
            bounds,
            revision: 1,
            content_revision: 1,
            rollout: None,
            deleting: false,
            traceparent: call.traceparent.clone(),
        };
        self.store.insert_challenge(&challenge).await?;
        Ok(challenge)
    }

    /// Returns a challenge with its claimed instances.
    pub async fn retrieve_challenge(&self, id: &ChallengeId) -> Result<(Challenge, Vec<Instance>)> {
        let stored = self.store.challenge(id).await?.ok_or_else(|| Error::ChallengeNotFound(id.clone()))?;
        Ok((stored.value, self.visible_instances(id).await?))
    }

    /// Returns all challenges with their claimed instances. Takes no lock and writes nothing.
    pub fn query_challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)> {
        Box::pin(self.store.challenges().map_ok(|(challenge, mut instances)| {
            instances.retain(Instance::is_visible);
            (challenge, instances)
        }))
    }

    async fn visible_instances(&self, id: &ChallengeId) -> Result<Vec<Instance>> {
        let visible = |stored: Stored<Instance>| async move { Ok(stored.value.is_visible().then_some(stored.value)) };
        self.store.instances_of(id).try_filter_map(visible).try_collect().await
    }

    /// Updates a challenge and then its instances, several at once. The failure of one instance is reported and does not hold up the others.
    ///
    /// The update is recorded first. After a crash, [`Gauntlet::reconcile`] finishes the rollout.
    pub async fn update_challenge(
        &self,
        call: &Call,
        id: &ChallengeId,
        update: ChallengeUpdate,
    ) -> Result<UpdateReport> {
        if self.store.challenge(id).await?.is_none_or(|stored| stored.value.deleting) {
            return Err(Error::ChallengeNotFound(id.clone()));
        }
        let scenario = match &update.scenario {
            Some(reference) => Some(self.scenarios.resolve(reference).await?),
            None => None,
        };
        let deadline = self.deadline(call);
        let rollout = self.store.lock(LockKind::Rollout, id, &deadline.lock_options(call)).await?;
        let edited = self
            .edit_challenge(call, deadline, id, |challenge| {
                challenge.apply(&update, scenario, self.settings.pool_max)?;
                challenge.rollout = Some(Rollout { strategy: update.strategy, traceparent: call.traceparent.clone() });
                Ok(())
            })
            .await;
        let challenge = match edited {
            Ok(challenge) => challenge,
            Err(error) => {
                rollout.release().await?;
                return Err(error);
            }
        };
        let (challenge, failures) = self.roll_out(call, rollout, challenge).await?;
        Ok(UpdateReport { instances: self.visible_instances(id).await?, challenge, failures })
    }

    /// Deletes a challenge and all its instances, and returns once their resources are removed. If some cannot be removed, the challenge stays,
    /// marked as deleting, until [`Gauntlet::reconcile`] or another deletion succeeds.
    pub async fn delete_challenge(&self, call: &Call, id: &ChallengeId) -> Result<()> {
        if self.store.challenge(id).await?.is_none() {
            return Err(Error::ChallengeNotFound(id.clone()));
        }
        let deadline = self.deadline(call);
        // Marked before the rollout lock is taken: from then on an update in progress gets no new instances to work on.
        self.edit_challenge(call, deadline, id, |challenge| {
            challenge.deleting = true;
            Ok(())
        })
        .await?;
        let rollout = self.store.lock(LockKind::Rollout, id, &deadline.lock_options(call)).await?;
        match self.store.challenge(id).await? {
            Some(stored) if stored.value.deleting => self.finish_deletion(call, rollout, id).await,
            // Another deletion finished first. A challenge of this id was created after it.
            _ => rollout.release().await,
        }
    }

    /// Reads, edits and writes a challenge under its lock.
    async fn edit_challenge(
        &self,
        call: &Call,
        deadline: Deadline,
        id: &ChallengeId,
        edit: impl FnOnce(&mut Challenge) -> Result<()> + Send,
    ) -> Result<Challenge> {
        let guard = self.store.lock(LockKind::Challenge, id, &deadline.lock_options(call)).await?;
        let edited = match self.store.challenge(id).await? {
            None => Err(Error::ChallengeNotFound(id.clone())),
            Some(stored) => {
                let mut challenge = stored.value;
                edit(&mut challenge).map(|()| challenge)
            }
        };
        match edited {
            Ok(challenge) => {
                guard.update_challenge(&challenge).await?;
                Ok(challenge)
            }
            Err(error) => {
                guard.release().await?;
                Err(error)
            }
        }
    }

    /// Updates every instance to the challenge's revision, then marks the rollout as done. Each instance has its own deadline, and so has the
    /// mark: time spent on one instance is not taken from the others.
    pub(crate) async fn roll_out(
        &self,
        call: &Call,
        rollout: LockGuard,
        challenge: Challenge,
    ) -> Result<(Challenge, Vec<Error>)> {
        let strategy = challenge.rollout.as_ref().map_or(Strategy::default(), |rollout| rollout.strategy);
        let instances: Vec<_> = self.store.instances_of(&challenge.id).try_collect().await?;
        let updates =
            self.run_concurrently(instances, |stored| self.update_instance(call, &challenge, strategy, stored));
        let results = rollout.run(async { Ok(updates.await) }).await?;
        let mut failures: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        let unreadable = self.store.all_readable(&challenge.id).await.err();
        let unreadable = unreadable
            .and_then(|error| self.record_operation::<()>(&challenge.id, Operation::Update, Err(error)).err());
        // Recovery retries instances that failed. Instances that could not be locked or read need another rollout.
        let is_unreached = |error: &Error| matches!(error, Error::Busy { .. } | Error::Unavailable { .. });
        let reached_all = unreadable.is_none() && !failures.iter().any(is_unreached);
        failures.extend(unreadable);
        let revision = challenge.revision;
        let challenge = self
            .edit_challenge(call, self.deadline(call), &challenge.id, |challenge| {
                if challenge.revision == revision && reached_all {
                    challenge.rollout = None;
                }
                Ok(())
            })
            .await?;
        rollout.release().await?;
        Ok((challenge, failures))
    }

    /// Updates one instance to the challenge's revision. An instance that is deleted or claimed meanwhile needs no update: claims take only
    /// instances that are up to date.
    async fn update_instance(
        &self,
        call: &Call,
        challenge: &Challenge,
        strategy: Strategy,
        listed: Stored<Instance>,
    ) -> Result<()> {
        let key = listed.value.key.clone();
        let mut attempts = self.attempts(call, 2);
        let mut listed = Some(listed);
        loop {
            attempts.next().await?;
            let current = match listed.take() {
                Some(listed) => listed,
                None => match self.store.instance(&key).await? {
                    Some(current) => current,
                    None => return Ok(()),
                },
            };
            // A deletion is never reverted. If its owner is gone, recovery finishes it.
            if current.value.applied_revision >= challenge.revision || current.value.phase == Phase::Deleting {
                return Ok(());
            }
            let is_current = current.value.applied_revision >= challenge.content_revision;
            let options = attempts.lock_options();
            let result = if current.value.phase == Phase::Ready && is_current {
                let updated = Instance {
                    applied_revision: challenge.revision,
                    scenario: challenge.scenario.clone(),
                    until: updated_expiry(call, challenge, &current.value),
                    ..current.value.clone()
                };
                self.store.rewrite(&current, &updated, &options).await
            } else {
                let target = next_target(call, challenge, strategy, &current.value);
                match self.store.begin(&key, Intent::Update(target), &options).await {
                    Err(error) => Err(error),
                    Ok((guard, begun)) => {
                        let fallback = match (&current.value.phase, key.assignment.is_pooled()) {
                            // An outdated instance must not stay in the pool. The pool launches another.
                            (_, true) => UpdateFallback::TearDown,
                            (Phase::Ready, false) => UpdateFallback::KeepOld,
                            (_, false) => UpdateFallback::Retry,
                        };
                        let begun = Instance { until: updated_expiry(call, challenge, &begun), ..begun };
                        self.apply_update(call, guard, challenge, begun, fallback).await.map(|_| ())
                    }
                }
            };
            match result {
                Err(Error::Conflict) => {}
                result => return self.record_operation(&challenge.id, Operation::Update, result),
            }
        }
    }

    /// Deletes every instance of a challenge that is marked as deleting, then the challenge.
    pub(crate) async fn finish_deletion(&self, call: &Call, rollout: LockGuard, id: &ChallengeId) -> Result<()> {
        let instances: Vec<_> = self.store.instances_of(id).try_collect().await?;
        let deletions = self.run_concurrently(instances, |stored| self.delete_by_key(call, stored.value.key));
        let results = rollout.run(async { Ok(deletions.await) }).await?;
        let removed = async {
            results.into_iter().collect::<Result<()>>()?;
            // An instance that this build cannot read stays, and its challenge with it, for a build that can.
            self.store.all_readable(id).await?;
            let options = self.deadline(call).lock_options(call);
            let guard = self.store.lock(LockKind::Challenge, id, &options).await?;
            match self.store.challenge(id).await? {
                Some(stored) if stored.value.deleting => guard.remove_challenge().await,
                // The challenge is gone, or another of this id was created meanwhile, which is not the one to delete.
                _ => guard.release().await,
            }
        };
        let removed = removed.await;
        rollout.release().await?;
        removed
    }
}

/// When an instance expires after an update: the timeout restarts, unless the instance has been renewed since. A pooled instance never does.
fn updated_expiry(call: &Call, challenge: &Challenge, instance: &Instance) -> Option<Timestamp> {
    if instance.key.assignment.is_pooled() { None } else { challenge.renewal(instance.last_renew, call.now).1 }
}

fn next_target(call: &Call, challenge: &Challenge, strategy: Strategy, instance: &Instance) -> Target {
    let (identity, strategy) = match (&instance.target, strategy) {
        // An unfinished update may have launched resources of another identity: they are removed together with the old ones.
        (Some(unfinished), _) if unfinished.identity != instance.identity => {
            (unfinished.identity.clone(), Strategy::Recreate)
        }
        (_, Strategy::UpdateInPlace) => (instance.identity.clone(), strategy),
        (_, Strategy::BlueGreen | Strategy::Recreate) => (call.new_identity(), strategy),
    };
    Target { identity, scenario: challenge.scenario.clone(), revision: challenge.revision, strategy }
}
