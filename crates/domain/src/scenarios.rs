//! The port to the source of scenarios.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use async_trait::async_trait;

use crate::{Identity, LaunchPlan, Placement, PortSpec, Result};

/// Template values. Keys are any text.
pub type Additional = BTreeMap<String, String>;

/// A scenario reference and the digest that it resolved to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// The reference as the platform gave it.
    pub reference: String,
    /// `sha256:` and 64 hexadecimal characters.
    pub digest: String,
}

/// A scenario made ready for one instance: everything but its placement is known. `Debug` leaves out the flags.
#[derive(Clone, PartialEq, Eq)]
pub struct PreparedScenario {
    /// The scenario.
    pub scenario: Pinned,
    /// The instance's identity.
    pub identity: Identity,
    /// The instance's values.
    pub additional: Additional,
    /// The directory of the scenario's files.
    pub files: PathBuf,
    /// The ports to reserve.
    pub ports: Vec<PortSpec>,
    /// The instance's flags by name, in the scenario's order; secret.
    pub flags: Vec<(String, String)>,
}

impl PreparedScenario {
    /// One without files, ports or flags.
    pub fn new(scenario: &Pinned, identity: &Identity, additional: &Additional) -> Self {
        Self {
            scenario: scenario.clone(),
            identity: identity.clone(),
            additional: additional.clone(),
            files: PathBuf::new(),
            ports: Vec::new(),
            flags: Vec::new(),
        }
    }
}

impl fmt::Debug for PreparedScenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreparedScenario")
            .field("scenario", &self.scenario)
            .field("identity", &self.identity)
            .field("ports", &self.ports)
            .finish_non_exhaustive()
    }
}

/// Fetches, checks and renders scenarios.
#[async_trait]
pub trait Scenarios: Send + Sync {
    /// Resolves a reference to a digest, then fetches, checks and caches that scenario.
    async fn resolve(&self, reference: &str) -> Result<Pinned>;

    /// The id of the key that flags of new instances are derived from; `None` if there are no keys. Must not wait.
    fn flag_key(&self) -> Option<String> {
        None
    }

    /// Prepares a pinned scenario for one instance; fetches it again if it is no longer cached. `flag_key` is the id of the key that its flags
    /// are derived from. Instances of earlier builds have none: theirs is the first key that there was.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) if there is no key with this id.
    /// [`Error::ScenarioPreprocessing`](crate::Error::ScenarioPreprocessing) if a flag can't be rendered, for example because `additional`
    /// lacks a value.
    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        flag_key: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario>;

    /// Renders the launch plan. Pure: the same scenario and placement give the same plan.
    ///
    /// # Errors
    /// [`Error::ScenarioPreprocessing`](crate::Error::ScenarioPreprocessing) if a template can't be rendered.
    async fn render(&self, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan>;
}
