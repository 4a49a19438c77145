use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use gauntlet_domain::{Additional, Identity, LaunchPlan, Pinned, Placement, PreparedScenario, Result, Scenarios};

use crate::fixtures::pinned;

type Resolve = Box<dyn Fn(&str) -> Result<Pinned> + Send + Sync>;

/// Resolves every reference, by default to a digest of its text, and renders plans whose only flag is the id of the flag key.
pub struct FakeScenarios {
    resolve: Resolve,
    flag_key: Mutex<Option<String>>,
}

impl FakeScenarios {
    /// Decides what becomes of a reference.
    pub fn resolving(resolve: impl Fn(&str) -> Result<Pinned> + Send + Sync + 'static) -> Self {
        Self { resolve: Box::new(resolve), flag_key: Mutex::default() }
    }

    /// Sets the id of the key for new instances.
    pub fn set_flag_key(&self, id: &str) {
        *self.flag_key.lock().unwrap_or_else(PoisonError::into_inner) = Some(id.to_owned());
    }
}

impl Default for FakeScenarios {
    fn default() -> Self {
        Self::resolving(|reference| Ok(pinned(reference)))
    }
}

impl fmt::Debug for FakeScenarios {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeScenarios")
    }
}

#[async_trait]
impl Scenarios for FakeScenarios {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        (self.resolve)(reference)
    }

    fn flag_key(&self) -> Option<String> {
        self.flag_key.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        flag_key: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        let flags = flag_key.map(|id| ("key".to_owned(), id.to_owned())).into_iter().collect();
        Ok(PreparedScenario { flags, ..PreparedScenario::new(scenario, identity, additional) })
    }

    async fn render(&self, prepared: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        let flags = prepared.flags.iter().map(|(_, flag)| flag.clone()).collect();
        Ok(LaunchPlan { flags, ..LaunchPlan::default() })
    }
}
