//! A challenge: which scenario its instances run, how long they live, and how many are kept ready.

use std::time::Duration;

use jiff::Timestamp;

use crate::{Additional, ChallengeId, Error, Pinned, PoolBounds, Result, Strategy};

/// A challenge, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Its id.
    pub id: ChallengeId,
    /// The scenario that its instances run, pinned by digest.
    pub scenario: Pinned,
    /// How long an instance lives after its creation or last renewal.
    pub timeout: Option<Duration>,
    /// When all instances expire, renewed or not.
    pub until: Option<Timestamp>,
    /// The values given to the scenario's templates.
    pub additional: Additional,
    /// How many instances to keep ready.
    pub bounds: PoolBounds,
    /// The number of the last update. An instance that has applied this revision is up to date.
    pub revision: u64,
    /// The last revision that changed what instances run: the scenario's digest or the template values. An instance that has applied at
    /// least this revision needs no work on its resources.
    pub content_revision: u64,
    /// An update that has been recorded and has not reached every instance yet.
    pub rollout: Option<Rollout>,
    /// Whether it is being deleted. It gets no new instance, and is removed after its last one.
    pub deleting: bool,
    /// The trace of the call that created it, in W3C traceparent form.
    pub traceparent: Option<String>,
}

/// An update that is reaching the instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// How the update reaches an instance.
    pub strategy: Strategy,
    /// The trace of the call that requested it, in W3C traceparent form.
    pub traceparent: Option<String>,
}

/// The changes of an update. `None` leaves a field unchanged, `Some(None)` clears it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChallengeUpdate {
    /// A new scenario reference.
    pub scenario: Option<String>,
    /// A new timeout.
    pub timeout: Option<Option<Duration>>,
    /// A new `until`.
    pub until: Option<Option<Timestamp>>,
    /// New template values, which replace all existing ones.
    pub additional: Option<Additional>,
    /// A new `min` of the pool.
    pub min: Option<i64>,
    /// A new `max` of the pool.
    pub max: Option<i64>,
    /// How the update reaches an instance.
    pub strategy: Strategy,
}

impl Challenge {
    /// Whether the challenge has expired at `now`.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// When an instance that is created or renewed at `now` expires.
    pub fn expiry(&self, now: Timestamp) -> Option<Timestamp> {
        expiry(now, self.timeout, self.until)
    }

    /// The time of last renewal and the expiry of an instance that is renewed at `now`. A delayed call never shortens what a later call was
    /// given.
    pub(crate) fn renewal(&self, last: Timestamp, now: Timestamp) -> (Timestamp, Option<Timestamp>) {
        let last = now.max(last);
        (last, self.expiry(last))
    }

    /// The template values of an instance: the challenge's, overridden by its own.
    pub fn merge_additional(&self, own: &Additional) -> Additional {
        let mut merged = self.additional.clone();
        merged.extend(own.iter().map(|(k, v)| (k.clone(), v.clone())));
        merged
    }

    /// Applies an update, whose scenario has been resolved, as a new revision.
    ///
    /// # Errors
    /// [`Error::PoolOutOfBounds`] for bounds that contradict each other, and for new ones above `pool_max`. The challenge is then unchanged.
    pub(crate) fn apply(&mut self, update: &ChallengeUpdate, scenario: Option<Pinned>, pool_max: u32) -> Result<()> {
        let limit = i64::from(pool_max);
        let min = update.min.unwrap_or(self.bounds.min());
        let max = update.max.unwrap_or(self.bounds.max());
        let exceeds = [update.min, update.max].into_iter().flatten().any(|bound| bound > limit);
        self.bounds =
            PoolBounds::new(min, max).filter(|_| !exceeds).ok_or(Error::PoolOutOfBounds { min, max, limit })?;
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

/// Returns when an instance expires: at `now + timeout` or at `until`, whichever is given and earlier; never if neither is given. A sum beyond
/// the last timestamp is the last timestamp.
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
    fn expiry_is_the_earlier_of_timeout_and_until() {
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

    /// Any timestamp, mostly near the present.
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

        /// Compared with a computation in 128-bit integers, which cannot overflow.
        #[test]
        fn expiry_never_overflows(now in moment(), timeout in timeout(), until in proptest::option::of(moment())) {
            let timeout_nanos = timeout.map(|timeout| {
                (now.as_nanosecond() + i128::try_from(timeout.as_nanos()).unwrap()).min(Timestamp::MAX.as_nanosecond())
            });
            let until_nanos = until.map(Timestamp::as_nanosecond);
            let expected = [timeout_nanos, until_nanos].into_iter().flatten().min();
            prop_assert_eq!(expiry(now, timeout, until).map(Timestamp::as_nanosecond), expected);
        }

        /// In whatever order the calls are served.
        #[test]
        fn the_latest_renewal_wins(
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
                prop_assert!(last >= before.0 && end >= before.1, "no renewal shortens another");
            }
            let latest = calls.into_iter().chain([began]).max().unwrap();
            prop_assert_eq!((last, end), (latest, challenge.expiry(latest)));
        }

        /// `content_revision` is the revision of the last update that changed what instances run.
        #[test]
        fn each_update_is_a_revision(updates in proptest::collection::vec((0..4u8, 0..3u8, -1..4i64, -1..4i64), 1..12)) {
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
                    prop_assert_eq!(&challenge, &before, "a refused update changes nothing");
                }
                prop_assert_eq!((challenge.revision, challenge.content_revision), (revision, content_revision));
            }
        }
    }
}
