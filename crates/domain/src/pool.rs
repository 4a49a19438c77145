//! The bounds of a pool, and how many instances it lacks.

/// The bounds of a pool: how many unclaimed instances to keep ready (`min`), as long as claimed and pooled instances together do not exceed
/// `max`. A `max` of 0 is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolBounds {
    min: i64,
    max: i64,
}

impl PoolBounds {
    /// Returns `None` if a bound is negative, or if `max` is neither 0 nor at least `min`.
    pub fn new(min: i64, max: i64) -> Option<Self> {
        (min >= 0 && max >= 0 && (max == 0 || max >= min)).then_some(Self { min, max })
    }

    /// How many unclaimed instances to keep ready.
    pub fn min(self) -> i64 {
        self.min
    }

    /// How many instances, claimed and pooled, not to exceed; 0 is no bound.
    pub fn max(self) -> i64 {
        self.max
    }

    /// Lowers each bound to `limit` if it is above.
    #[must_use]
    pub fn capped(self, limit: i64) -> Self {
        Self { min: self.min.min(limit), max: self.max.min(limit) }
    }
}

/// Returns how many instances a pool lacks; a negative number is an excess. `claimed` and `pooled` count instances in any phase. A challenge
/// that has expired or is being deleted (not `open`) keeps no pool.
pub fn shortfall(bounds: PoolBounds, claimed: usize, pooled: usize, open: bool) -> i64 {
    let pooled = i64::try_from(pooled).unwrap_or(i64::MAX);
    let claimed = i64::try_from(claimed).unwrap_or(i64::MAX);
    let wanted = match (open, bounds.max) {
        (false, _) => 0,
        (true, 0) => bounds.min,
        (true, max) => bounds.min.min(max.saturating_sub(claimed).max(0)),
    };
    wanted - pooled
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_contradictory_bounds() {
        assert!(PoolBounds::new(-1, 0).is_none());
        assert!(PoolBounds::new(0, -1).is_none());
        assert!(PoolBounds::new(3, 2).is_none());
        assert!(PoolBounds::new(3, 0).is_some());
    }

    fn bounds() -> impl Strategy<Value = PoolBounds> {
        (0i64..12, 0i64..12, any::<bool>())
            .prop_map(|(min, room, bounded)| PoolBounds::new(min, if bounded { min + room } else { 0 }).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn reaches_min_within_max(bounds in bounds(), claimed in 0usize..30, pooled in 0usize..30) {
            // Adds one instance after the other, while the bounds allow it.
            let (count, mut wanted) = (claimed as i64, 0);
            while wanted < bounds.min() && (bounds.max() == 0 || count + wanted < bounds.max()) {
                wanted += 1;
            }
            prop_assert_eq!(pooled as i64 + shortfall(bounds, claimed, pooled, true), wanted);
            prop_assert_eq!(shortfall(bounds, claimed, pooled, false), -(pooled as i64));
        }

        #[test]
        fn capped_bounds_stay_valid(min in 0i64.., room in 0i64.., bounded: bool, limit in 0i64..) {
            let max = if bounded { min.saturating_add(room) } else { 0 };
            let bounds = PoolBounds::new(min, max).unwrap();
            let capped = bounds.capped(limit);
            prop_assert!(PoolBounds::new(capped.min(), capped.max()).is_some());
            prop_assert!(capped.min() <= limit && capped.max() <= limit);
            prop_assert_eq!(capped.capped(limit), capped);
            if min <= limit && max <= limit {
                prop_assert_eq!(capped, bounds);
            }
        }

        #[test]
        fn extreme_counts_do_not_overflow(min: i64, max: i64, claimed: usize, pooled: usize, open: bool) {
            if let Some(bounds) = PoolBounds::new(min, max) {
                let after = i128::from(shortfall(bounds, claimed, pooled, open)) + pooled.min(i64::MAX as usize) as i128;
                prop_assert!((0..=i128::from(bounds.min())).contains(&after));
            }
        }

        /// Whatever is claimed and deleted, and however the bounds change.
        #[test]
        fn a_replenished_pool_is_within_its_bounds(
            first in bounds(),
            steps in proptest::collection::vec((0..4u8, bounds()), 1..20),
        ) {
            let (mut bounds, mut claimed, mut pooled) = (first, 0usize, 0usize);
            for (step, other) in steps {
                match step {
                    // Claims a pooled instance if there is one.
                    0 => (claimed, pooled) = (claimed + 1, pooled.saturating_sub(1)),
                    1 => claimed = claimed.saturating_sub(1),
                    2 => bounds = other,
                    _ => {}
                }
                if step > 0 {
                    let missing = shortfall(bounds, claimed, pooled, true);
                    pooled = usize::try_from(pooled as i64 + missing).unwrap();
                    prop_assert!(pooled as i64 <= bounds.min());
                    let total = (claimed + pooled) as i64;
                    prop_assert!(pooled == 0 || bounds.max() == 0 || total <= bounds.max());
                    prop_assert!(pooled as i64 == bounds.min() || total >= bounds.max());
                    prop_assert_eq!(shortfall(bounds, claimed, pooled, true), 0, "replenishing again changes nothing");
                }
            }
        }
    }
}
