//! Domain facts become metrics here, in one exhaustive match; and a create that looked into a pool has it looked after.

use std::sync::Arc;

use gauntlet_domain::{Fact, Facts};
use gauntlet_telemetry::instruments::Instruments;

use crate::signals::Signals;

/// Asks for a pool to be looked at once a create has taken from it, or found it empty; passes every fact on.
pub(crate) struct SignallingFacts {
    pub(crate) inner: Arc<dyn Facts>,
    pub(crate) signals: Signals,
}

impl Facts for SignallingFacts {
    fn record(&self, fact: Fact) {
        if let Fact::PoolClaim { challenge, .. } = &fact {
            self.signals.request_refill(challenge);
        }
        self.inner.record(fact);
    }
}

/// Counts facts.
pub(crate) struct CountedFacts(pub(crate) Instruments);

impl Facts for CountedFacts {
    fn record(&self, fact: Fact) {
        match fact {
            Fact::InstanceOperation { challenge, operation, outcome } => {
                self.0.instance.record_operation(challenge.as_str(), operation.name(), outcome.name());
            }
            Fact::PoolClaim { challenge, hit } => self.0.pool.record_claim(challenge.as_str(), hit),
            Fact::Recovered { phase, action } => self.0.reconcile.record_recovery(phase.name(), action.name()),
        }
    }
}
