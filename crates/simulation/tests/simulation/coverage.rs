//! What a run goes through: each step that has an effect, the faults it can meet, and what else happens. Counted, so that it can be
//! seen, and tested, that nothing is left out.

use std::fmt::Write as _;

use gauntlet_coordination::kv::{Condition, Op, Txn};

use super::PREFIX;

/// A table of its variants, each with its name in the report.
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
    /// A step with an effect outside of the manager, which a fault can meet before or after it.
    Step {
        Lock = "lock: take",
        Release = "lock: give back",
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
        Order = "machine: order",
        Allocate = "machine: allocate",
        Stop = "machine: stop",
        Start = "machine: start",
        TakeDown = "machine: remove",
    }
}

named! {
    /// What a fault does at a step.
    Fault {
        /// Refused: nothing is done.
        ErrorBefore = "refused",
        /// Not done, and nobody knows.
        LostRequest = "lost",
        /// Done, and nobody knows; on the machine, done and reported as failed.
        LostAnswer = "unanswered",
        /// Given up by the caller, and done later.
        Late = "late",
        /// The manager ends before it is done.
        AbortBefore = "end before",
        /// The manager ends once it is done.
        AbortAfter = "end after",
        /// The manager stands still before it is done; it is done when the manager goes on.
        HangBefore = "hang before",
        /// The manager stands still once it is done.
        HangAfter = "hang after",
    }
}

named! {
    /// What else happens.
    Event {
        Partition = "managers cut off from etcd",
        Pause = "managers paused",
        PauseBeyondLease = "... for longer than a lease",
        PauseBeyondLeaseAtWork = "... which owned an instance or a lock",
        Kill = "managers killed",
        Restart = "managers shut down, and started again",
        Outage = "etcd answers nobody",
        LeaderChange = "etcd's leader changes",
        Compaction = "etcd is compacted",
        WatchBroken = "watches broken by that or a new leader",
        WatchStalled = "watches that stand still",
        LeaseLost = "leases lost early",
        LeaseLostAtWork = "... with something owned",
        LeaseExpired = "leases that run out",
        LeaseExpiredAtWork = "... with something owned",
        AmbiguousDone = "writes of unknown outcome, done",
        AmbiguousNotDone = "writes of unknown outcome, not done",
        DoneLate = "writes done after their caller gave up",
        StaleToken = "stale tokens refused by etcd",
        StaleOrder = "stale orders refused by the machine",
        Told = "locks that a manager was told it holds",
        ToldBehind = "... while one that stood still or had ended held it until then",
        Ended = "instances that end by themselves",
        NeverReady = "instances that never become ready",
        Recovered = "stranded instances recovered",
        Resumed = "updates and deletions resumed",
        Revived = "instances revived",
        Orphan = "orphans taken down",
        Operation = "calls of clients",
        Acknowledged = "... acknowledged",
        Refused = "... refused or failed",
        Unanswered = "... never answered",
        Dropped = "... dropped half way",
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
    /// What a transaction of the coordination is for, by the keys it touches.
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
        matches!(self, Self::Order | Self::Allocate | Self::Stop | Self::Start | Self::TakeDown)
    }

    /// Whether it is simply done again if it was not answered: its outcome is of no interest.
    pub fn may_be_repeated(self) -> bool {
        matches!(self, Self::Read | Self::Watch | Self::Lease)
    }

    /// The faults that it can meet.
    pub fn faults(self) -> &'static [Fault] {
        if self.is_on_machine() { ON_MACHINE } else { ON_ETCD }
    }

    /// One in this many meets a fault.
    pub fn rarity(self) -> u32 {
        match self {
            Self::Read | Self::Lease => 240,
            Self::Lock | Self::Release | Self::Create | Self::Commit => 60,
            Self::Order | Self::Stop => 40,
            Self::Change | Self::Allocate | Self::Start => 25,
            Self::Claim | Self::Rewrite | Self::TakeDown => 15,
            Self::Insert | Self::Watch | Self::Begin => 12,
            Self::Remove => 3,
        }
    }
}

impl Fault {
    /// It ends the manager or holds it up.
    pub fn is_heavy(self) -> bool {
        matches!(self, Self::AbortBefore | Self::AbortAfter | Self::HangBefore | Self::HangAfter)
    }
}

/// Each step with each fault that it can meet.
pub fn pairs() -> impl Iterator<Item = (Step, Fault)> {
    Step::ALL.iter().flat_map(|step| step.faults().iter().map(|fault| (*step, *fault)))
}

/// How often each step was taken, each fault met, and each event seen.
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

    /// What can happen and did not.
    pub fn missing(&self) -> Vec<String> {
        let faults = pairs().filter(|(step, fault)| self.faults[*step as usize][*fault as usize] == 0);
        let faults = faults.map(|(step, fault)| format!("{} at {:?}", fault.name(), step.name()));
        let events = Event::ALL.iter().filter(|event| self.events[**event as usize] == 0);
        faults.chain(events.map(|event| event.name().to_owned())).collect()
    }

    /// As tables: how often each fault met each step, and what else happened.
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
