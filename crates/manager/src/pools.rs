//! Maintains pools: a queue of challenges whose pool is to be checked, and the jobs that the checks find.
//!
//! A challenge is queued once, however often a check is requested. A check launches nothing itself; its jobs run as tasks. The number of
//! concurrent jobs of a challenge is limited, so that one whose instances start slowly does not delay the others.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{StreamExt as _, stream};
use gauntlet_domain::{ChallengeId, Error, Gauntlet, PoolJob};
use gauntlet_telemetry::context;
use tokio::sync::Notify;
use tracing::{Instrument as _, Span, field::Empty, info_span};

use crate::{call::call_now, tasks::Tasks};

/// The maximum number of queued challenges. Requests beyond it are dropped: the reconciler repeats them.
const MAX_QUEUED: usize = 65_536;
/// The maximum number of concurrent checks.
const MAX_CHECKS: usize = 4;
/// The maximum number of concurrent jobs of one challenge.
const MAX_JOBS_PER_CHALLENGE: usize = 8;
/// The maximum number of concurrent jobs of all challenges.
const MAX_JOBS: usize = 256;

/// The pools to check, and the jobs running in each.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<ChallengeId>,
    /// The challenges in the queue, and the trace that requested the check.
    requested: HashMap<ChallengeId, Option<String>>,
    checking: HashSet<ChallengeId>,
    running: HashMap<ChallengeId, RunningJobs>,
    /// The jobs of all challenges.
    jobs: usize,
}

/// The jobs of one challenge; never without one.
#[derive(Debug, Default)]
struct RunningJobs {
    jobs: usize,
    /// Whether to check again when a job has succeeded.
    recheck: bool,
}

/// A challenge to check. `max_jobs` jobs are reserved for it.
struct Check {
    challenge: ChallengeId,
    traceparent: Option<String>,
    max_jobs: usize,
}

impl Pools {
    /// Requests a check of a challenge's pool. Never blocks.
    pub(crate) fn request_check(&self, challenge: &ChallengeId, traceparent: Option<String>) {
        if self.lock().enqueue(challenge, traceparent) {
            self.changed.notify_one();
        }
    }

    /// Starts the task that checks pools, until the tasks stop. Recovery finishes the jobs that are interrupted.
    pub(crate) fn start(self: &Arc<Self>, tasks: &Tasks, gauntlet: &Gauntlet) {
        let (pools, gauntlet, job_tasks) = (self.clone(), gauntlet.clone(), tasks.clone());
        tasks.spawn("pools", |stop| async move {
            let checks = stream::unfold(&pools, |pools| async move { Some((pools.next_check().await, pools)) });
            let work = checks.for_each_concurrent(MAX_CHECKS, |next| check(&pools, &gauntlet, &job_tasks, next));
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn next_check(&self) -> Check {
        loop {
            if let Some(check) = self.lock().dequeue() {
                return check;
            }
            self.changed.notified().await;
        }
    }

    /// Records the end of a check that didn't use `unused` of its reserved jobs.
    fn finish_check(&self, challenge: &ChallengeId, unused: usize, recheck: bool) {
        let mut state = self.lock();
        state.checking.remove(challenge);
        state.release_jobs(challenge, unused);
        if let Some(running) = state.running.get_mut(challenge) {
            running.recheck = recheck;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Records the end of a job. A failed job requests no check, so that it isn't retried at once.
    fn finish_job(&self, challenge: &ChallengeId, succeeded: bool) {
        let mut state = self.lock();
        let recheck =
            succeeded && state.running.get_mut(challenge).is_some_and(|running| std::mem::take(&mut running.recheck));
        state.release_jobs(challenge, 1);
        if recheck {
            state.enqueue(challenge, context::current_traceparent());
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Queues a challenge, unless it is queued already or the queue is full. Returns whether it did.
    fn enqueue(&mut self, challenge: &ChallengeId, traceparent: Option<String>) -> bool {
        let accepted = self.queue.len() < MAX_QUEUED && !self.requested.contains_key(challenge);
        if accepted {
            self.queue.push_back(challenge.clone());
            self.requested.insert(challenge.clone(), traceparent);
        }
        accepted
    }

    /// Takes the first challenge that is not being checked and may run another job, and reserves as many jobs as it may run.
    fn dequeue(&mut self) -> Option<Check> {
        let free = MAX_JOBS.saturating_sub(self.jobs);
        let max_jobs = |id: &ChallengeId| {
            let running = self.running.get(id).map_or(0, |running| running.jobs);
            MAX_JOBS_PER_CHALLENGE.saturating_sub(running).min(free)
        };
        let is_ready = |id: &ChallengeId| !self.checking.contains(id) && max_jobs(id) > 0;
        let position = self.queue.iter().position(is_ready)?;
        let challenge = self.queue.remove(position)?;
        let max_jobs = max_jobs(&challenge);
        let traceparent = self.requested.remove(&challenge).flatten();
        self.checking.insert(challenge.clone());
        self.running.entry(challenge.clone()).or_default().jobs += max_jobs;
        self.jobs += max_jobs;
        Some(Check { challenge, traceparent, max_jobs })
    }

    fn release_jobs(&mut self, challenge: &ChallengeId, count: usize) {
        self.jobs -= count;
        if let Some(running) = self.running.get_mut(challenge) {
            running.jobs -= count;
            if running.jobs == 0 {
                self.running.remove(challenge);
            }
        }
    }
}

/// A reserved job. Dropping it releases the reservation; without [`JobPermit::succeed`] the job counts as failed.
struct JobPermit {
    pools: Arc<Pools>,
    challenge: ChallengeId,
    succeeded: bool,
}

impl JobPermit {
    fn succeed(mut self) {
        self.succeeded = true;
    }
}

impl Drop for JobPermit {
    fn drop(&mut self) {
        self.pools.finish_job(&self.challenge, self.succeeded);
    }
}

/// Checks a pool in a span of its own, and starts the jobs that it needs.
async fn check(pools: &Arc<Pools>, gauntlet: &Gauntlet, tasks: &Tasks, check: Check) {
    let Check { challenge, traceparent, max_jobs } = check;
    let span = info_span!(parent: None, "pool.refill", challenge.id = %challenge, error.type = Empty);
    if let Some(traceparent) = &traceparent {
        context::link_span(&span, traceparent);
    }
    async {
        let plan = gauntlet.plan_pool(&call_now(), &challenge, max_jobs).await.unwrap_or_else(|error| {
            record_error(&error, &challenge);
            gauntlet_domain::PoolPlan::default()
        });
        pools.finish_check(&challenge, max_jobs.saturating_sub(plan.jobs.len()), plan.more);
        for job in plan.jobs {
            let permit = JobPermit { pools: pools.clone(), challenge: challenge.clone(), succeeded: false };
            start_job(tasks, gauntlet.clone(), job, permit);
        }
    }
    .instrument(span)
    .await;
}

fn start_job(tasks: &Tasks, gauntlet: Gauntlet, job: PoolJob, permit: JobPermit) {
    let span = Span::current();
    let work = async move {
        match gauntlet.run_pool_job(&call_now(), job).await {
            Ok(()) => permit.succeed(),
            Err(error) => record_error(&error, &permit.challenge),
        }
    };
    tasks.spawn("pool job", |stop| async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = work.instrument(span) => {}
        }
    });
}

fn record_error(error: &Error, challenge: &ChallengeId) {
    tracing::warn!(error.type = error.code(), %error, %challenge, "cannot maintain a pool; retrying later");
    Span::current().record("error.type", error.code());
    context::fail_span(error.to_string());
}

#[cfg(test)]
mod tests;
