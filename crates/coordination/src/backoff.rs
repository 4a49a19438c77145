//! Exponential backoff with a jitter that differs between replicas.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The bound of the first pause.
const INITIAL: Duration = Duration::from_millis(50);
/// The bound of every pause.
const MAX: Duration = Duration::from_secs(2);

/// A sequence of pseudo-random numbers, seeded with the replica's name: it differs between replicas, and is the same in every run, so that a
/// simulation can be replayed. It is not secret.
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

/// The pauses between the attempts of one retry loop.
#[derive(Debug)]
pub(crate) struct Backoff {
    jitter: Arc<Jitter>,
    bound: Duration,
}

impl Backoff {
    pub(crate) fn new(jitter: &Arc<Jitter>) -> Self {
        Self { jitter: jitter.clone(), bound: INITIAL }
    }

    /// Returns the pause before the next attempt: between half of the bound and all of it. Doubles the bound.
    pub(crate) fn pause(&mut self) -> Duration {
        let half = self.bound / 2;
        let share = u32::try_from(self.jitter.next() >> 32).unwrap_or(u32::MAX);
        self.bound = (self.bound * 2).min(MAX);
        half + half.mul_f64(f64::from(share) / f64::from(u32::MAX))
    }

    /// Starts again from the first pause, after a success.
    pub(crate) fn reset(&mut self) {
        self.bound = INITIAL;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_maximum_and_differ_between_replicas() {
        let pauses = |replica: &str| {
            let mut backoff = Backoff::new(&Arc::new(Jitter::new(replica)));
            (0..10).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        let mut bound = INITIAL;
        for pause in pauses("a") {
            assert!(pause >= bound / 2 && pause <= bound, "{pause:?} of {bound:?}");
            bound = (bound * 2).min(MAX);
        }
        assert_eq!(pauses("a"), pauses("a"));
        let all: Vec<_> = ["a", "b", "c"].map(pauses).into_iter().flatten().collect();
        let different: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "no two of three replicas pause alike");
    }

    #[test]
    fn reset_starts_again_from_the_first_pause() {
        let mut backoff = Backoff::new(&Arc::new(Jitter::new("a")));
        for _ in 0..10 {
            backoff.pause();
        }
        backoff.reset();
        assert!(backoff.pause() <= INITIAL);
    }
}
