//! When what ended by itself is brought up again: at once the first time, then later and later.

use std::time::Duration;

use super::record::State;

/// The pauses before an instance that ends again and again is brought up again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// Before the second start in a row; each pause after that is twice the one before. None before the first.
    pub first: Duration,
    /// The longest.
    pub most: Duration,
    /// One that ran as long as this has run well: what ended before does not count any more.
    pub well: Duration,
}

impl Default for Restart {
    /// 1 s, up to 5 min; none after it ran for 1 min.
    fn default() -> Self {
        Self { first: Duration::from_secs(1), most: Duration::from_secs(300), well: Duration::from_secs(60) }
    }
}

impl Restart {
    /// How long it rests after it ended.
    pub(super) fn rest(&self, state: &State) -> Duration {
        match self.count(state) {
            0 | 1 => Duration::ZERO,
            count => self.first.saturating_mul(2u32.saturating_pow(count - 2)).min(self.most),
        }
    }

    /// How many times in a row it has ended by itself, when it is started after that.
    pub(super) fn count(&self, state: &State) -> u32 {
        match &state.end {
            Some(end) if !end.told && end.after < self.well => state.restarts.saturating_add(1),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::record::*, *};

    fn ended(restarts: u32, after: u64, told: bool) -> State {
        let end = End { how: String::new(), whole: true, told, after: Duration::from_secs(after) };
        let shim = ProcessId { pid: 1, start: 1 };
        State { boot: String::new(), shim, child: None, cgroup: None, gathered: false, restarts, end: Some(end) }
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_one_that_ran_well_begins_again() {
        let restart = Restart::default();
        let rest = |restarts| restart.rest(&ended(restarts, 3, false)).as_secs();
        assert_eq!([0, 1, 2, 3, 4, 8, 9, 10, u32::MAX].map(rest), [0, 1, 2, 4, 8, 128, 256, 300, 300]);
        assert_eq!(restart.rest(&ended(9, 60, false)), Duration::ZERO, "it ran well");
        assert_eq!(restart.count(&ended(9, 60, false)), 0);
        assert_eq!(restart.rest(&ended(9, 3, true)), Duration::ZERO, "it was told to end");
        let running = State { end: None, ..ended(9, 3, false) };
        assert_eq!(restart.rest(&running), Duration::ZERO);
    }
}
