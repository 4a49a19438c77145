//! Finishing what nobody owns: work that a crash left, failures due for another try, resources without a record.

use std::collections::BTreeMap;

use futures::TryStreamExt as _;

use crate::{
    Call, ChallengeId, Error, Fact, Gauntlet, Identity, Instance, Intent, LockGuard, LockKind, LockOptions, Operation,
    Phase, PhaseName, ProvisionedInstance, RecoveryAction, Result, Stored, Strategy, Target, Unfinished,
    instances::Fallback,
};

/// What one pass did.
#[derive(Debug, Default)]
pub struct ReconcileReport {
    /// Unfinished instances that were finished or undone.
    pub recovered: usize,
    /// Updates and deletions of challenges that were carried on.
    pub resumed: usize,
    /// Ready instances that no longer ran and do again.
    pub restarted: usize,
    /// Resources without a record that were taken down.
    pub orphans_removed: usize,
    /// Challenges whose pools are to be looked at ([`Gauntlet::plan_pool`]): those that keep a pool or have pooled instances.
    pub pools: Vec<ChallengeId>,
    /// What did not work; each is tried again in a later pass.
    pub failures: Vec<Error>,
}

impl Gauntlet {
    /// One pass over everything that nobody owns. Idempotent, and harmless beside other replicas doing the same: each piece of work is
    /// owned before it is touched. Fails only if it could read nothing.
    pub async fn reconcile(&self, call: &Call) -> Result<ReconcileReport> {
        // Listed before the records are read: whatever is brought up was recorded before, so what has no record then is an orphan.
        let found = self.provisioner.list().await?;
        let mut done = ReconcileReport::default();

        let results =
            self.each(self.store.unfinished(call.now).await?, |unfinished| self.recover(call, unfinished)).await;
        for result in results {
            match result {
                Ok(Some(Unfinished::Instance(_))) => done.recovered += 1,
                Ok(Some(Unfinished::Challenge(_))) => done.resumed += 1,
                Ok(None) => {}
                Err(errors) => done.failures.extend(errors),
            }
        }
        done.pools = self.store.pools().await?;
        self.examine(call, found, &mut done).await?;
        Ok(done)
    }

    /// Brings up again what was found to have ended by itself, if it should run: what [`Gauntlet::reconcile`] does, for that one alone.
    pub async fn reconcile_instance(&self, call: &Call, found: ProvisionedInstance) -> Result<ReconcileReport> {
        let mut done = ReconcileReport::default();
        self.examine(call, vec![found], &mut done).await?;
        Ok(done)
    }

    /// Answers what was recovered, or `None` if somebody else had it; or all that did not work.
    async fn recover(&self, call: &Call, unfinished: Unfinished) -> Result<Option<Unfinished>, Vec<Error>> {
        let failures = match &unfinished {
            Unfinished::Instance(key) => match self.store.begin(key, Intent::Recover, &at_once(call)).await {
                Err(Error::Conflict | Error::Busy { .. }) => return Ok(None),
                Err(error) => vec![error],
                Ok((held, instance)) => self.recover_instance(call, held, instance).await.err().into_iter().collect(),
            },
            Unfinished::Challenge(id) => match self.store.lock(LockKind::Rollout, id, &at_once(call)).await {
                Err(Error::Busy { .. }) => return Ok(None),
                Err(error) => vec![error],
                Ok(rollout) => self.resume(call, rollout, id).await.unwrap_or_else(|error| vec![error]),
            },
        };
        if failures.is_empty() { Ok(Some(unfinished)) } else { Err(failures) }
    }

    pub(crate) async fn recover_instance(&self, call: &Call, held: LockGuard, instance: Instance) -> Result<()> {
        let phase = PhaseName::from(&instance.phase);
        let adopt = match &instance.phase {
            Phase::Provisioning | Phase::Updating => true,
            Phase::Failed(failure) => failure.during == Operation::Update,
            Phase::Ready | Phase::Deleting => false,
        };
        let challenge = self.store.challenge(&instance.key.challenge).await?.map(|stored| stored.value);
        let (result, action) = match challenge.filter(|challenge| adopt && !challenge.deleting) {
            None => {
                let during = match &instance.phase {
                    Phase::Provisioning => Operation::Create,
                    Phase::Failed(failure) if failure.during == Operation::Create => Operation::Create,
                    _ => Operation::Delete,
                };
                (self.take_down(call, held, instance, during).await, RecoveryAction::TakenDown)
            }
            Some(challenge) => {
                let adopted = match &instance.target {
                    Some(target) => {
                        // An update gives a new end, which the intent does not say.
                        let updated =
                            target.revision > instance.applied_revision && !instance.key.assignment.is_pooled();
                        let until = if updated { challenge.expiry(call.now) } else { instance.until };
                        let instance = Instance { until, ..instance };
                        self.move_to_target(call, held, &challenge, instance, Fallback::Retry).await
                    }
                    None => self.bring_up(call, held, &challenge, instance).await,
                };
                (adopted.map(|_| ()), RecoveryAction::Adopted)
            }
        };
        if result.is_ok() {
            self.facts.record(Fact::Recovered { phase, action });
        }
        result
    }

    /// Answers what failed with single instances.
    async fn resume(&self, call: &Call, rollout: LockGuard, id: &ChallengeId) -> Result<Vec<Error>> {
        match self.store.challenge(id).await?.map(|stored| stored.value) {
            Some(challenge) if challenge.deleting => self.close(call, rollout, id).await?,
            Some(challenge) if challenge.rollout.is_some() => {
                return self.roll_out(call, rollout, challenge).await.map(|(_, failures)| failures);
            }
            _ => rollout.release().await?,
        }
        Ok(Vec::new())
    }

    /// Takes down what has no record, and brings back what should run and does not.
    async fn examine(&self, call: &Call, found: Vec<ProvisionedInstance>, done: &mut ReconcileReport) -> Result<()> {
        let mut by_challenge: BTreeMap<ChallengeId, Vec<ProvisionedInstance>> = BTreeMap::new();
        for found in found {
            by_challenge.entry(found.challenge.clone()).or_default().push(found);
        }
        for (id, found) in by_challenge {
            let stored: Vec<Stored<Instance>> = self.store.instances_of(&id).try_collect().await?;
            let recorded: BTreeMap<&Identity, &Stored<Instance>> = stored
                .iter()
                .flat_map(|stored| stored.value.identities().map(move |identity| (identity, stored)))
                .collect();
            let (mut orphans, known): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|found| !recorded.contains_key(&found.identity));
            // One that has no record, or one that this build cannot read?
            if !orphans.is_empty()
                && let Err(error) = self.store.all_readable(&id).await
            {
                done.failures.push(error);
                orphans.clear();
            }
            let ended = known.iter().filter(|found| !found.alive).filter_map(|found| recorded.get(&found.identity));
            let ended = ended.filter(|stored| stored.value.phase == Phase::Ready && !stored.value.expired(call.now));
            let ended = ended.map(|stored| (*stored).clone()).collect();
            for result in self.each(ended, |stored| self.revive(call, stored)).await {
                match result {
                    Ok(revived) => done.restarted += usize::from(revived),
                    Err(error) => done.failures.push(error),
                }
            }
            let downs = self.each(orphans, |orphan| async move {
                self.provisioner.down(&orphan.challenge, &orphan.identity, orphan.generation).await
            });
            for result in downs.await {
                match result {
                    Ok(()) => done.orphans_removed += 1,
                    Err(error) => done.failures.push(error),
                }
            }
        }
        Ok(())
    }

    /// Brings back a ready instance whose resources ended by themselves, or with their machine; false if somebody else is at it.
    async fn revive(&self, call: &Call, stored: Stored<Instance>) -> Result<bool> {
        let instance = &stored.value;
        let Some(challenge) =
            self.store.challenge(&instance.key.challenge).await?.filter(|challenge| !challenge.value.deleting)
        else {
            return Ok(false);
        };
        let same = Target {
            identity: instance.identity.clone(),
            scenario: instance.scenario.clone(),
            revision: instance.applied_revision,
            strategy: Strategy::UpdateInPlace,
        };
        // Only if it is still what was read: meanwhile it may have become another, whose place the old one must not take.
        let marked = Instance { phase: Phase::Updating, target: Some(same), ..instance.clone() };
        let begun = match self.store.rewrite(&stored, &marked, &at_once(call)).await {
            Ok(()) => self.store.begin(&instance.key, Intent::Recover, &at_once(call)).await,
            Err(error) => Err(error),
        };
        let (held, begun) = match begun {
            Err(Error::Conflict | Error::Busy { .. }) => return Ok(false),
            begun => begun?,
        };
        if begun.target != marked.target {
            self.recover_instance(call, held, begun).await?;
            return Ok(false);
        }
        self.move_to_target(call, held, &challenge.value, begun, Fallback::Retry).await?;
        self.facts.record(Fact::Recovered { phase: PhaseName::Ready, action: RecoveryAction::Restarted });
        Ok(true)
    }
}

/// Without waiting for whoever owns it.
fn at_once(call: &Call) -> LockOptions {
    LockOptions { traceparent: call.traceparent.clone(), ..LockOptions::default() }
}
