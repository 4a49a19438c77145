use std::sync::Mutex;

use gauntlet_domain::{Fact, Facts};

/// Keeps the facts that were recorded, in order.
#[derive(Debug, Default)]
pub struct RecordedFacts(Mutex<Vec<Fact>>);

impl RecordedFacts {
    /// Every fact recorded so far.
    pub fn all(&self) -> Vec<Fact> {
        self.0.lock().unwrap().clone()
    }

    /// The facts recorded since the last call of this.
    pub fn take(&self) -> Vec<Fact> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Facts for RecordedFacts {
    fn record(&self, fact: Fact) {
        self.0.lock().unwrap().push(fact);
    }
}

/// Drops the facts.
#[derive(Debug, Default, Clone, Copy)]
pub struct IgnoredFacts;

impl Facts for IgnoredFacts {
    fn record(&self, _: Fact) {}
}
