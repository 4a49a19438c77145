//! Calls of the use cases: their time, randomness and clock.

use std::{
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use gauntlet_domain::{Call, Clock, Entropy};
use jiff::Timestamp;

use crate::fixtures::timestamp;

/// When a [`call`] happens, in seconds since 1970.
pub const NOW: i64 = 1000;

/// A call at [`NOW`], without a trace, with [`CountingEntropy`] and a [`ManualClock`] of its own.
pub fn call() -> Call {
    Call {
        now: timestamp(NOW),
        traceparent: None,
        entropy: Arc::new(CountingEntropy::default()),
        clock: Arc::new(ManualClock::default()),
    }
}

/// A call that happens now: on the [`SystemClock`], with identities that are unique in this process.
pub fn call_now() -> Call {
    static ENTROPY: LazyLock<Arc<CountingEntropy>> = LazyLock::new(|| Arc::new(CountingEntropy::starting_at(1)));
    Call { now: Timestamp::now(), traceparent: None, entropy: ENTROPY.clone(), clock: Arc::new(SystemClock) }
}

/// Counts up, so that identities are predictable and never repeat. Jitter computed from small numbers is always the smallest.
#[derive(Debug, Default)]
pub struct CountingEntropy(AtomicU64);

impl CountingEntropy {
    /// Counts from `first`.
    pub fn starting_at(first: u64) -> Self {
        Self(AtomicU64::new(first))
    }
}

impl Entropy for CountingEntropy {
    fn next_u64(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// A reproducible sequence of well-spread numbers (SplitMix64): the same seed gives the same sequence.
#[derive(Debug)]
pub struct SeededEntropy(AtomicU64);

impl SeededEntropy {
    /// Starts the sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }
}

impl Entropy for SeededEntropy {
    fn next_u64(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut bits = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

/// A clock that stands still until the test advances it or somebody sleeps. Sleeping returns at once, after moving the clock.
#[derive(Debug, Default)]
pub struct ManualClock {
    elapsed: Mutex<Duration>,
    sleeps: Mutex<Vec<Duration>>,
}

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance(&self, duration: Duration) {
        *self.elapsed.lock().unwrap() += duration;
    }

    /// Every sleep since the last call of this, in order.
    pub fn take_sleeps(&self) -> Vec<Duration> {
        std::mem::take(&mut self.sleeps.lock().unwrap())
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn elapsed(&self) -> Duration {
        *self.elapsed.lock().unwrap()
    }

    async fn sleep(&self, pause: Duration) {
        self.sleeps.lock().unwrap().push(pause);
        self.advance(pause);
        // Other tasks get their turn, as they would during a real sleep.
        tokio::task::yield_now().await;
    }
}

/// The process's monotonic clock; sleeps on tokio's.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

#[async_trait]
impl Clock for SystemClock {
    fn elapsed(&self) -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    async fn sleep(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_manual_clock_moves_by_sleeping_and_advancing() {
        let clock = ManualClock::default();
        clock.sleep(Duration::from_secs(2)).await;
        clock.advance(Duration::from_secs(3));
        assert_eq!(clock.elapsed(), Duration::from_secs(5));
        assert_eq!(clock.take_sleeps(), [Duration::from_secs(2)]);
        assert_eq!(clock.take_sleeps(), []);
    }

    #[test]
    fn a_seed_gives_the_reference_sequence_of_splitmix64() {
        let entropy = SeededEntropy::new(1_234_567);
        assert_eq!([entropy.next_u64(), entropy.next_u64()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
