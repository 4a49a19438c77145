//! What is due when.

use std::{collections::BTreeSet, time::Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// See which ports the program listens on.
    CheckListening,
    /// Accept again on this port.
    Accept(usize),
    /// See whether this connection is idle.
    Connection(u64),
    /// See whether this UDP flow is idle.
    Flow(u64),
}

/// At most one entry per port, connection and flow.
#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Instant, Timer)>);

impl Timers {
    pub(super) fn set(&mut self, due: Instant, timer: Timer) {
        self.0.insert((due, timer));
    }

    pub(super) fn cancel(&mut self, due: Instant, timer: Timer) {
        self.0.remove(&(due, timer));
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(due, _)| *due)
    }

    /// Removes and returns a timer that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Timer> {
        self.0.first().filter(|(due, _)| *due <= now)?;
        self.0.pop_first().map(|(_, timer)| timer)
    }
}
