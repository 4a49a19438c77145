//! Requests for background work.

use std::sync::Arc;

use gauntlet_domain::ChallengeId;
use gauntlet_telemetry::context;
use tokio::sync::Notify;

use crate::pools::Pools;

/// Requests background work. Never blocks. Repeating a pending request has no effect. Cloning shares the requests.
#[derive(Clone, Default)]
pub(crate) struct Signals {
    reconcile: Arc<Notify>,
    pools: Arc<Pools>,
}

impl Signals {
    /// Requests a reconcile pass.
    pub(crate) fn request_reconcile(&self) {
        self.reconcile.notify_one();
    }

    /// Waits for the next request for a reconcile pass.
    ///
    /// # Cancel safety
    /// No request is lost.
    pub(crate) async fn reconcile_requested(&self) {
        self.reconcile.notified().await;
    }

    /// Requests a check of a challenge's pool. The current trace is linked to the span of the check.
    pub(crate) fn request_pool_check(&self, challenge: &ChallengeId) {
        self.pools.request_check(challenge, context::current_traceparent());
    }

    /// The queue behind [`Signals::request_pool_check`].
    pub(crate) fn pools(&self) -> &Arc<Pools> {
        &self.pools
    }
}
