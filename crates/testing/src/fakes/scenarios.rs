use std::{fmt, sync::Arc};

use async_trait::async_trait;
use gauntlet_domain::{Additional, Error, Identity, Pinned, Place, Plan, PortSpec, Result, Scenarios, Workload};

use crate::fixtures::pinned;

type Resolve = Box<dyn Fn(&str) -> Result<Pinned> + Send + Sync>;

/// Resolves every reference, by default to a digest of its text, and plans an [`UnrenderedPlan`].
pub struct FakeScenarios(Resolve);

impl FakeScenarios {
    /// Decides what becomes of a reference.
    pub fn resolving(resolve: impl Fn(&str) -> Result<Pinned> + Send + Sync + 'static) -> Self {
        Self(Box::new(resolve))
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
        (self.0)(reference)
    }

    async fn plan(&self, _: &Pinned, _: &Identity, _: &Additional) -> Result<Arc<dyn Plan>> {
        Ok(Arc::new(UnrenderedPlan))
    }
}

/// A plan without ports that cannot be rendered: for provisioners that only look at the rest of the request.
#[derive(Debug, Default, Clone, Copy)]
pub struct UnrenderedPlan;

impl Plan for UnrenderedPlan {
    fn ports(&self) -> &[PortSpec] {
        &[]
    }

    fn render(&self, _: &Place) -> Result<Workload> {
        Err(Error::Internal("the plan of a fake scenario cannot be rendered".to_owned()))
    }
}
