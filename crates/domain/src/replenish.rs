//! Keeping pools within their bounds. No lock is held: an instance is begun only while the pool still has the version that it was counted at,
//! so that two replicas, or a replica and a create, never add to one count both.

use std::sync::Arc;

use crate::{
    Additional, Assignment, Call, Challenge, ChallengeId, Error, Gauntlet, Instance, InstanceKey, LockGuard, Operation,
    Phase, PhaseName, Result, Stored, Version, shortfall, usecases::Deadline,
};

/// One piece of pool maintenance, for [`Gauntlet::run_pool_job`].
#[derive(Debug)]
pub struct PoolJob(Job);

#[derive(Debug)]
enum Job {
    /// Recorded and owned; to be brought up.
    Fill { challenge: Arc<Challenge>, held: LockGuard, intent: Box<Instance> },
    /// To be taken down.
    Drain(InstanceKey),
}

/// What brings a pool to its bounds.
#[derive(Debug, Default)]
pub struct PoolPlan {
    /// What to do now, in any order, several at once.
    pub jobs: Vec<PoolJob>,
    /// Whether there was more to do than was asked for: plan again once these are done.
    pub more: bool,
}

impl Gauntlet {
    /// Looks at one challenge's pool, and begins what is missing or chooses what is too much, at most `most` of either. Waits for no
    /// instance and costs the same however many instances there are.
    pub async fn plan_pool(&self, call: &Call, id: &ChallengeId, most: usize) -> Result<PoolPlan> {
        let mut plan = PoolPlan::default();
        let deadline = self.deadline(call);
        for conflicts in 0.. {
            if conflicts > 0 {
                deadline.pause(call, conflicts).await?;
            }
            match self.try_plan(call, deadline, id, most, &mut plan).await {
                // Another was added since they were counted.
                Err(Error::Conflict) if plan.jobs.is_empty() => {}
                // What was begun is done; what came in between is met by the next look.
                Err(_) if !plan.jobs.is_empty() => {
                    plan.more = true;
                    return Ok(plan);
                }
                result => return result.map(|()| plan),
            }
        }
        Err(Error::Conflict)
    }

    /// Does one piece of what was planned.
    pub async fn run_pool_job(&self, call: &Call, job: PoolJob) -> Result<()> {
        match job.0 {
            Job::Drain(key) => self.remove(call, key).await,
            Job::Fill { challenge, held, intent } => {
                let result = self.bring_up(call, held, &challenge, *intent).await.map(|_| ());
                self.counted(&challenge.id, Operation::Create, result)
            }
        }
    }

    /// Brings one challenge's pool to its bounds, a few instances at a time, and waits until they are ready. Stops at the first batch with a
    /// failure.
    pub async fn maintain_pool(&self, call: &Call, id: &ChallengeId) -> Result<()> {
        loop {
            let plan = self.plan_pool(call, id, self.settings.concurrency.max(1)).await?;
            let idle = plan.jobs.is_empty();
            let done = self.each(plan.jobs, |job| self.run_pool_job(call, job)).await;
            done.into_iter().collect::<Result<()>>()?;
            if !plan.more || idle {
                return Ok(());
            }
        }
    }

    async fn try_plan(
        &self,
        call: &Call,
        deadline: Deadline,
        id: &ChallengeId,
        most: usize,
        plan: &mut PoolPlan,
    ) -> Result<()> {
        let Some(challenge) = self.store.challenge(id).await? else { return Ok(()) };
        let bounds = challenge.value.bounds.capped(i64::from(self.settings.pool_max));
        let (min, max) = (size(bounds.min()), size(bounds.max()));
        // Beyond these nothing else follows from how many there are.
        let read = min.saturating_add(most).saturating_add(1);
        let pool = self.store.pool(id, max, read).await?;
        let cut = pool.pooled.len() >= read;
        let mut pooled = pool.pooled;
        pooled.retain(|(_, phase)| *phase != PhaseName::Deleting);
        let open = !challenge.value.deleting && !challenge.value.expired(call.now);
        let missing = shortfall(bounds, pool.claimed, pooled.len(), open);
        if missing < 0 {
            // What does not run goes first.
            pooled.sort_by_key(|(_, phase)| *phase == PhaseName::Ready);
            let excess = size(-missing);
            plan.more = cut || excess > most;
            plan.jobs.extend(pooled.into_iter().take(excess.min(most)).map(|(key, _)| PoolJob(Job::Drain(key))));
        } else if cut {
            // So many are being taken down that nothing follows from the rest.
            plan.more = missing > 0;
        } else {
            let missing = size(missing);
            plan.more = missing > most;
            let count = missing.min(most);
            self.begin_pooled(call, deadline, &challenge, pool.version, count, &mut plan.jobs).await?;
        }
        Ok(())
    }

    async fn begin_pooled(
        &self,
        call: &Call,
        deadline: Deadline,
        challenge: &Stored<Challenge>,
        mut version: Version,
        count: usize,
        jobs: &mut Vec<PoolJob>,
    ) -> Result<()> {
        let shared = Arc::new(challenge.value.clone());
        for _ in 0..count {
            let intent = pooled_intent(call, &challenge.value);
            let held = self.store.begin_create(challenge, &intent, Some(version), &self.by(call, deadline)).await?;
            version = Version(held.token);
            jobs.push(PoolJob(Job::Fill { challenge: shared.clone(), held, intent: Box::new(intent) }));
        }
        Ok(())
    }
}

fn size(count: i64) -> usize {
    usize::try_from(count).unwrap_or(0)
}

fn pooled_intent(call: &Call, challenge: &Challenge) -> Instance {
    let identity = call.identity();
    Instance {
        key: InstanceKey { challenge: challenge.id.clone(), assignment: Assignment::Pool(identity.clone()) },
        identity,
        phase: Phase::Provisioning,
        since: call.now,
        last_renew: call.now,
        until: None,
        scenario: challenge.scenario.clone(),
        applied_revision: challenge.revision,
        additional: Additional::new(),
        connection_info: String::new(),
        flags: Vec::new(),
        target: None,
        traceparent: call.traceparent.clone(),
    }
}
