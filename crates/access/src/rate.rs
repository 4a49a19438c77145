//! Limits on the rate of calls, by key.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The maximum number of keys with an allowance of their own. Further ones share one allowance, so that no number of keys makes the table larger or the limit weaker.
const MAX_KEYS: usize = 16_384;
/// How often, at most, keys are forgotten that have their whole allowance: looking at each takes time.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Allows each key a number of calls per second, and as many at once after a pause. The token bucket, as the generic cell rate algorithm: a key's
/// state is one time.
#[derive(Debug)]
pub struct RateLimit<K> {
    /// The time that a call uses up; zero for no limit.
    cost: Duration,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    /// For each key, when it will have its whole allowance.
    full_at: HashMap<K, Duration>,
    shared_full_at: Duration,
    swept_at: Duration,
}

/// A key has no allowance left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// How long to wait until the next call is allowed.
    pub retry_after: Duration,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// Allows `per_second` calls; 0 allows any number.
    pub fn new(per_second: u32) -> Self {
        let cost = Duration::from_secs(1).checked_div(per_second).unwrap_or_default();
        let state = State { full_at: HashMap::new(), shared_full_at: Duration::ZERO, swept_at: Duration::ZERO };
        Self { cost, state: Mutex::new(state) }
    }

    /// Counts a call of `key` at `now`, which is the time since any fixed point.
    ///
    /// # Errors
    /// The key has no allowance left. The call doesn't count.
    pub fn take(&self, key: K, now: Duration) -> Result<(), Exceeded> {
        if self.cost.is_zero() {
            return Ok(());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { full_at, shared_full_at, swept_at } = &mut *state;
        if full_at.len() >= MAX_KEYS && now.saturating_sub(*swept_at) >= SWEEP_INTERVAL {
            full_at.retain(|_, full_at| *full_at > now);
            *swept_at = now;
        }
        let room = full_at.len() < MAX_KEYS;
        let full_at = match full_at.get_mut(&key) {
            Some(full_at) => full_at,
            None if room => full_at.entry(key).or_default(),
            None => shared_full_at,
        };
        let next = (*full_at).max(now) + self.cost;
        let allowance = now + Duration::from_secs(1);
        if next > allowance {
            return Err(Exceeded { retry_after: next - allowance });
        }
        *full_at = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How many of `calls` at once are allowed.
    fn allowed<K: Eq + Hash + Copy>(limit: &RateLimit<K>, key: K, now: Duration, calls: u32) -> u32 {
        (0..calls).map(|_| u32::from(limit.take(key, now).is_ok())).sum()
    }

    #[test]
    fn key_has_its_allowance_and_gets_it_back_with_time() {
        let limit = RateLimit::new(10);
        assert_eq!(allowed(&limit, "a", SECOND, 20), 10);
        assert_eq!(limit.take("a", SECOND), Err(Exceeded { retry_after: SECOND / 10 }));
        assert_eq!(allowed(&limit, "b", SECOND, 20), 10);
        assert_eq!(allowed(&limit, "a", SECOND * 3 / 2, 20), 5);
        assert_eq!(allowed(&limit, "a", SECOND * 100, 20), 10);
    }

    #[test]
    fn zero_is_no_limit() {
        assert_eq!(allowed(&RateLimit::new(0), "a", SECOND, 10_000), 10_000);
    }

    #[test]
    fn any_number_of_keys_takes_bounded_memory_and_is_limited() {
        let limit = RateLimit::new(10);
        let calls = (0..2 * MAX_KEYS).filter(|key| limit.take(*key, SECOND).is_ok()).count();
        assert_eq!(calls, MAX_KEYS + 10);
        // Keys that are known keep what they have.
        assert_eq!(allowed(&limit, 0, SECOND, 20), 9);
        // After a while they are forgotten.
        assert_eq!(allowed(&limit, usize::MAX, SECOND * 10, 20), 10);
        assert_eq!(limit.state.lock().map(|state| state.full_at.len()).unwrap_or_default(), 1);
    }

    proptest! {
        #[test]
        fn no_more_than_the_rate_and_one_allowance_is_ever_allowed(per_second in 1..1000_u32, pauses in proptest::collection::vec(0..200_u64, 1..300)) {
            let limit = RateLimit::new(per_second);
            let mut now = SECOND;
            let mut total = 0_u32;
            for pause in pauses {
                now += Duration::from_millis(pause);
                total += allowed(&limit, (), now, 20);
                let most = (now - SECOND).as_secs_f64() * f64::from(per_second) + f64::from(per_second) + 1.0;
                prop_assert!(f64::from(total) <= most, "{total} calls, at most {most}");
            }
        }

        #[test]
        fn call_is_allowed_after_the_time_to_retry(per_second in 1..1000_u32) {
            let limit = RateLimit::new(per_second);
            let mut now = SECOND;
            for _ in 0..2 * per_second {
                if let Err(Exceeded { retry_after }) = limit.take((), now) {
                    now += retry_after;
                    prop_assert!(limit.take((), now).is_ok());
                }
            }
        }
    }
}
