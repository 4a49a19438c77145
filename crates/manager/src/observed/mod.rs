//! The ports, observed: what a port means (a lock waited for, an instance provisioned) is measured here, once, whatever stands behind it.

mod facts;
mod provisioner;
mod scenarios;
mod store;

pub(crate) use facts::{CountedFacts, SignallingFacts};
pub(crate) use provisioner::ObservedProvisioner;
pub(crate) use scenarios::ObservedScenarios;
pub(crate) use store::ObservedStore;
