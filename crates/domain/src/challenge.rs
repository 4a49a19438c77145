//! A challenge: what to run, for how long, and how many to keep ready.

use std::time::Duration;

use jiff::Timestamp;

use crate::{Additional, ChallengeId, Error, Pinned, Result, pool::PoolBounds};

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
    pub bounds: PoolBounds,
    /// Counts updates: an instance that has applied this revision needs no further work.
    pub revision: u64,
    /// The revision that last changed what instances run (the scenario's digest or the template values): one that has applied at least
    /// this needs no work on its resources.
    pub content_revision: u64,
    /// An update that has been recorded and not yet reached every instance.
    pub rollout: Option<Rollout>,
    /// It is being deleted: no new instance, gone when the last one is.
    pub deleting: bool,
    /// The trace of the call that created it, in W3C traceparent form.
    pub traceparent: Option<String>,
}

/// An update under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// How instances get there.
    pub strategy: Strategy,
    /// The trace of the call that asked for it, in W3C traceparent form.
    pub traceparent: Option<String>,
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

    /// When an instance that is renewed now was last renewed, and when it then ends. A call that was held up never takes back what a later
    /// one was given.
    pub(crate) fn renewal(&self, last: Timestamp, now: Timestamp) -> (Timestamp, Option<Timestamp>) {
        let last = now.max(last);
        (last, self.expiry(last))
    }

    /// The template values of one instance: its own over the challenge's.
    pub fn merge_additional(&self, own: &Additional) -> Additional {
        let mut merged = self.additional.clone();
        merged.extend(own.iter().map(|(k, v)| (k.clone(), v.clone())));
        merged
    }

    /// Applies what an update changes, the scenario already resolved, and counts it; refuses bounds that cannot be met, and new ones above
    /// `pool_max`.
    pub(crate) fn apply(&mut self, update: &ChallengeUpdate, scenario: Option<Pinned>, pool_max: u32) -> Result<()> {
        let limit = i64::from(pool_max);
        let min = update.min.unwrap_or(self.bounds.min());
        let max = update.max.unwrap_or(self.bounds.max());
        let above = [update.min, update.max].into_iter().flatten().any(|bound| bound > limit);
        self.bounds = PoolBounds::new(min, max).filter(|_| !above).ok_or(Error::PoolOutOfBounds { min, max, limit })?;
        self.revision += 1;
        let digest_changes = scenario.as_ref().is_some_and(|scenario| scenario.digest != self.scenario.digest);
        let values_change = update.additional.as_ref().is_some_and(|additional| *additional != self.additional);
        if digest_changes || values_change {
            self.content_revision = self.revision;
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
    use proptest::{prelude::*, strategy::Strategy};

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

    fn challenge(timeout: Option<Duration>, until: Option<Timestamp>) -> Challenge {
        let scenario = Pinned { reference: "r".to_owned(), digest: "d0".to_owned() };
        Challenge {
            id: ChallengeId::new("c").unwrap(),
            scenario,
            timeout,
            until,
            additional: Additional::new(),
            bounds: PoolBounds::default(),
            revision: 1,
            content_revision: 1,
            rollout: None,
            deleting: false,
            traceparent: None,
        }
    }

    /// Anything from the first second of time to the last, most of it near to now.
    fn moment() -> impl Strategy<Value = Timestamp> {
        let all = Timestamp::MIN.as_second()..=Timestamp::MAX.as_second();
        prop_oneof![4 => (0..4_000_000_000i64).prop_map(at), 1 => all.prop_map(at)]
    }

    fn timeout() -> impl Strategy<Value = Option<Duration>> {
        let seconds = prop_oneof![4 => 0..10_000_000u64, 1 => any::<u64>()];
        proptest::option::of((seconds, 0..1_000_000_000u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos)))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Counted in whole numbers that have room for it all.
        #[test]
        fn an_end_is_the_earlier_bound(now in moment(), timeout in timeout(), until in proptest::option::of(moment())) {
            let lapses = timeout.map(|timeout| {
                (now.as_nanosecond() + i128::try_from(timeout.as_nanos()).unwrap()).min(Timestamp::MAX.as_nanosecond())
            });
            let until_nanos = until.map(Timestamp::as_nanosecond);
            let expected = [lapses, until_nanos].into_iter().flatten().min();
            prop_assert_eq!(expiry(now, timeout, until).map(Timestamp::as_nanosecond), expected);
        }

        /// In whatever order they come to be done.
        #[test]
        fn of_renewals_the_latest_stands(
            began in moment(),
            timeout in timeout(),
            until in proptest::option::of(moment()),
            calls in proptest::collection::vec(moment(), 1..8),
        ) {
            let challenge = challenge(timeout, until);
            let (mut last, mut end) = (began, challenge.expiry(began));
            for call in &calls {
                let before = (last, end);
                (last, end) = challenge.renewal(last, *call);
                prop_assert!(last >= before.0 && end >= before.1, "nothing is taken back");
            }
            let latest = calls.into_iter().chain([began]).max().unwrap();
            prop_assert_eq!((last, end), (latest, challenge.expiry(latest)));
        }

        /// `content` is the revision of the last update that changed what runs.
        #[test]
        fn updates_are_counted(updates in proptest::collection::vec((0..4u8, 0..3u8, -1..4i64, -1..4i64), 1..12)) {
            let mut challenge = challenge(None, None);
            let (mut revision, mut content_revision) = (1, 1);
            for (scenario, value, min, max) in updates {
                let before = challenge.clone();
                let additional = (value > 0).then(|| Additional::from([("v".to_owned(), value.to_string())]));
                let update = ChallengeUpdate {
                    additional: additional.clone(),
                    min: (min > 0).then_some(min),
                    max: (max >= 0).then_some(max),
                    ..ChallengeUpdate::default()
                };
                let digest = format!("d{scenario}");
                let pinned = (scenario > 0).then(|| Pinned { reference: "r".to_owned(), digest: digest.clone() });
                let changes = (scenario > 0 && before.scenario.digest != digest)
                    || additional.is_some_and(|additional| before.additional != additional);
                if challenge.apply(&update, pinned, 2).is_ok() {
                    revision += 1;
                    if changes {
                        content_revision = revision;
                    }
                    prop_assert!(challenge.bounds.max() == 0 || challenge.bounds.min() <= challenge.bounds.max());
                    prop_assert!(challenge.bounds.min() <= 2 && challenge.bounds.max() <= 2);
                } else {
                    prop_assert_eq!(&challenge, &before, "what is refused changes nothing");
                }
                prop_assert_eq!((challenge.revision, challenge.content_revision), (revision, content_revision));
            }
        }
    }
}
