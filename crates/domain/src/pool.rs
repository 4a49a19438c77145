//! How many instances to keep ready.

/// How many unclaimed instances to keep (`min`) while claimed and pooled together stay within `max` (0 is no bound).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    min: i64,
    max: i64,
}

impl Bounds {
    /// Both zero or more, and `max` either 0 or at least `min`; otherwise `None`.
    pub fn new(min: i64, max: i64) -> Option<Self> {
        (min >= 0 && max >= 0 && (max == 0 || max >= min)).then_some(Self { min, max })
    }

    /// The lower bound.
    pub fn min(self) -> i64 {
        self.min
    }

    /// The upper bound; 0 is none.
    pub fn max(self) -> i64 {
        self.max
    }
}

/// How many pooled instances are missing (positive) or too many (negative), `claimed` and `pooled` counted whatever their phase. An
/// expired or closing challenge (`open` false) keeps none.
pub fn shortfall(bounds: Bounds, claimed: usize, pooled: usize, open: bool) -> i64 {
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
    fn refuses_what_cannot_be_met() {
        assert!(Bounds::new(-1, 0).is_none());
        assert!(Bounds::new(0, -1).is_none());
        assert!(Bounds::new(3, 2).is_none());
        assert!(Bounds::new(3, 0).is_some());
    }

    proptest! {
        #[test]
        fn stays_within_max_and_reaches_min(min in 0i64..50, room in 0i64..50, bounded: bool, claimed in 0usize..100, pooled in 0usize..100) {
            let bounds = Bounds::new(min, if bounded { min + room } else { 0 }).unwrap();
            let after = pooled as i64 + shortfall(bounds, claimed, pooled, true);
            prop_assert!((0..=min).contains(&after));
            if bounds.max() > 0 { prop_assert!(after == 0 || claimed as i64 + after <= bounds.max()); } else { prop_assert_eq!(after, min); }
            prop_assert_eq!(shortfall(bounds, claimed, pooled, false), -(pooled as i64));
        }
    }
}
