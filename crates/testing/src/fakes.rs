//! The domain's ports in memory.

mod facts;
mod provisioner;
mod scenarios;

pub use facts::{IgnoredFacts, RecordedFacts};
pub use provisioner::{FakeInstance, FakeProvisioner, LaunchCounts, ProvisionerCall};
pub use scenarios::FakeScenarios;
