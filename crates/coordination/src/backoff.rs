//! Pauses between tries: longer and longer up to a bound, and not the same for every replica.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The longest pause before the first try again.
const FIRST: Duration = Duration::from_millis(50);
/// The longest pause of all.
const LONGEST: Duration = Duration::from_secs(2);

/// Chance that follows from a replica's name: replicas differ in it, and one is the same each time, so that a simulation can be replayed. It
/// keeps replicas out of step and is no secret.
#[derive(Debug)]
pub(crate) struct Jitter(AtomicU64);

impl Jitter {
    pub(crate) fn new(replica: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        replica.hash(&mut hasher);
        Self(AtomicU64::new(hasher.finish()))
    }

    /// The next number, by splitmix64.
    pub(crate) fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut bits = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

/// The pauses of one who tries again and again.
#[derive(Debug)]
pub(crate) struct Backoff {
    jitter: Arc<Jitter>,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(jitter: &Arc<Jitter>) -> Self {
        Self { jitter: jitter.clone(), longest: FIRST }
    }

    /// How long to wait before the next try: between half of a bound that doubles, and all of it.
    pub(crate) fn pause(&mut self) -> Duration {
        let half = self.longest / 2;
        let share = u32::try_from(self.jitter.next() >> 32).unwrap_or(u32::MAX);
        self.longest = (self.longest * 2).min(LONGEST);
        half + half.mul_f64(f64::from(share) / f64::from(u32::MAX))
    }

    /// Starts again from the shortest: a try has succeeded.
    pub(crate) fn reset(&mut self) {
        self.longest = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound_and_replicas_are_out_of_step() {
        let pauses = |replica: &str| {
            let mut backoff = Backoff::new(&Arc::new(Jitter::new(replica)));
            (0..10).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        let mut bound = FIRST;
        for pause in pauses("a") {
            assert!(pause >= bound / 2 && pause <= bound, "{pause:?} of {bound:?}");
            bound = (bound * 2).min(LONGEST);
        }
        assert_eq!(pauses("a"), pauses("a"));
        let all: Vec<_> = ["a", "b", "c"].map(pauses).into_iter().flatten().collect();
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "no two of three replicas");
    }

    #[test]
    fn a_success_starts_again_from_the_shortest() {
        let mut backoff = Backoff::new(&Arc::new(Jitter::new("a")));
        for _ in 0..10 {
            backoff.pause();
        }
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }
}
