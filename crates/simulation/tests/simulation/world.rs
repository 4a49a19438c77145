//! The shared state of one run: etcd, the machine, the random generator, the checks and the log.

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
    machine::Directories,
    observer::Observer,
};
use crate::etcd::Server;

/// The number of events to keep and print with a failure.
const LAST: usize = 120;
/// How often a run injects the fault that it focuses on.
const FOCUSED: u32 = 3;

/// Everything that changes during a run.
pub struct State {
    pub rng: SmallRng,
    pub etcd: Server,
    pub directories: Directories,
    pub checks: Checks,
    pub observer: Observer,
    /// Whether faults are still injected.
    pub faulty: bool,
    /// Whether etcd answers no requests.
    pub etcd_down: bool,
    pub coverage: Coverage,
    /// The step and the fault that this run focuses on, and how many injections are left.
    focus: (Step, Fault, u32),
    pub violation: Option<String>,
    last: VecDeque<String>,
    hash: DefaultHasher,
    events: u64,
    trace: bool,
}

/// Shared by everything that takes part in a run.
pub struct World {
    state: Mutex<State>,
    began: Instant,
    /// Notified when an invariant is violated, which ends the run.
    pub violation_found: Notify,
}

impl World {
    /// Must be called within a runtime whose time is paused.
    pub fn new(seed: u64, trace: bool) -> Arc<Self> {
        let pairs: Vec<(Step, Fault)> = coverage::pairs().collect();
        let (step, fault) = pairs[usize::try_from(seed % pairs.len() as u64).unwrap()];
        let focus = (step, fault, FOCUSED);
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            etcd: Server::default(),
            directories: Directories::default(),
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
        Arc::new(Self { state: Mutex::new(state), began: Instant::now(), violation_found: Notify::new() })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the time since the start of the run.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Returns the wall-clock time, the same for all managers.
    pub fn timestamp(&self) -> Timestamp {
        let begin = Timestamp::from_second(1_767_225_600).unwrap();
        begin.checked_add(SignedDuration::try_from(self.now()).unwrap()).unwrap()
    }

    /// Writes an event to the log.
    pub fn log(&self, who: &str, what: impl Display) {
        let now = self.now();
        self.lock().log(now, who, what);
    }

    /// Records a violated invariant and ends the run.
    pub fn report_violation(&self, what: String) {
        let now = self.now();
        let mut state = self.lock();
        state.log(now, "VIOLATED", &what);
        state.violation.get_or_insert(what);
        drop(state);
        self.violation_found.notify_one();
    }

    /// Reports a failed check as a violation.
    pub fn check(&self, result: Result<(), String>) {
        if let Err(what) = result {
            self.report_violation(what);
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
    pub fn log(&mut self, now: Duration, who: &str, what: impl Display) {
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

    /// Counts a step, and returns the fault to inject at it, if any.
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
        // Faults that end or pause a manager have long effects, so they are rarer than others.
        (!fault.is_heavy() || self.rng.random_ratio(1, 2)).then_some(fault)
    }

    /// Returns how long a message takes one way.
    pub fn latency(&mut self) -> Duration {
        let long = self.faulty && self.rng.random_ratio(1, 50);
        Duration::from_millis(if long { self.rng.random_range(50..3000) } else { self.rng.random_range(0..6) })
    }

    /// Returns a hash of the log, and its number of events.
    pub fn digest(&self) -> (u64, u64) {
        (self.hash.finish(), self.events)
    }

    pub fn last(&self) -> String {
        self.last.iter().fold(String::new(), |all, line| all + line + "\n")
    }
}
