//! Use cases on instances: create (or claim), retrieve, query, renew, delete, and the work that they and recovery share.

use futures::TryStreamExt as _;
use jiff::Timestamp;

use crate::{
    Additional, Assignment, Call, Challenge, ChallengeId, Error, Fact, Failure, Gauntlet, Identity, Instance,
    InstanceKey, Intent, LaunchRequest, LockGuard, LockOptions, Operation, Outcome, Outputs, Phase, Pinned,
    PreparedScenario, Result, Snapshot, SourceId, Stored, Strategy, Stream, Target, expiry, usecases::Deadline,
};

/// How many attempts may go by what is remembered. Each conflict leaves what it met, so a second one is worth it, at once.
const REMEMBERED: u32 = 2;

/// How often an instance is launched while other programs take its ports.
const MAX_LAUNCH_ATTEMPTS: usize = 3;

impl Gauntlet {
    /// Gives the source an instance: one from the pool if there is one, else a new one, which is up and ready when this answers.
    ///
    /// If it cannot be brought up, what was is taken down and nothing is stored. Dropping the future leaves a record that
    /// [`Gauntlet::reconcile`] finishes.
    pub async fn create_instance(
        &self,
        call: &Call,
        challenge: &ChallengeId,
        source: &SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        let result = self.create(call, challenge, source, additional).await;
        self.counted(challenge, Operation::Create, result)
    }

    async fn create(
        &self,
        call: &Call,
        id: &ChallengeId,
        source: &SourceId,
        additional: Additional,
    ) -> Result<Instance> {
        let deadline = self.deadline(call);
        for attempt in 0.. {
            self.before(attempt, call, deadline).await?;
            let allows = |snapshot| may_create(snapshot, call, id, source);
            let (challenge, mut pooled) = match self.surveyed(attempt, id, source, allows).await? {
                Allowed::Now(challenge, pooled) => (*challenge, pooled),
                Allowed::AfterUndoing(left) => {
                    self.undo(call, &left).await?;
                    continue;
                }
            };
            let fresh = Instance {
                key: InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) },
                identity: call.identity(),
                phase: Phase::Provisioning,
                since: call.now,
                last_renew: call.now,
                until: challenge.value.expiry(call.now),
                scenario: challenge.value.scenario.clone(),
                applied_revision: challenge.value.revision,
                additional: additional.clone(),
                connection_info: String::new(),
                flags: Vec::new(),
                target: None,
                traceparent: call.traceparent.clone(),
            };
            let keeps_pool = challenge.value.bounds.min() > 0;
            // One that an update has not reached yet is left to the update.
            pooled.retain(|stored| stored.value.applied_revision >= challenge.value.content_revision);
            if !pooled.is_empty() {
                let chosen = pooled.swap_remove((call.entropy.next_u64() % pooled.len() as u64) as usize);
                let claimed = claimed(&chosen.value, fresh.clone());
                match self.store.claim(&challenge, &chosen, &claimed, &self.by(call, deadline)).await {
                    Err(Error::Conflict) => continue,
                    Err(error) => return Err(error),
                    Ok(held) => {
                        self.facts.record(Fact::PoolClaim { challenge: id.clone(), hit: true });
                        return match held {
                            None => Ok(claimed),
                            Some(held) => {
                                self.move_to_target(call, held, &challenge.value, claimed, Fallback::TakeDown).await
                            }
                        };
                    }
                }
            }
            match self.store.begin_create(&challenge, &fresh, None, &self.by(call, deadline)).await {
                Err(Error::Conflict) => continue,
                Err(error) => return Err(error),
                Ok(held) => {
                    if keeps_pool {
                        self.facts.record(Fact::PoolClaim { challenge: id.clone(), hit: false });
                    }
                    return self.bring_up(call, held, &challenge.value, fresh).await;
                }
            }
        }
        Err(Error::Conflict)
    }

    /// Finishes what a create left that could not be undone; somebody else may be at it.
    async fn undo(&self, call: &Call, left: &InstanceKey) -> Result<()> {
        match self
            .store
            .begin(
                left,
                Intent::Recover,
                &LockOptions { traceparent: call.traceparent.clone(), ..LockOptions::default() },
            )
            .await
        {
            Err(Error::Conflict) => Ok(()),
            Err(error) => Err(error),
            Ok((held, instance)) => self.recover_instance(call, held, instance).await,
        }
    }

    /// Before an attempt: those that go by what is remembered, and the first that reads, come at once.
    async fn before(&self, attempt: u32, call: &Call, deadline: Deadline) -> Result<()> {
        match attempt.checked_sub(REMEMBERED) {
            None | Some(0) => Ok(()),
            Some(conflicts) => deadline.pause(call, conflicts).await,
        }
    }

    /// What `judge` makes of a snapshot. The first attempts go by what is remembered, and the second by what the first met; but what is
    /// remembered may be old, so it refuses nothing.
    async fn surveyed<T>(
        &self,
        attempt: u32,
        id: &ChallengeId,
        source: &SourceId,
        judge: impl Fn(Snapshot) -> Result<T>,
    ) -> Result<T> {
        let remembered = if attempt < REMEMBERED { self.store.cached_snapshot(id, source) } else { None };
        if let Some(judged) = remembered.filter(Snapshot::agrees).and_then(|snapshot| judge(snapshot).ok()) {
            return Ok(judged);
        }
        judge(self.store.snapshot(id, source).await?)
    }

    /// The source's instance; [`Error::InstanceNotFound`] also when the challenge is unknown or the instance is still being created.
    pub async fn retrieve_instance(&self, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let snapshot = self.store.snapshot(challenge, source).await?;
        snapshot
            .instance
            .map(|stored| stored.value)
            .filter(Instance::is_visible)
            .ok_or_else(|| Error::InstanceNotFound(challenge.clone(), source.clone()))
    }

    /// The source's instances, of every challenge; every source's when `None`. Takes no lock and writes nothing.
    pub fn query_instances(&self, source: Option<&SourceId>) -> Stream<'_, Instance> {
        Box::pin(
            self.store.instances_by_source(source).try_filter(|instance| std::future::ready(instance.is_visible())),
        )
    }

    /// Claimed instances whose end has passed at `now`, the longest overdue first, without those still being created. Takes no lock, writes
    /// nothing, and costs what it answers. A challenge's end needs no looking at: no instance of it ends later.
    pub fn expired_instances(&self, now: Timestamp) -> Stream<'_, Instance> {
        Box::pin(self.store.expired(now).try_filter(|instance| std::future::ready(instance.is_visible())))
    }

    /// Gives the source's instance its timeout again, from now.
    pub async fn renew_instance(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let result = self.renew(call, challenge, source).await;
        self.counted(challenge, Operation::Renew, result)
    }

    async fn renew(&self, call: &Call, id: &ChallengeId, source: &SourceId) -> Result<Instance> {
        let deadline = self.deadline(call);
        for attempt in 0.. {
            self.before(attempt, call, deadline).await?;
            let allows = |snapshot| may_renew(snapshot, call, id, source);
            let (challenge, stored) = self.surveyed(attempt, id, source, allows).await?;
            let (last_renew, until) = challenge.renewal(stored.value.last_renew, call.now);
            let renewed = Instance { last_renew, until, ..stored.value.clone() };
            match self.store.rewrite(&stored, &renewed, &self.by(call, deadline)).await {
                Err(Error::Conflict) => continue,
                Err(error) => return Err(error),
                Ok(()) => return Ok(renewed),
            }
        }
        Err(Error::Conflict)
    }

    /// Takes the source's instance down; it is gone when this answers. If it cannot be taken down it is kept, failed, and tried again.
    pub async fn delete_instance(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<()> {
        let result = self.delete(call, challenge, source).await;
        self.counted(challenge, Operation::Delete, result)
    }

    async fn delete(&self, call: &Call, challenge: &ChallengeId, source: &SourceId) -> Result<()> {
        let key = InstanceKey { challenge: challenge.clone(), assignment: Assignment::Source(source.clone()) };
        let by = self.by(call, self.deadline(call));
        match self.store.begin(&key, Intent::Delete, &by).await {
            Ok((held, instance)) => self.take_down(call, held, instance, Operation::Delete).await,
            Err(Error::Conflict) => Err(match self.store.challenge(challenge).await? {
                None => Error::ChallengeNotFound(challenge.clone()),
                Some(_) => Error::InstanceNotFound(challenge.clone(), source.clone()),
            }),
            Err(error) => Err(error),
        }
    }

    /// Takes the source's instance down if it is still the one that began at `since` and has expired at the call's time. Returns whether it
    /// was: one that was renewed, or created after that one was deleted, is left alone.
    ///
    /// # Errors
    /// As [`Gauntlet::delete_instance`]; [`Error::InstanceNotFound`] also when the challenge is unknown.
    pub async fn delete_expired_instance(
        &self,
        call: &Call,
        challenge: &ChallengeId,
        source: &SourceId,
        since: Timestamp,
    ) -> Result<bool> {
        let result = self.delete_expired(call, challenge, source, since).await;
        match result {
            // Nothing was done to any instance.
            Ok(false) => result,
            _ => self.counted(challenge, Operation::Delete, result),
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
        let deadline = self.deadline(call);
        let mut marked = false;
        for attempt in 0.. {
            if attempt > 0 {
                deadline.pause(call, attempt).await?;
            }
            let Some(stored) = self.store.instance(&key).await? else {
                return if marked { Ok(true) } else { Err(Error::InstanceNotFound(challenge.clone(), source.clone())) };
            };
            // Once marked nothing revives it: an instance of another time is its successor.
            if stored.value.since != since || (!marked && !stored.value.expired(call.now)) {
                return Ok(marked);
            }
            // The version that was judged is the one that is marked, in one transaction. Whatever happens from here on, it goes.
            let deleting = Instance { phase: Phase::Deleting, ..stored.value.clone() };
            match self.store.rewrite(&stored, &deleting, &self.by(call, deadline)).await {
                Err(Error::Conflict) => continue,
                other => other?,
            }
            marked = true;
            match self.store.begin(&key, Intent::Recover, &self.by(call, deadline)).await {
                Ok((held, instance)) if instance.since == since => {
                    return self.take_down(call, held, instance, Operation::Delete).await.map(|()| true);
                }
                Ok(_) => return Ok(true),
                // A reconciler was first: wait for it, and look again.
                Err(Error::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Conflict)
    }

    /// Brings a recorded intent up and commits it; on failure takes down what came up and removes the record.
    pub(crate) async fn bring_up(
        &self,
        call: &Call,
        held: LockGuard,
        challenge: &Challenge,
        mut instance: Instance,
    ) -> Result<Instance> {
        let up = held.run(self.up(&held, challenge, &instance, &instance.identity, &instance.scenario));
        match up.await {
            Ok(outputs) => {
                instance.mark_ready(outputs);
                self.settle(held, instance).await
            }
            // Not ours any more: whoever recovers it decides.
            Err(error @ Error::Fenced(_)) => Err(error),
            Err(error) => Err(self.undo_create(call, held, instance, error).await),
        }
    }

    /// Takes down what a failed create began. Answers why it failed and, if that could not be undone either, why not: the operator needs both.
    async fn undo_create(&self, call: &Call, held: LockGuard, instance: Instance, error: Error) -> Error {
        match self.take_down(call, held, instance, Operation::Create).await {
            Ok(()) => error,
            Err(lost @ Error::Fenced(_)) => lost,
            Err(left) => {
                let detail = format!("{error}; what had come up could not be taken down, and is tried again: {left}");
                Error::Provision { step: "undo", detail }
            }
        }
    }

    /// Takes everything of an instance down and removes its record; on failure the record stays, failed.
    pub(crate) async fn take_down(
        &self,
        call: &Call,
        held: LockGuard,
        instance: Instance,
        during: Operation,
    ) -> Result<()> {
        let down = held.run(async {
            for identity in instance.identities() {
                self.provisioner.down(&instance.key.challenge, identity, held.token).await?;
            }
            Ok(())
        });
        match down.await {
            Ok(()) => held.commit(Outcome::Remove).await,
            Err(error @ Error::Fenced(_)) => Err(error),
            Err(error) => {
                let mut instance = instance;
                if during == Operation::Create {
                    // Nobody was given it, and nobody is: see `is_visible`.
                    instance.connection_info.clear();
                    instance.flags.clear();
                }
                Err(self.fail(call, held, instance, during, error).await)
            }
        }
    }

    /// Moves an owned instance to its target and commits it.
    ///
    /// On failure it does what `fallback` says.
    pub(crate) async fn move_to_target(
        &self,
        call: &Call,
        held: LockGuard,
        challenge: &Challenge,
        mut instance: Instance,
        fallback: Fallback,
    ) -> Result<Instance> {
        let Some(target) = instance.target.clone() else {
            return Err(Error::Internal(format!("instance {} is updating without a target", instance.identity)));
        };
        let mut untouched = false;
        let moved = match target.strategy {
            Strategy::UpdateInPlace => {
                let launch = self.prepare(&held, challenge, &instance, &target.identity, &target.scenario);
                let launch = held.run(launch).await;
                untouched = launch.is_err();
                match launch {
                    Ok(launch) => {
                        held.run(async {
                            let outputs = self.launch(launch, Launching::Update).await?;
                            // It may have become another since the intent was made up.
                            if instance.identity != target.identity {
                                self.down(&held, &instance).await?;
                            }
                            Ok(outputs)
                        })
                        .await
                    }
                    Err(error) => Err(error),
                }
            }
            Strategy::BlueGreen => {
                let up = held.run(self.up(&held, challenge, &instance, &target.identity, &target.scenario)).await;
                match up {
                    Ok(outputs) => held.run(self.down(&held, &instance)).await.map(|()| outputs),
                    Err(error @ Error::Fenced(_)) => Err(error),
                    Err(error) => {
                        let undo = self.provisioner.down(&instance.key.challenge, &target.identity, held.token);
                        untouched = held.run(undo).await.is_ok();
                        Err(error)
                    }
                }
            }
            Strategy::Recreate => {
                held.run(async {
                    for identity in instance.identities() {
                        self.provisioner.down(&instance.key.challenge, identity, held.token).await?;
                    }
                    self.up(&held, challenge, &instance, &target.identity, &target.scenario).await
                })
                .await
            }
        };
        match moved {
            Ok(outputs) => {
                instance.apply_target(target);
                instance.mark_ready(outputs);
                self.settle(held, instance).await
            }
            Err(error @ Error::Fenced(_)) => Err(error),
            Err(error) if fallback == Fallback::TakeDown => Err(self.undo_create(call, held, instance, error).await),
            Err(error) if untouched && fallback == Fallback::KeepOld => {
                // It has not applied the target's revision: the next update tries again, and none takes it for what it is not.
                instance.phase = Phase::Ready;
                instance.target = None;
                self.settle(held, instance).await?;
                Err(error)
            }
            Err(error) => Err(self.fail(call, held, instance, Operation::Update, error).await),
        }
    }

    async fn up(
        &self,
        held: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        identity: &Identity,
        scenario: &Pinned,
    ) -> Result<Outputs> {
        let launch = self.prepare(held, challenge, instance, identity, scenario).await?;
        self.launch(launch, Launching::Up).await
    }

    async fn down(&self, held: &LockGuard, instance: &Instance) -> Result<()> {
        self.provisioner.down(&instance.key.challenge, &instance.identity, held.token).await
    }

    /// Prepares the scenario, reserves its ports and renders its plan. Does not disturb what runs under the identity.
    async fn prepare(
        &self,
        held: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        identity: &Identity,
        scenario: &Pinned,
    ) -> Result<Launch> {
        let prepared =
            self.scenarios.prepare(scenario, identity, &challenge.merge_additional(&instance.additional)).await?;
        let request = self.place(&prepared, &challenge.id, held.token).await?;
        Ok(Launch { prepared, request })
    }

    /// Reserves the ports of a prepared scenario and renders its plan for them.
    async fn place(
        &self,
        prepared: &PreparedScenario,
        challenge: &ChallengeId,
        generation: u64,
    ) -> Result<LaunchRequest> {
        let identity = &prepared.identity;
        let placement = self.provisioner.reserve(challenge, identity, generation, &prepared.ports).await?;
        let plan = self.scenarios.render(prepared, &placement).await?;
        Ok(LaunchRequest {
            challenge: challenge.clone(),
            identity: identity.clone(),
            generation,
            digest: prepared.scenario.digest.clone(),
            placement,
            plan,
        })
    }

    /// Launches an instance. If another program takes one of its ports, reserves another one and tries again.
    async fn launch(&self, launch: Launch, how: Launching) -> Result<Outputs> {
        let Launch { prepared, mut request } = launch;
        let mut attempt = 1;
        loop {
            let launched = match how {
                Launching::Up => self.provisioner.up(&request).await,
                Launching::Update => self.provisioner.update(&request).await,
            };
            match launched {
                Err(Error::PortTaken { .. }) if attempt < MAX_LAUNCH_ATTEMPTS => {}
                launched => return launched,
            }
            attempt += 1;
            request = self.place(&prepared, &request.challenge, request.generation).await?;
        }
    }

    async fn settle(&self, held: LockGuard, instance: Instance) -> Result<Instance> {
        held.commit(Outcome::Put(Box::new(instance.clone()))).await?;
        Ok(instance)
    }

    /// Records a failure with the time of the next try, and answers the error to give: the failure, or why it could not be recorded.
    async fn fail(
        &self,
        call: &Call,
        held: LockGuard,
        mut instance: Instance,
        during: Operation,
        error: Error,
    ) -> Error {
        let (since, attempts) = match &instance.phase {
            Phase::Failed(before) => (before.since, before.attempts.saturating_add(1)),
            _ => (call.now, 1),
        };
        let delay = self
            .settings
            .retry_initial_delay
            .saturating_mul(1 << attempts.saturating_sub(1).min(16))
            .min(self.settings.retry_max_delay);
        let retry_at = expiry(call.now, Some(call.jitter(delay)), None).unwrap_or(call.now);
        instance.phase = Phase::Failed(Failure { during, reason: error.to_string(), since, attempts, retry_at });
        match self.settle(held, instance).await {
            Ok(_) => error,
            Err(unrecorded) => unrecorded,
        }
    }
}

/// A launch, ready to run.
struct Launch {
    /// Kept to render again if a port is taken.
    prepared: PreparedScenario,
    request: LaunchRequest,
}

/// What to do with an instance that already runs under the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Launching {
    /// Keep it.
    Up,
    /// Replace it if it runs from another plan.
    Update,
}

/// When a source may have an instance.
enum Allowed {
    /// Now: the challenge and its pool.
    Now(Box<Stored<Challenge>>, Vec<Stored<Instance>>),
    /// Once what an earlier create left in its seat is taken down.
    AfterUndoing(InstanceKey),
}

fn may_create(snapshot: Snapshot, call: &Call, id: &ChallengeId, source: &SourceId) -> Result<Allowed> {
    let Snapshot { challenge, instance, pooled } = snapshot;
    let challenge = challenge.filter(|c| !c.value.deleting).ok_or_else(|| Error::ChallengeNotFound(id.clone()))?;
    let left = instance.map(|stored| stored.value);
    if left.as_ref().is_some_and(|left| !left.is_failed_create()) {
        return Err(Error::InstanceExists(id.clone(), source.clone()));
    }
    if challenge.value.expired(call.now) {
        return Err(Error::ChallengeExpired(id.clone()));
    }
    Ok(match left {
        Some(left) => Allowed::AfterUndoing(left.key),
        None => Allowed::Now(Box::new(challenge), pooled),
    })
}

/// The challenge and the instance, if it may be renewed.
fn may_renew(
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
    if stored.value.expired(call.now) {
        return Err(Error::InstanceExpired(id.clone(), source.clone()));
    }
    Ok((challenge, stored))
}

/// What to do with an instance that did not reach its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fallback {
    /// It was never given to anybody: take it down.
    TakeDown,
    /// It ran before: if its resources were not touched it goes on as it was, else it is failed and tried again.
    KeepOld,
    /// Nobody knows how far it got: it is failed and tried again.
    Retry,
}

/// A pooled instance as it stands once claimed: the seat, times and values of `fresh`, the resources of the pooled one. Values of its own
/// make it an update of the running resources.
fn claimed(pooled: &Instance, fresh: Instance) -> Instance {
    let target = (!fresh.additional.is_empty()).then(|| Target {
        identity: pooled.identity.clone(),
        scenario: fresh.scenario.clone(),
        revision: fresh.applied_revision,
        strategy: Strategy::UpdateInPlace,
    });
    Instance {
        identity: pooled.identity.clone(),
        phase: if target.is_some() { Phase::Updating } else { Phase::Ready },
        connection_info: pooled.connection_info.clone(),
        flags: pooled.flags.clone(),
        target,
        ..fresh
    }
}
