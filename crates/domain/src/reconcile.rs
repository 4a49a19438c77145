//! Reconciliation: finishes work whose owner is gone, retries failures that are due, restarts instances that exited, and removes resources
//! that have no record.

use std::collections::BTreeMap;

use futures::TryStreamExt as _;

use crate::{
    Call, ChallengeId, Error, Fact, Gauntlet, Identity, Instance, Intent, LockGuard, LockKind, Operation, Phase,
    PhaseName, ProvisionedInstance, RecoveryAction, Result, Stored, Strategy, Target, Unfinished,
    provisioning::UpdateFallback,
};

/// What a reconciliation did.
#[derive(Debug, Default)]
pub struct ReconcileReport {
    /// Unfinished instances that were finished or undone.
    pub recovered: usize,
    /// Updates and deletions of challenges that were resumed.
    pub resumed: usize,
    /// Ready instances that had exited and run again.
    pub restarted: usize,
    /// Instances without a record whose resources were removed.
    pub orphans_removed: usize,
    /// Challenges that keep a pool or have pooled instances: candidates for [`Gauntlet::plan_pool`].
    pub pools: Vec<ChallengeId>,
    /// Steps that failed. A later pass retries them.
    pub failures: Vec<Error>,
}

impl Gauntlet {
    /// Runs one pass over everything that no replica owns. Idempotent. Replicas may reconcile at the same time: each takes ownership of a piece
    /// of work before it starts on it.
    ///
    /// # Errors
    /// If the work cannot be listed. Failures of single pieces of work are in the report.
    pub async fn reconcile(&self, call: &Call) -> Result<ReconcileReport> {
        // Listed before the records are read. A record precedes its resources, so listed resources without a record are orphans.
        let found = self.provisioner.list().await?;
        let mut report = ReconcileReport::default();

        let unfinished = self.store.unfinished(call.now).await?;
        for result in self.run_concurrently(unfinished, |unfinished| self.recover(call, unfinished)).await {
            match result {
                Ok(Some(Unfinished::Instance(_))) => report.recovered += 1,
                Ok(Some(Unfinished::Challenge(_))) => report.resumed += 1,
                Ok(None) => {}
                Err(errors) => report.failures.extend(errors),
            }
        }
        report.pools = self.store.pools().await?;
        self.reconcile_resources(call, found, &mut report).await?;
        Ok(report)
    }

    /// Restarts an instance that was found to have exited, if it should run. Does for this instance what [`Gauntlet::reconcile`] does for all.
    ///
    /// # Errors
    /// If its record cannot be read. Other failures are in the report.
    pub async fn reconcile_instance(&self, call: &Call, found: ProvisionedInstance) -> Result<ReconcileReport> {
        let mut report = ReconcileReport::default();
        self.reconcile_resources(call, vec![found], &mut report).await?;
        Ok(report)
    }

    /// Returns what was recovered, or `None` if another replica owns it.
    async fn recover(&self, call: &Call, unfinished: Unfinished) -> Result<Option<Unfinished>, Vec<Error>> {
        let options = call.without_waiting();
        let failures = match &unfinished {
            Unfinished::Instance(key) => match self.store.begin(key, Intent::Recover, &options).await {
                Err(Error::Conflict | Error::Busy { .. }) => return Ok(None),
                Err(error) => vec![error],
                Ok((guard, instance)) => self.recover_instance(call, guard, instance).await.err().into_iter().collect(),
            },
            Unfinished::Challenge(id) => match self.store.lock(LockKind::Rollout, id, &options).await {
                Err(Error::Busy { .. }) => return Ok(None),
                Err(error) => vec![error],
                Ok(rollout) => self.resume_challenge(call, rollout, id).await.unwrap_or_else(|error| vec![error]),
            },
        };
        if failures.is_empty() { Ok(Some(unfinished)) } else { Err(failures) }
    }

    /// Finishes a create or an update of an instance if its challenge still wants it, and tears the instance down otherwise.
    pub(crate) async fn recover_instance(&self, call: &Call, guard: LockGuard, instance: Instance) -> Result<()> {
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
                (self.tear_down(call, guard, instance, during).await, RecoveryAction::TakenDown)
            }
            Some(challenge) => {
                let adopted = match &instance.target {
                    Some(target) => {
                        // An update restarts the timeout. The new expiry is not part of the recorded intent.
                        let is_update =
                            target.revision > instance.applied_revision && !instance.key.assignment.is_pooled();
                        let until = if is_update { challenge.expiry(call.now) } else { instance.until };
                        let instance = Instance { until, ..instance };
                        self.apply_update(call, guard, &challenge, instance, UpdateFallback::Retry).await
                    }
                    None => self.provision(call, guard, &challenge, instance).await,
                };
                (adopted.map(|_| ()), RecoveryAction::Adopted)
            }
        };
        if result.is_ok() {
            self.facts.record(Fact::Recovered { phase, action });
        }
        result
    }

    /// Resumes the deletion or the rollout of a challenge. Returns the failures of single instances.
    async fn resume_challenge(&self, call: &Call, rollout: LockGuard, id: &ChallengeId) -> Result<Vec<Error>> {
        match self.store.challenge(id).await?.map(|stored| stored.value) {
            Some(challenge) if challenge.deleting => self.finish_deletion(call, rollout, id).await?,
            Some(challenge) if challenge.rollout.is_some() => {
                return self.roll_out(call, rollout, challenge).await.map(|(_, failures)| failures);
            }
            _ => rollout.release().await?,
        }
        Ok(Vec::new())
    }

    /// Compares resources with records: removes orphans, and restarts instances that should run and have exited.
    async fn reconcile_resources(
        &self,
        call: &Call,
        found: Vec<ProvisionedInstance>,
        report: &mut ReconcileReport,
    ) -> Result<()> {
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
            // An apparent orphan may have a record that this build cannot read.
            if !orphans.is_empty()
                && let Err(error) = self.store.all_readable(&id).await
            {
                report.failures.push(error);
                orphans.clear();
            }
            let exited = known.iter().filter(|found| !found.alive).filter_map(|found| recorded.get(&found.identity));
            let exited =
                exited.filter(|stored| stored.value.phase == Phase::Ready && !stored.value.is_expired(call.now));
            let exited = exited.map(|stored| (*stored).clone()).collect();
            for result in self.run_concurrently(exited, |stored| self.restart(call, stored)).await {
                match result {
                    Ok(restarted) => report.restarted += usize::from(restarted),
                    Err(error) => report.failures.push(error),
                }
            }
            let removals = self.run_concurrently(orphans, |orphan| async move {
                self.provisioner.down(&orphan.challenge, &orphan.identity, orphan.generation).await
            });
            for result in removals.await {
                match result {
                    Ok(()) => report.orphans_removed += 1,
                    Err(error) => report.failures.push(error),
                }
            }
        }
        Ok(())
    }

    /// Restarts a ready instance whose resources have exited. Returns false if the instance is no longer as it was read, or if another replica
    /// owns it.
    async fn restart(&self, call: &Call, stored: Stored<Instance>) -> Result<bool> {
        let instance = &stored.value;
        let Some(challenge) =
            self.store.challenge(&instance.key.challenge).await?.filter(|challenge| !challenge.value.deleting)
        else {
            return Ok(false);
        };
        let unchanged = Target {
            identity: instance.identity.clone(),
            scenario: instance.scenario.clone(),
            revision: instance.applied_revision,
            strategy: Strategy::UpdateInPlace,
        };
        // Conditional on the version that was read: an instance that has been replaced since must not be overwritten by the old one.
        let updating = Instance { phase: Phase::Updating, target: Some(unchanged), ..instance.clone() };
        let begun = match self.store.rewrite(&stored, &updating, &call.without_waiting()).await {
            Ok(()) => self.store.begin(&instance.key, Intent::Recover, &call.without_waiting()).await,
            Err(error) => Err(error),
        };
        let (guard, begun) = match begun {
            Err(Error::Conflict | Error::Busy { .. }) => return Ok(false),
            begun => begun?,
        };
        if begun.target != updating.target {
            self.recover_instance(call, guard, begun).await?;
            return Ok(false);
        }
        self.apply_update(call, guard, &challenge.value, begun, UpdateFallback::Retry).await?;
        self.facts.record(Fact::Recovered { phase: PhaseName::Ready, action: RecoveryAction::Restarted });
        Ok(true)
    }
}
