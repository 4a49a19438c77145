//! Use cases on challenges: create, retrieve, query, update, delete, and the work that an update or deletion spreads over instances.

use futures::TryStreamExt as _;
use jiff::Timestamp;

use crate::{
    Additional, Call, Challenge, ChallengeId, ChallengeUpdate, Error, Gauntlet, Instance, InstanceKey, Intent,
    LockGuard, LockKind, Operation, Phase, PoolBounds, Result, Rollout, Stored, Strategy, Stream, Target,
    instances::Fallback, usecases::Deadline,
};

/// A challenge to register.
#[derive(Debug, Clone)]
pub struct NewChallenge {
    /// Its name.
    pub id: ChallengeId,
    /// The scenario reference.
    pub scenario: String,
    /// How long an instance lives.
    pub timeout: Option<std::time::Duration>,
    /// When every instance ends.
    pub until: Option<Timestamp>,
    /// Template values.
    pub additional: Additional,
    /// How many instances to keep ready.
    pub min: i64,
    /// How many at most, claimed and pooled; 0 is no bound.
    pub max: i64,
}

/// What an update did.
#[derive(Debug)]
pub struct UpdateReport {
    /// The challenge as it now stands.
    pub challenge: Challenge,
    /// Its claimed instances.
    pub instances: Vec<Instance>,
    /// What went wrong with single instances; each is also stored with the instance.
    pub failures: Vec<Error>,
}

impl Gauntlet {
    /// Registers a challenge. Its pool is filled later: see [`Gauntlet::plan_pool`].
    pub async fn create_challenge(&self, call: &Call, new: NewChallenge) -> Result<Challenge> {
        let limit = i64::from(self.settings.pool_max);
        let bounds = PoolBounds::new(new.min, new.max)
            .filter(|_| new.min <= limit && new.max <= limit)
            .ok_or(Error::PoolOutOfBounds { min: new.min, max: new.max, limit })?;
        // Before the scenario is fetched: asking for a known id is cheap.
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

    /// A challenge with its claimed instances.
    pub async fn retrieve_challenge(&self, id: &ChallengeId) -> Result<(Challenge, Vec<Instance>)> {
        let stored = self.store.challenge(id).await?.ok_or_else(|| Error::ChallengeNotFound(id.clone()))?;
        Ok((stored.value, self.visible_instances(id).await?))
    }

    /// All challenges with their claimed instances. Takes no lock and writes nothing.
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

    /// Changes a challenge and brings its instances there, several at once. The change is recorded first: a crash afterwards leaves a
    /// rollout that [`Gauntlet::reconcile`] finishes. The failure of one instance is reported and does not hold up the others.
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
        let rollout = self.store.lock(LockKind::Rollout, id, &self.by(call, deadline)).await?;
        let changed = self
            .change(call, deadline, id, |challenge| {
                challenge.apply(&update, scenario, self.settings.pool_max)?;
                challenge.rollout = Some(Rollout { strategy: update.strategy, traceparent: call.traceparent.clone() });
                Ok(())
            })
            .await;
        let challenge = match changed {
            Ok(challenge) => challenge,
            Err(error) => {
                rollout.release().await?;
                return Err(error);
            }
        };
        let (challenge, failures) = self.roll_out(call, rollout, challenge).await?;
        Ok(UpdateReport { instances: self.visible_instances(id).await?, challenge, failures })
    }

    /// Takes a challenge and all its instances down; it is gone when this answers. If something cannot be taken down the challenge stays,
    /// marked as deleting, and is tried again by [`Gauntlet::reconcile`] or another delete.
    pub async fn delete_challenge(&self, call: &Call, id: &ChallengeId) -> Result<()> {
        if self.store.challenge(id).await?.is_none() {
            return Err(Error::ChallengeNotFound(id.clone()));
        }
        let deadline = self.deadline(call);
        // Closed before the rollout lock: an update under way finds no new instance to wait for.
        self.change(call, deadline, id, |challenge| {
            challenge.deleting = true;
            Ok(())
        })
        .await?;
        let rollout = self.store.lock(LockKind::Rollout, id, &self.by(call, deadline)).await?;
        match self.store.challenge(id).await? {
            Some(stored) if stored.value.deleting => self.close(call, rollout, id).await,
            // Another deletion was first; what is there by now was created since.
            _ => rollout.release().await,
        }
    }

    /// Reads, changes and writes a challenge under its lock.
    async fn change(
        &self,
        call: &Call,
        deadline: Deadline,
        id: &ChallengeId,
        edit: impl FnOnce(&mut Challenge) -> Result<()> + Send,
    ) -> Result<Challenge> {
        let held = self.store.lock(LockKind::Challenge, id, &self.by(call, deadline)).await?;
        let edited = match self.store.challenge(id).await? {
            None => Err(Error::ChallengeNotFound(id.clone())),
            Some(stored) => {
                let mut challenge = stored.value;
                edit(&mut challenge).map(|()| challenge)
            }
        };
        match edited {
            Ok(challenge) => {
                held.update_challenge(&challenge).await?;
                Ok(challenge)
            }
            Err(error) => {
                held.release().await?;
                Err(error)
            }
        }
    }

    /// Brings every instance to the challenge's settings, then strikes the rollout off the challenge. Each instance, and the end, is waited
    /// for by a deadline of its own: what is done for one takes nothing from the others.
    pub(crate) async fn roll_out(
        &self,
        call: &Call,
        rollout: LockGuard,
        challenge: Challenge,
    ) -> Result<(Challenge, Vec<Error>)> {
        let strategy = challenge.rollout.as_ref().map_or(Strategy::default(), |rollout| rollout.strategy);
        let instances: Vec<_> = self.store.instances_of(&challenge.id).try_collect().await?;
        let jobs = self.each(instances, |stored| self.bring_up_to_date(call, &challenge, strategy, stored));
        let results = rollout.run(async { Ok(jobs.await) }).await?;
        let mut failures: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        let unread = self.store.all_readable(&challenge.id).await.err();
        let unread = unread.and_then(|error| self.counted::<()>(&challenge.id, Operation::Update, Err(error)).err());
        // A failure is kept with its instance; an instance that could not be had, or read, is left to a later pass.
        let unreached = |error: &Error| matches!(error, Error::Busy { .. } | Error::Unavailable { .. });
        let reached = unread.is_none() && !failures.iter().any(unreached);
        failures.extend(unread);
        let revision = challenge.revision;
        let challenge = self
            .change(call, self.deadline(call), &challenge.id, |challenge| {
                if challenge.revision == revision && reached {
                    challenge.rollout = None;
                }
                Ok(())
            })
            .await?;
        rollout.release().await?;
        Ok((challenge, failures))
    }

    async fn bring_up_to_date(
        &self,
        call: &Call,
        challenge: &Challenge,
        strategy: Strategy,
        listed: Stored<Instance>,
    ) -> Result<()> {
        let (key, deadline) = (listed.value.key.clone(), self.deadline(call));
        let (mut next, mut conflicts) = (Some(listed), 0);
        // Gone, or claimed meanwhile (which is only done with what is up to date): nothing to do.
        while let Some(current) = next {
            let instance = &current.value;
            // What is on its way out is not brought back: if nobody is at it any more, recovery takes it down.
            if instance.applied_revision >= challenge.revision || instance.phase == Phase::Deleting {
                return Ok(());
            }
            let was_ready = instance.phase == Phase::Ready;
            // From the last renewal, if that was since: it stands.
            let ends = |instance: &Instance| {
                if key.assignment.is_pooled() { None } else { challenge.renewal(instance.last_renew, call.now).1 }
            };
            let result = if was_ready && instance.applied_revision >= challenge.content_revision {
                let scenario = challenge.scenario.clone();
                let until = ends(instance);
                let rewritten = Instance { applied_revision: challenge.revision, scenario, until, ..instance.clone() };
                self.store.rewrite(&current, &rewritten, &self.by(call, deadline)).await
            } else {
                let (identity, strategy) = match (&instance.target, strategy) {
                    // What an earlier update had brought up is not forgotten: it goes with the old one.
                    (Some(left), _) if left.identity != instance.identity => {
                        (left.identity.clone(), Strategy::Recreate)
                    }
                    (_, Strategy::UpdateInPlace) => (instance.identity.clone(), strategy),
                    (_, Strategy::BlueGreen | Strategy::Recreate) => (call.identity(), strategy),
                };
                let target =
                    Target { identity, scenario: challenge.scenario.clone(), revision: challenge.revision, strategy };
                match self.store.begin(&key, Intent::Update(target), &self.by(call, deadline)).await {
                    Err(error) => Err(error),
                    Ok((held, begun)) => {
                        let begun = Instance { until: ends(&begun), ..begun };
                        let fallback = match (was_ready, key.assignment.is_pooled()) {
                            // Kept as it was it would be handed out as what it is not; the pool brings up another.
                            (_, true) => Fallback::TakeDown,
                            (true, false) => Fallback::KeepOld,
                            (false, false) => Fallback::Retry,
                        };
                        self.move_to_target(call, held, challenge, begun, fallback).await.map(|_| ())
                    }
                }
            };
            match result {
                Err(Error::Conflict) => {
                    if conflicts > 0 {
                        deadline.pause(call, conflicts).await?;
                    }
                    conflicts += 1;
                    next = self.store.instance(&key).await?;
                }
                result => return self.counted(&challenge.id, Operation::Update, result),
            }
        }
        Ok(())
    }

    /// Takes every instance of a challenge that is being deleted down, then the challenge.
    pub(crate) async fn close(&self, call: &Call, rollout: LockGuard, id: &ChallengeId) -> Result<()> {
        let instances: Vec<_> = self.store.instances_of(id).try_collect().await?;
        let jobs = self.each(instances, |stored| self.remove(call, stored.value.key));
        let results = rollout.run(async { Ok(jobs.await) }).await?;
        let removed = async {
            results.into_iter().collect::<Result<()>>()?;
            // Nor is one removed that this build cannot read: it stays, and with it the challenge, for a build that can.
            self.store.all_readable(id).await?;
            let by = self.by(call, self.deadline(call));
            let held = self.store.lock(LockKind::Challenge, id, &by).await?;
            match self.store.challenge(id).await? {
                Some(stored) if stored.value.deleting => held.remove_challenge().await,
                // Gone, and perhaps created anew by now, while this was held up: that is not the one that was to go.
                _ => held.release().await,
            }
        };
        let removed = removed.await;
        rollout.release().await?;
        removed
    }

    /// Takes one stored instance down, whoever has it; one that is gone meanwhile is success.
    pub(crate) async fn remove(&self, call: &Call, key: InstanceKey) -> Result<()> {
        let result = match self.store.begin(&key, Intent::Delete, &self.by(call, self.deadline(call))).await {
            Err(Error::Conflict) => return Ok(()),
            Err(error) => Err(error),
            Ok((held, instance)) => self.take_down(call, held, instance, Operation::Delete).await,
        };
        self.counted(&key.challenge, Operation::Delete, result)
    }
}
