//! Turns domain facts into metrics, in one exhaustive match, and into requests for pool checks.

use std::sync::Arc;

use gauntlet_domain::{Fact, Facts};
use gauntlet_telemetry::instruments::Instruments;

use crate::signals::Signals;

/// Requests a pool check when a create has claimed a pooled instance or found none. Passes every fact on.
pub(crate) struct SignallingFacts {
    pub(crate) inner: Arc<dyn Facts>,
    pub(crate) signals: Signals,
}

impl Facts for SignallingFacts {
    fn record(&self, fact: Fact) {
        if let Fact::PoolClaim { challenge, .. } = &fact {
            self.signals.request_pool_check(challenge);
        }
        self.inner.record(fact);
    }
}

/// Counts facts in metrics.
pub(crate) struct CountedFacts(pub(crate) Instruments);

impl Facts for CountedFacts {
    fn record(&self, fact: Fact) {
        match fact {
            Fact::InstanceOperation { challenge, operation, outcome } => {
                self.0.instance.record_operation(challenge.as_str(), operation.name(), outcome.name());
            }
            Fact::LimitReached { challenge, limit } => self.0.instance.record_exceeded(challenge.as_str(), limit),
            Fact::PoolClaim { challenge, hit } => self.0.pool.record_claim(challenge.as_str(), hit),
            Fact::Recovered { phase, action } => self.0.reconcile.record_recovery(phase.name(), action.name()),
        }
    }
}
