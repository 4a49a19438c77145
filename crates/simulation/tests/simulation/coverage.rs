//! Coverage: counts how often each step meets each fault, and other events, so that a test can check that each occurs.

use std::fmt::Write as _;

use gauntlet_coordination::kv::{Condition, Op, Txn};

use super::PREFIX;

/// An enum with a list of its variants and their names in the report.
macro_rules! named {
    ($(#[$doc:meta])* $type:ident { $($(#[$of:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $type { $($(#[$of])* $variant,)+ }

        impl $type {
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

named! {
    /// A step with an effect outside the manager. Faults are injected before or after it.
    Step {
        Lock = "lock: take",
        Release = "lock: release",
        Insert = "challenge: insert",
        Change = "challenge: change",
        Remove = "challenge: remove",
        Create = "instance: create",
        Claim = "instance: claim",
        Begin = "instance: begin",
        Commit = "instance: commit",
        Rewrite = "instance: rewrite",
        Read = "read",
        Watch = "watch",
        Lease = "lease",
        LockDirectory = "machine: lock directory",
        Allocate = "machine: allocate",
        Stop = "machine: stop",
        Start = "machine: start",
        TakeDown = "machine: remove",
    }
}

named! {
    /// What a fault does at a step.
    Fault {
        /// Refused: the step has no effect.
        ErrorBefore = "refused",
        /// The request is lost: no effect, no response.
        LostRequest = "lost",
        /// The response is lost. On the machine, the step reports a failure after its effect.
        LostAnswer = "unanswered",
        /// The step takes effect after the caller has given up.
        Late = "late",
        /// The manager is killed before the effect.
        AbortBefore = "end before",
        /// The manager is killed after the effect.
        AbortAfter = "end after",
        /// The manager is paused before the effect; the step takes effect when the manager resumes.
        HangBefore = "hang before",
        /// The manager is paused after the effect.
        HangAfter = "hang after",
    }
}

named! {
    /// Another event.
    Event {
        Partition = "managers cut off from etcd",
        Pause = "managers paused",
        PauseBeyondLease = "... for longer than a lease",
        PauseBeyondLeaseAtWork = "... which owned an instance or a lock",
        Kill = "managers killed",
        Restart = "managers shut down, and started again",
        Outage = "outages of etcd",
        LeaderChange = "etcd's leader changes",
        Compaction = "etcd is compacted",
        WatchBroken = "watches broken by that or a new leader",
        WatchStalled = "watches that stalled",
        LeaseLost = "leases lost early",
        LeaseLostAtWork = "... with something owned",
        LeaseExpired = "leases that expired",
        LeaseExpiredAtWork = "... with something owned",
        AmbiguousDone = "writes of unknown outcome, done",
        AmbiguousNotDone = "writes of unknown outcome, not done",
        DoneLate = "writes done after their caller gave up",
        StaleToken = "stale tokens refused by etcd",
        StaleGeneration = "stale generations refused by the machine",
        Acquired = "locks that a manager acquired",
        AcquiredBehind = "... after a manager that was paused or had ended",
        Exited = "instances that exited by themselves",
        NeverReady = "instances that never became ready",
        Recovered = "unfinished instances recovered",
        Resumed = "updates and deletions resumed",
        Restarted = "instances restarted",
        Orphan = "orphans removed",
        Operation = "calls of clients",
        Acknowledged = "... acknowledged",
        Refused = "... refused or failed",
        Unanswered = "... never answered",
        Dropped = "... dropped midway",
        Checked = "steps at which every invariant was checked",
    }
}

const ON_ETCD: &[Fault] = Fault::ALL;
const ON_MACHINE: &[Fault] = &[
    Fault::ErrorBefore,
    Fault::LostAnswer,
    Fault::AbortBefore,
    Fault::AbortAfter,
    Fault::HangBefore,
    Fault::HangAfter,
];

impl Step {
    /// Returns the step that a transaction of the coordination performs, by the keys that it touches.
    pub fn of(txn: &Txn) -> Self {
        let starts = |key: &str, what: &str| key.strip_prefix(PREFIX).is_some_and(|key| key.starts_with(what));
        let puts = |what: &str| txn.success.iter().any(|op| matches!(op, Op::Put { key, .. } if starts(key, what)));
        let deletes =
            |what: &str| txn.success.iter().any(|op| matches!(op, Op::Delete(keys) if starts(&keys.start, what)));
        let fresh = |what: &str| {
            txn.compare
                .iter()
                .any(|compare| compare.condition == Condition::Absent && starts(&compare.range.start, what))
        };
        let claims = || {
            txn.success
                .iter()
                .any(|op| matches!(op, Op::Delete(keys) if keys.end.is_some() && starts(&keys.start, "instances ")))
        };
        if puts("challenges ") {
            return if fresh("challenges ") { Self::Insert } else { Self::Change };
        }
        if deletes("challenges ") {
            return Self::Remove;
        }
        if puts("instances ") && claims() {
            return Self::Claim;
        }
        if puts("live owners ") {
            return if puts("instances ") && fresh("instances ") { Self::Create } else { Self::Begin };
        }
        if deletes("live owners ") && (puts("instances ") || deletes("instances ")) {
            return Self::Commit;
        }
        if puts("live locks ") {
            return Self::Lock;
        }
        if deletes("live ") {
            return Self::Release;
        }
        if puts("instances ") {
            return Self::Rewrite;
        }
        Self::Read
    }

    fn is_on_machine(self) -> bool {
        matches!(self, Self::LockDirectory | Self::Allocate | Self::Stop | Self::Start | Self::TakeDown)
    }

    /// Whether it is simply retried if there is no response, because its outcome doesn't matter.
    pub fn may_be_repeated(self) -> bool {
        matches!(self, Self::Read | Self::Watch | Self::Lease)
    }

    /// Returns the faults that can be injected at it.
    pub fn faults(self) -> &'static [Fault] {
        if self.is_on_machine() { ON_MACHINE } else { ON_ETCD }
    }

    /// A fault is injected at one in this many steps.
    pub fn rarity(self) -> u32 {
        match self {
            Self::Read | Self::Lease => 240,
            Self::Lock | Self::Release | Self::Create | Self::Commit => 60,
            Self::LockDirectory | Self::Stop => 40,
            Self::Change | Self::Allocate | Self::Start => 25,
            Self::Claim | Self::Rewrite | Self::TakeDown => 15,
            Self::Insert | Self::Watch | Self::Begin => 12,
            Self::Remove => 3,
        }
    }
}

impl Fault {
    /// Whether it kills or pauses the manager.
    pub fn is_heavy(self) -> bool {
        matches!(self, Self::AbortBefore | Self::AbortAfter | Self::HangBefore | Self::HangAfter)
    }
}

/// Returns each step with each fault that can be injected at it.
pub fn pairs() -> impl Iterator<Item = (Step, Fault)> {
    Step::ALL.iter().flat_map(|step| step.faults().iter().map(|fault| (*step, *fault)))
}

/// The counts of steps, of faults injected at each step, and of events.
#[derive(Debug, Clone)]
pub struct Coverage {
    steps: [u64; Step::ALL.len()],
    faults: [[u64; Fault::ALL.len()]; Step::ALL.len()],
    events: [u64; Event::ALL.len()],
}

impl Default for Coverage {
    fn default() -> Self {
        Self {
            steps: [0; Step::ALL.len()],
            faults: [[0; Fault::ALL.len()]; Step::ALL.len()],
            events: [0; Event::ALL.len()],
        }
    }
}

impl Coverage {
    pub fn step(&mut self, step: Step, fault: Option<Fault>) {
        self.steps[step as usize] += 1;
        if let Some(fault) = fault {
            self.faults[step as usize][fault as usize] += 1;
        }
    }

    pub fn event(&mut self, event: Event, times: u64) {
        self.events[event as usize] += times;
    }

    pub fn add(&mut self, other: &Self) {
        let all = |of: &Self| {
            let faults = of.faults.iter().flatten().copied();
            of.steps.iter().copied().chain(faults).chain(of.events.iter().copied()).collect::<Vec<_>>()
        };
        let mine = self.steps.iter_mut().chain(self.faults.iter_mut().flatten()).chain(&mut self.events);
        mine.zip(all(other)).for_each(|(mine, other)| *mine += other);
    }

    /// Returns the faults and events that never occurred.
    pub fn missing(&self) -> Vec<String> {
        let faults = pairs().filter(|(step, fault)| self.faults[*step as usize][*fault as usize] == 0);
        let faults = faults.map(|(step, fault)| format!("{} at {:?}", fault.name(), step.name()));
        let events = Event::ALL.iter().filter(|event| self.events[**event as usize] == 0);
        faults.chain(events.map(|event| event.name().to_owned())).collect()
    }

    /// Renders the counts as tables: faults by step, and events.
    pub fn report(&self) -> String {
        let mut text = format!("{:<22}{:>10}", "fault, by step", "steps");
        for fault in Fault::ALL {
            let _ = write!(text, "{:>13}", fault.name());
        }
        for step in Step::ALL {
            let _ = write!(text, "\n{:<22}{:>10}", step.name(), self.steps[*step as usize]);
            for fault in Fault::ALL {
                let count = self.faults[*step as usize][*fault as usize];
                let cell = if step.faults().contains(fault) { count.to_string() } else { "-".to_owned() };
                let _ = write!(text, "{cell:>13}");
            }
        }
        text.push('\n');
        for event in Event::ALL {
            let _ = write!(text, "\n{:>10} {}", self.events[*event as usize], event.name());
        }
        text
    }
}
