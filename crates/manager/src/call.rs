//! Calls of use cases at the current time, in the current trace.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use gauntlet_domain::{Call, Clock, Entropy};
use gauntlet_telemetry::context;
use jiff::Timestamp;

/// Randomness from the operating system.
pub(crate) struct OsEntropy;

impl Entropy for OsEntropy {
    fn next_u64(&self) -> u64 {
        rand::random()
    }
}

/// The process's monotonic clock.
pub(crate) struct RuntimeClock;

#[async_trait]
impl Clock for RuntimeClock {
    fn elapsed(&self) -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    async fn sleep(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}

/// A call at the current time, in the current trace.
pub(crate) fn call_now() -> Call {
    Call {
        now: Timestamp::now(),
        traceparent: context::current_traceparent(),
        entropy: Arc::new(OsEntropy),
        clock: Arc::new(RuntimeClock),
    }
}
