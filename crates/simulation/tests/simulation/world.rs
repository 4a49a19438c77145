//! What there is in one run: the etcd, the machine, chance, what has been seen, and the log.

use std::{
    collections::VecDeque,
    fmt::Display,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use tokio::{sync::Notify, time::Instant};

use super::{
    checks::Checks,
    coverage::{self, Coverage, Event, Fault, Step},
    machine::Homes,
    observer::Observer,
};
use crate::etcd::Server;

/// Events kept to be shown with a failure.
const LAST: usize = 120;
/// How often a run meets the fault that it is about.
const FOCUSED: u32 = 3;

/// All that changes.
pub struct State {
    pub rng: SmallRng,
    pub etcd: Server,
    pub homes: Homes,
    pub checks: Checks,
    pub observer: Observer,
    /// Whether anything may go wrong still.
    pub faulty: bool,
    /// Etcd answers nobody.
    pub etcd_down: bool,
    pub coverage: Coverage,
    /// What goes wrong in this run above all, and how often still.
    focus: (Step, Fault, u32),
    pub violation: Option<String>,
    last: VecDeque<String>,
    hash: DefaultHasher,
    events: u64,
    trace: bool,
}

/// Shared by all that takes part in a run.
pub struct World {
    state: Mutex<State>,
    began: Instant,
    /// An invariant was violated: the run is over.
    pub over: Notify,
}

impl World {
    /// To be made within a runtime whose time is paused.
    pub fn new(seed: u64, trace: bool) -> Arc<Self> {
        let pairs: Vec<(Step, Fault)> = coverage::pairs().collect();
        let (step, fault) = pairs[usize::try_from(seed % pairs.len() as u64).unwrap()];
        let focus = (step, fault, FOCUSED);
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            etcd: Server::default(),
            homes: Homes::default(),
            checks: Checks::default(),
            observer: Observer::default(),
            faulty: true,
            etcd_down: false,
            coverage: Coverage::default(),
            focus,
            violation: None,
            last: VecDeque::new(),
            hash: DefaultHasher::new(),
            events: 0,
            trace,
        };
        Arc::new(Self { state: Mutex::new(state), began: Instant::now(), over: Notify::new() })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since the beginning of the run.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// The time as managers see it.
    pub fn timestamp(&self) -> Timestamp {
        let begin = Timestamp::from_second(1_767_225_600).unwrap();
        begin.checked_add(SignedDuration::try_from(self.now()).unwrap()).unwrap()
    }

    /// Writes an event to the log.
    pub fn note(&self, who: &str, what: impl Display) {
        let now = self.now();
        self.lock().note(now, who, what);
    }

    /// Ends the run.
    pub fn violated(&self, what: String) {
        let now = self.now();
        let mut state = self.lock();
        state.note(now, "VIOLATED", &what);
        state.violation.get_or_insert(what);
        drop(state);
        self.over.notify_one();
    }

    /// Any of the results of a check.
    pub fn check(&self, result: Result<(), String>) {
        if let Err(what) = result {
            self.violated(what);
        }
    }

    pub fn between(&self, from: u64, to: u64) -> u64 {
        self.lock().rng.random_range(from..to)
    }

    pub fn chance(&self, one_in: u32) -> bool {
        self.lock().rng.random_ratio(1, one_in)
    }
}

impl State {
    pub fn note(&mut self, now: Duration, who: &str, what: impl Display) {
        let line = format!("{:>8.3} {who:<7} {what}", now.as_secs_f64());
        line.hash(&mut self.hash);
        self.events += 1;
        if self.trace {
            println!("{line}");
        }
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    pub fn count(&mut self, event: Event) {
        self.coverage.event(event, 1);
    }

    /// Counts a step, and answers the fault that it meets, now and then; most of the time none.
    pub fn fault(&mut self, step: Step) -> Option<Fault> {
        let fault = self.draw(step);
        self.coverage.step(step, fault);
        fault
    }

    fn draw(&mut self, step: Step) -> Option<Fault> {
        if !self.faulty {
            return None;
        }
        let (focused, fault, left) = self.focus;
        if focused == step && left > 0 && self.rng.random_ratio(1, 3) {
            self.focus.2 -= 1;
            return Some(fault);
        }
        if !self.rng.random_ratio(1, step.rarity()) {
            return None;
        }
        let faults = step.faults();
        let fault = faults[self.rng.random_range(0..faults.len())];
        // What ends a manager or holds it up is felt for long; the rest more often.
        (!fault.is_heavy() || self.rng.random_ratio(1, 2)).then_some(fault)
    }

    /// How long one way through the network takes.
    pub fn latency(&mut self) -> Duration {
        let long = self.faulty && self.rng.random_ratio(1, 50);
        Duration::from_millis(if long { self.rng.random_range(50..3000) } else { self.rng.random_range(0..6) })
    }

    /// The log in one number, and how many events it has.
    pub fn digest(&self) -> (u64, u64) {
        (self.hash.finish(), self.events)
    }

    pub fn last(&self) -> String {
        self.last.iter().fold(String::new(), |all, line| all + line + "\n")
    }
}
