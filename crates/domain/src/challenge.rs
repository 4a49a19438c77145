//! A challenge: what to run, for how long, and how many to keep ready.

use std::time::Duration;

use jiff::Timestamp;

use crate::{Additional, ChallengeId, Error, Pinned, Result, pool::Bounds};

/// What the platform registered, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Its name.
    pub id: ChallengeId,
    /// The scenario instances run, pinned by digest.
    pub scenario: Pinned,
    /// How long an instance lives from its creation or last renewal.
    pub timeout: Option<Duration>,
    /// When every instance ends.
    pub until: Option<Timestamp>,
    /// Handed to the scenario's templates.
    pub additional: Additional,
    /// How many instances to keep ready.
    pub bounds: Bounds,
    /// Counts updates: an instance that has applied this revision needs no further work.
    pub revision: u64,
    /// The revision that last changed what instances run (the scenario's digest or the template values): one that has applied at least
    /// this needs no work on its resources.
    pub content: u64,
    /// An update that has been recorded and not yet reached every instance.
    pub rollout: Option<Rollout>,
    /// It is being deleted: no new instance, gone when the last one is.
    pub closing: bool,
    /// The trace of the call that created it, in W3C traceparent form.
    pub origin: Option<String>,
}

/// An update under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// How instances get there.
    pub strategy: Strategy,
    /// The trace of the call that asked for it, in W3C traceparent form.
    pub origin: Option<String>,
}

/// How an update reaches a running instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// The running resources are changed.
    #[default]
    UpdateInPlace,
    /// The new one is up before the old one goes down.
    BlueGreen,
    /// The old one goes down first.
    Recreate,
}

/// What an update changes: `None` leaves a field as it is, `Some(None)` clears it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChallengeUpdate {
    /// A new scenario reference.
    pub scenario: Option<String>,
    /// A new timeout.
    pub timeout: Option<Option<Duration>>,
    /// A new end.
    pub until: Option<Option<Timestamp>>,
    /// New template values, replacing all the old ones.
    pub additional: Option<Additional>,
    /// A new lower bound of the pool.
    pub min: Option<i64>,
    /// A new upper bound of the pool.
    pub max: Option<i64>,
    /// How instances get there.
    pub strategy: Strategy,
}

impl Challenge {
    /// Whether its end has passed.
    pub fn expired(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// When an instance created or renewed now ends.
    pub fn expiry(&self, now: Timestamp) -> Option<Timestamp> {
        expiry(now, self.timeout, self.until)
    }

    /// The template values of one instance: its own over the challenge's.
    pub fn merged(&self, own: &Additional) -> Additional {
        let mut merged = self.additional.clone();
        merged.extend(own.iter().map(|(k, v)| (k.clone(), v.clone())));
        merged
    }

    /// Applies what an update changes, the scenario already resolved, and counts it; refuses bounds that cannot be met.
    pub(crate) fn apply(&mut self, update: &ChallengeUpdate, scenario: Option<Pinned>) -> Result<()> {
        let min = update.min.unwrap_or(self.bounds.min());
        let max = update.max.unwrap_or(self.bounds.max());
        self.bounds = Bounds::new(min, max).ok_or(Error::PoolOutOfBounds { min, max })?;
        self.revision += 1;
        let digest_changes = scenario.as_ref().is_some_and(|scenario| scenario.digest != self.scenario.digest);
        let values_change = update.additional.as_ref().is_some_and(|additional| *additional != self.additional);
        if digest_changes || values_change {
            self.content = self.revision;
        }
        if let Some(scenario) = scenario {
            self.scenario = scenario;
        }
        if let Some(timeout) = update.timeout {
            self.timeout = timeout;
        }
        if let Some(until) = update.until {
            self.until = until;
        }
        if let Some(additional) = &update.additional {
            self.additional = additional.clone();
        }
        Ok(())
    }
}

/// When an instance ends: neither bound, never; timeout only, `now + timeout`; until only, `until`; both, the earlier. A sum past the end
/// of time is the end of time.
pub fn expiry(now: Timestamp, timeout: Option<Duration>, until: Option<Timestamp>) -> Option<Timestamp> {
    let by_timeout = timeout.map(|timeout| {
        jiff::SignedDuration::try_from(timeout).ok().and_then(|d| now.checked_add(d).ok()).unwrap_or(Timestamp::MAX)
    });
    match (by_timeout, until) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_four_cases() {
        let minute = Some(Duration::from_secs(60));
        assert_eq!(expiry(at(0), None, None), None);
        assert_eq!(expiry(at(0), minute, None), Some(at(60)));
        assert_eq!(expiry(at(0), None, Some(at(9))), Some(at(9)));
        assert_eq!(expiry(at(0), minute, Some(at(9))), Some(at(9)));
        assert_eq!(expiry(at(0), minute, Some(at(90))), Some(at(60)));
    }

    proptest! {
        #[test]
        fn never_past_until_and_never_wraps(now in 0i64..4_000_000_000, timeout: u64, until in proptest::option::of(0i64..8_000_000_000)) {
            let until = until.map(at);
            let end = expiry(at(now), Some(Duration::from_secs(timeout)), until).unwrap();
            prop_assert!(end >= at(now) || Some(end) == until);
            if let Some(until) = until { prop_assert!(end <= until); }
        }
    }
}
