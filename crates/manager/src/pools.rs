//! Looking after pools. A challenge is looked at once, however often that was asked for meanwhile; a look waits for no instance. What it finds
//! to do runs as tasks, so few at once for each challenge that one whose instances are slow to start holds up no other.

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

/// Challenges that may wait to be looked at; past this many the periodic pass asks again.
const QUEUE: usize = 65_536;
/// Challenges looked at at once.
const LOOKS: usize = 4;
/// Pooled instances brought up or taken down at once: of one challenge, and of all.
const JOBS: usize = 8;
const ALL_JOBS: usize = 256;

/// Which pools are to be looked at, and what is being done in each.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<ChallengeId>,
    /// Those in the queue, and the traces that they were asked for by.
    asked: HashMap<ChallengeId, Option<String>>,
    looking: HashSet<ChallengeId>,
    busy: HashMap<ChallengeId, Busy>,
    /// The jobs of all challenges.
    jobs: usize,
}

/// What is being done in one pool.
#[derive(Debug, Default)]
struct Busy {
    jobs: usize,
    /// Look again when one of them is done.
    more: bool,
}

/// A challenge to look at, and how many jobs that may begin.
struct Turn {
    challenge: ChallengeId,
    origin: Option<String>,
    room: usize,
}

impl Pools {
    /// Requests that a challenge's pool is looked at. Never blocks.
    pub(crate) fn request(&self, challenge: &ChallengeId, origin: Option<String>) {
        if self.lock().request(challenge, origin) {
            self.changed.notify_one();
        }
    }

    /// Looks at pools as they are asked for, until told to stop. What was begun is then left to recovery.
    pub(crate) fn start(self: &Arc<Self>, tasks: &Tasks, gauntlet: &Gauntlet) {
        let (pools, gauntlet, jobs) = (self.clone(), gauntlet.clone(), tasks.clone());
        tasks.spawn("pools", |stop| async move {
            let turns = stream::unfold(&pools, |pools| async move { Some((pools.next().await, pools)) });
            let work = turns.for_each_concurrent(LOOKS, |turn| look(&pools, &gauntlet, &jobs, turn));
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn next(&self) -> Turn {
        loop {
            if let Some(turn) = self.lock().take() {
                return turn;
            }
            self.changed.notified().await;
        }
    }

    /// Of the jobs that a look might have begun, `unused` were not.
    fn looked(&self, challenge: &ChallengeId, unused: usize, more: bool) {
        let mut state = self.lock();
        state.looking.remove(challenge);
        state.give_back(challenge, unused);
        if let Some(busy) = state.busy.get_mut(challenge) {
            busy.more = more;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// A job is done. One that failed is not tried again at once: whoever asks next looks again, or the periodic pass.
    fn done(&self, challenge: &ChallengeId, succeeded: bool) {
        let mut state = self.lock();
        let more = succeeded && state.busy.get_mut(challenge).is_some_and(|busy| std::mem::take(&mut busy.more));
        state.give_back(challenge, 1);
        if more {
            state.request(challenge, context::current_traceparent());
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Answers whether that is new.
    fn request(&mut self, challenge: &ChallengeId, origin: Option<String>) -> bool {
        let new = self.queue.len() < QUEUE && !self.asked.contains_key(challenge);
        if new {
            self.queue.push_back(challenge.clone());
            self.asked.insert(challenge.clone(), origin);
        }
        new
    }

    /// The first that nobody looks at and that has room for another job.
    fn take(&mut self) -> Option<Turn> {
        let all = ALL_JOBS.saturating_sub(self.jobs);
        let room = |id: &ChallengeId| JOBS.saturating_sub(self.busy.get(id).map_or(0, |busy| busy.jobs)).min(all);
        let ready = |id: &ChallengeId| !self.looking.contains(id) && room(id) > 0;
        let at = self.queue.iter().position(ready)?;
        let challenge = self.queue.remove(at)?;
        let room = room(&challenge);
        let origin = self.asked.remove(&challenge).flatten();
        self.looking.insert(challenge.clone());
        self.busy.entry(challenge.clone()).or_default().jobs += room;
        self.jobs += room;
        Some(Turn { challenge, origin, room })
    }

    fn give_back(&mut self, challenge: &ChallengeId, jobs: usize) {
        self.jobs -= jobs;
        if let Some(busy) = self.busy.get_mut(challenge) {
            busy.jobs -= jobs;
            if busy.jobs == 0 {
                self.busy.remove(challenge);
            }
        }
    }
}

/// A job's place; given back however it ends.
struct Place {
    pools: Arc<Pools>,
    challenge: ChallengeId,
    succeeded: bool,
}

impl Place {
    fn succeeded(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pools.done(&self.challenge, self.succeeded);
    }
}

async fn look(pools: &Arc<Pools>, gauntlet: &Gauntlet, tasks: &Tasks, turn: Turn) {
    let Turn { challenge, origin, room } = turn;
    let span = info_span!(parent: None, "pool.refill", challenge.id = %challenge, error.type = Empty);
    if let Some(origin) = &origin {
        context::link_span(&span, origin);
    }
    async {
        let plan = gauntlet.plan_pool(&call_now(), &challenge, room).await.unwrap_or_else(|error| {
            failed(&error, &challenge);
            gauntlet_domain::PoolPlan::default()
        });
        pools.looked(&challenge, room.saturating_sub(plan.jobs.len()), plan.more);
        for job in plan.jobs {
            let place = Place { pools: pools.clone(), challenge: challenge.clone(), succeeded: false };
            run(tasks, gauntlet.clone(), job, place);
        }
    }
    .instrument(span)
    .await;
}

fn run(tasks: &Tasks, gauntlet: Gauntlet, job: PoolJob, place: Place) {
    let span = Span::current();
    let work = async move {
        match gauntlet.run_pool_job(&call_now(), job).await {
            Ok(()) => place.succeeded(),
            Err(error) => failed(&error, &place.challenge),
        }
    };
    tasks.spawn("pool job", |stop| async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = work.instrument(span) => {}
        }
    });
}

fn failed(error: &Error, challenge: &ChallengeId) {
    tracing::warn!(error.type = error.code(), %error, %challenge, "a pool is off its bounds, will be tried again");
    Span::current().record("error.type", error.code());
    context::fail_span(error.to_string());
}

#[cfg(test)]
mod tests;
