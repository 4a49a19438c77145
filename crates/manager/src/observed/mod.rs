//! Decorators of the domain's ports. They measure what a port means (a lock that was waited for, an instance that was launched), whatever the
//! adapter.

mod facts;
mod provisioner;
mod scenarios;
mod store;

pub(crate) use facts::{CountedFacts, SignallingFacts};
pub(crate) use provisioner::ObservedProvisioner;
pub(crate) use scenarios::ObservedScenarios;
pub(crate) use store::observed_store;
