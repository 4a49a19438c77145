//! When an instance that ended on its own is launched again: at once the first time, then after growing delays.

use std::time::Duration;

use super::record::State;

/// The delays before an instance that ends repeatedly is launched again. The first launch has no delay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// The delay before the second launch in a row. Each following delay is twice the one before.
    pub first_delay: Duration,
    /// The longest delay.
    pub max_delay: Duration,
    /// An instance that ran for this long starts again without a delay.
    pub reset_after: Duration,
}

impl Default for Restart {
    /// 1 s, up to 5 min; reset after 1 min.
    fn default() -> Self {
        Self {
            first_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(300),
            reset_after: Duration::from_secs(60),
        }
    }
}

impl Restart {
    /// The delay after the end of an instance.
    pub(super) fn delay(&self, state: &State) -> Duration {
        match self.consecutive_ends(state) {
            0 | 1 => Duration::ZERO,
            count => self.first_delay.saturating_mul(2u32.saturating_pow(count - 2)).min(self.max_delay),
        }
    }

    /// How many times in a row the instance has ended on its own, soon after its start.
    pub(super) fn consecutive_ends(&self, state: &State) -> u32 {
        match &state.end {
            Some(end) if !end.requested && end.ran_for < self.reset_after => state.restarts.saturating_add(1),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use gauntlet_sandbox::Level;

    use super::{super::record::*, *};

    fn ended(restarts: u32, ran_for: u64, requested: bool) -> State {
        let end = End { requested, ran_for: Duration::from_secs(ran_for), ..End::default() };
        let supervisor = ProcessId { pid: 1, start: 1 };
        let isolation = Level::None;
        State { boot: String::new(), supervisor, child: None, isolation, group: None, restarts, end: Some(end) }
    }

    #[test]
    fn delays_double_up_to_the_maximum_and_reset_after_a_long_run() {
        let restart = Restart::default();
        let delay = |restarts| restart.delay(&ended(restarts, 3, false)).as_secs();
        assert_eq!([0, 1, 2, 3, 4, 8, 9, 10, u32::MAX].map(delay), [0, 1, 2, 4, 8, 128, 256, 300, 300]);
        assert_eq!(restart.delay(&ended(9, 60, false)), Duration::ZERO, "it ran for long enough");
        assert_eq!(restart.consecutive_ends(&ended(9, 60, false)), 0);
        assert_eq!(restart.delay(&ended(9, 3, true)), Duration::ZERO, "a manager stopped it");
        let running = State { end: None, ..ended(9, 3, false) };
        assert_eq!(restart.delay(&running), Duration::ZERO);
    }
}
