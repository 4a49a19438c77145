//! Domain facts become metrics here, in one exhaustive match.

use gauntlet_domain::{Fact, Facts};
use gauntlet_telemetry::instruments::Instruments;

/// Counts facts.
pub(crate) struct CountedFacts(pub(crate) Instruments);

impl Facts for CountedFacts {
    fn note(&self, fact: Fact) {
        match fact {
            Fact::InstanceOperation { challenge, operation, outcome } => {
                self.0.instance.operation(challenge.as_str(), operation.name(), outcome.name());
            }
            Fact::PoolClaim { challenge, hit } => self.0.pool.claimed(challenge.as_str(), hit),
            Fact::Recovered { phase, action } => self.0.reconcile.recovered(phase.name(), action.name()),
        }
    }
}
