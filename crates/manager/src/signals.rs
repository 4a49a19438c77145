//! Requests for background work, from the rest of the manager to its loops.

use std::sync::Arc;

use gauntlet_domain::ChallengeId;
use gauntlet_telemetry::context;
use tokio::sync::Notify;

use crate::pools::Pools;

/// Requests background work. Never blocks; a request that is already pending is not repeated. Cloning shares the requests.
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

    /// Requests that a challenge's pool is brought within its bounds, on behalf of the current trace.
    pub(crate) fn request_refill(&self, challenge: &ChallengeId) {
        self.pools.request(challenge, context::current_traceparent());
    }

    /// The queue behind [`Signals::request_refill`].
    pub(crate) fn pools(&self) -> &Arc<Pools> {
        &self.pools
    }
}
