//! The port to where scenarios come from.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{Additional, Identity, Plan, Result};

/// A scenario reference and the digest of what it named when it was resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// As the platform gave it.
    pub reference: String,
    /// `sha256:` and 64 hexadecimal characters.
    pub digest: String,
}

/// Fetches, checks and prepares scenarios.
#[async_trait]
pub trait Scenarios: Send + Sync {
    /// Fetches what the reference names now, checks it and keeps it by digest.
    async fn resolve(&self, reference: &str) -> Result<Pinned>;

    /// Prepares a pinned scenario for one instance; fetched again by its digest if it is no longer kept.
    async fn plan(&self, scenario: &Pinned, identity: &Identity, additional: &Additional) -> Result<Arc<dyn Plan>>;
}
