//! Replenishes pools, and drains what is above their bounds, without a lock: an instance is added only while the pool still has the version at which it was counted.
//! So two replicas, or a replica and a create, never both add an instance on the strength of the same count.

use std::sync::Arc;

use crate::{
    Assignment, Call, Challenge, ChallengeId, Error, Gauntlet, Instance, InstanceKey, LockGuard, Operation, PhaseName,
    Result, Stored, Version, call::Attempts, provisioning::new_instance, shortfall,
};

/// One step of a [`PoolPlan`], for [`Gauntlet::run_pool_job`].
#[derive(Debug)]
pub struct PoolJob(Job);

#[derive(Debug)]
enum Job {
    /// Launches an instance whose intent is recorded and which this replica owns.
    Launch { challenge: Arc<Challenge>, guard: LockGuard, instance: Box<Instance> },
    /// Deletes a pooled instance.
    Delete(InstanceKey),
}

/// What brings a pool within its bounds.
#[derive(Debug, Default)]
pub struct PoolPlan {
    /// Jobs to run now, in any order and concurrently.
    pub jobs: Vec<PoolJob>,
    /// Whether the pool needs more than these jobs: plan again once they are done.
    pub more: bool,
}

impl Gauntlet {
    /// Plans the maintenance of one challenge's pool: records and owns missing instances, or picks surplus ones, `limit` at most. Launches
    /// nothing, and costs the same however many instances there are.
    pub async fn plan_pool(&self, call: &Call, id: &ChallengeId, limit: usize) -> Result<PoolPlan> {
        let mut plan = PoolPlan::default();
        let mut attempts = self.attempts(call, 1);
        loop {
            attempts.next().await?;
            match self.try_plan_pool(call, &attempts, id, limit, &mut plan).await {
                // Another instance was added after the count.
                Err(Error::Conflict) if plan.jobs.is_empty() => {}
                // The recorded instances have to be launched. The next plan deals with whatever caused the error.
                Err(_) if !plan.jobs.is_empty() => {
                    plan.more = true;
                    return Ok(plan);
                }
                result => return result.map(|()| plan),
            }
        }
    }

    /// Runs one job of a plan.
    pub async fn run_pool_job(&self, call: &Call, job: PoolJob) -> Result<()> {
        match job.0 {
            Job::Delete(key) => self.delete_by_key(call, key).await,
            Job::Launch { challenge, guard, instance } => {
                let result = self.provision(call, guard, &challenge, *instance).await.map(|_| ());
                self.record_operation(&challenge.id, Operation::Create, result)
            }
        }
    }

    async fn try_plan_pool(
        &self,
        call: &Call,
        attempts: &Attempts<'_>,
        id: &ChallengeId,
        limit: usize,
        plan: &mut PoolPlan,
    ) -> Result<()> {
        let Some(challenge) = self.store.challenge(id).await? else { return Ok(()) };
        let bounds = challenge.value.bounds.capped(i64::from(self.settings.pool_max));
        let (min, max) = (to_count(bounds.min()), to_count(bounds.max()));
        // Instances beyond these do not change the plan.
        let read_limit = min.saturating_add(limit).saturating_add(1);
        let pool = self.store.pool(id, max, read_limit).await?;
        let truncated = pool.pooled.len() >= read_limit;
        let mut pooled = pool.pooled;
        pooled.retain(|(_, phase)| *phase != PhaseName::Deleting);
        let open = !challenge.value.deleting && !challenge.value.is_expired(call.now);
        let missing = shortfall(bounds, pool.claimed, pooled.len(), open);
        if missing < 0 {
            // Instances that are not ready go first.
            pooled.sort_by_key(|(_, phase)| *phase == PhaseName::Ready);
            let surplus = to_count(-missing);
            plan.more = truncated || surplus > limit;
            plan.jobs.extend(pooled.into_iter().take(surplus.min(limit)).map(|(key, _)| PoolJob(Job::Delete(key))));
        } else if truncated {
            // Instances that are being deleted filled the read, so the count may be too low.
            plan.more = missing > 0;
        } else {
            let missing = to_count(missing);
            plan.more = missing > limit;
            self.begin_pooled(call, attempts, &challenge, pool.version, missing.min(limit), &mut plan.jobs).await?;
        }
        Ok(())
    }

    async fn begin_pooled(
        &self,
        call: &Call,
        attempts: &Attempts<'_>,
        challenge: &Stored<Challenge>,
        mut version: Version,
        count: usize,
        jobs: &mut Vec<PoolJob>,
    ) -> Result<()> {
        let shared = Arc::new(challenge.value.clone());
        for _ in 0..count {
            let identity = call.new_identity();
            let key = InstanceKey { challenge: shared.id.clone(), assignment: Assignment::Pool(identity.clone()) };
            let instance = new_instance(call, &shared, key, identity, self.scenarios.flag_key());
            let options = attempts.lock_options();
            let guard = self.store.begin_create(challenge, &instance, Some(version), &options).await?;
            version = Version(guard.token);
            jobs.push(PoolJob(Job::Launch { challenge: shared.clone(), guard, instance: Box::new(instance) }));
        }
        Ok(())
    }
}

fn to_count(count: i64) -> usize {
    usize::try_from(count).unwrap_or(0)
}
