//! Converts between messages and domain types. Values that cannot be converted are refused with the field, the value and the fix.

use std::time::Duration;

use gauntlet_api::v1::{challenge as pbc, instance as pbi};
use gauntlet_domain::{
    Additional, Challenge, ChallengeId, ChallengeUpdate, Error, Instance, InvalidId, NewChallenge, Result, SourceId,
    Strategy,
};
use gauntlet_telemetry::context;
use jiff::Timestamp;

/// The maximum number of template values in one message.
const MAX_ADDITIONAL_ENTRIES: usize = 1024;
/// The maximum length of all keys and values together.
const MAX_ADDITIONAL_BYTES: usize = 256 * 1024;

/// The range of `google.protobuf.Timestamp`, 0001-01-01T00:00:00Z to 9999-12-31T23:59:59Z, in seconds since 1970. Values outside it have no JSON
/// form.
const FIRST_SECOND: i64 = -62_135_596_800;
const LAST_SECOND: i64 = 253_402_300_799;
/// The maximum of `google.protobuf.Duration`. Longer ones have no JSON form.
const MAX_DURATION: Duration = Duration::from_secs(315_576_000_000);

/// Parses a challenge id, and sets it as an attribute of the call's span.
pub(super) fn challenge_id(field: &'static str, text: String) -> Result<ChallengeId> {
    let id = ChallengeId::new(text).map_err(|problem| invalid_id(field, &problem))?;
    context::set_attribute("challenge.id", id.as_str().to_owned());
    Ok(id)
}

pub(super) fn source_id(field: &'static str, text: String) -> Result<SourceId> {
    SourceId::new(text).map_err(|problem| invalid_id(field, &problem))
}

pub(super) fn instance_ids(challenge_id: String, source_id: String) -> Result<(ChallengeId, SourceId)> {
    Ok((self::challenge_id("challenge_id", challenge_id)?, self::source_id("source_id", source_id)?))
}

fn invalid_id(field: &'static str, problem: &InvalidId) -> Error {
    Error::Invalid { field, problem: problem.to_string() }
}

fn timeout(duration: prost_types::Duration) -> Result<Duration> {
    let prost_types::Duration { seconds, nanos } = duration;
    let invalid = |rule: &str| Error::Invalid {
        field: "timeout",
        problem: format!("{rule}, got {seconds}s {nanos}ns; leave it out for no timeout"),
    };
    if seconds < 0 || (seconds == 0 && nanos < 0) {
        return Err(invalid("must not be negative"));
    }
    let nanos = u32::try_from(nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    let (Ok(seconds), Some(nanos)) = (u64::try_from(seconds), nanos) else {
        return Err(invalid("must have 0 to 999999999 nanoseconds"));
    };
    let timeout = Duration::new(seconds, nanos);
    if timeout > MAX_DURATION {
        Err(invalid(&format!("must be at most {}s", MAX_DURATION.as_secs())))
    } else {
        Ok(timeout)
    }
}

fn until(timestamp: prost_types::Timestamp) -> Result<Timestamp> {
    parse_time("until", timestamp)
}

pub(super) fn since(timestamp: Option<prost_types::Timestamp>) -> Result<Timestamp> {
    let missing = || Error::Invalid {
        field: "since",
        problem: "must be set to the value in the list of expired instances".to_owned(),
    };
    parse_time("since", timestamp.ok_or_else(missing)?)
}

fn parse_time(field: &'static str, timestamp: prost_types::Timestamp) -> Result<Timestamp> {
    let prost_types::Timestamp { seconds, nanos } = timestamp;
    let invalid = |problem: String| Error::Invalid { field, problem };
    if !(0..1_000_000_000).contains(&nanos) {
        return Err(invalid(format!("nanos must be 0 to 999999999, got {nanos}")));
    }
    if !(FIRST_SECOND..=LAST_SECOND).contains(&seconds) {
        let problem =
            format!("must lie within 0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z, got {seconds} seconds since 1970");
        return Err(invalid(problem));
    }
    Ok(Timestamp::new(seconds, nanos).unwrap_or(Timestamp::MAX))
}

pub(super) fn additional(map: impl IntoIterator<Item = (String, String)>) -> Result<Additional> {
    let additional: Additional = map.into_iter().collect();
    let bytes: usize = additional.iter().map(|(key, value)| key.len() + value.len()).sum();
    if additional.len() > MAX_ADDITIONAL_ENTRIES || bytes > MAX_ADDITIONAL_BYTES {
        let problem = format!(
            "must have at most {MAX_ADDITIONAL_ENTRIES} entries and {MAX_ADDITIONAL_BYTES} bytes, got {} entries and {bytes} bytes",
            additional.len()
        );
        return Err(Error::Invalid { field: "additional", problem });
    }
    Ok(additional)
}

fn scenario(text: String) -> Result<String> {
    if text.is_empty() {
        let problem = "must name a scenario, such as registry.example/team/challenge:v1".to_owned();
        return Err(Error::Invalid { field: "scenario", problem });
    }
    Ok(text)
}

pub(super) fn new_challenge(request: pbc::CreateChallengeRequest) -> Result<NewChallenge> {
    Ok(NewChallenge {
        id: challenge_id("id", request.id)?,
        scenario: scenario(request.scenario)?,
        timeout: request.timeout.map(timeout).transpose()?,
        until: request.until.map(until).transpose()?,
        additional: additional(request.additional)?,
        min: request.min,
        max: request.max,
    })
}

pub(super) fn challenge_update(request: pbc::UpdateChallengeRequest) -> Result<(ChallengeId, ChallengeUpdate)> {
    let id = challenge_id("id", request.id)?;
    let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
    let strategy = match request.update_strategy.map(pbc::UpdateStrategy::try_from) {
        None | Some(Ok(pbc::UpdateStrategy::UpdateInPlace)) => Strategy::UpdateInPlace,
        Some(Ok(pbc::UpdateStrategy::BlueGreen)) => Strategy::BlueGreen,
        Some(Ok(pbc::UpdateStrategy::Recreate)) => Strategy::Recreate,
        Some(Err(unknown)) => {
            let problem = format!("must be 0 (update_in_place), 1 (blue_green) or 2 (recreate), got {}", unknown.0);
            return Err(Error::Invalid { field: "update_strategy", problem });
        }
    };
    let mut update = ChallengeUpdate { strategy, ..ChallengeUpdate::default() };
    let mut unknown = false;
    let mut new_scenario = request.scenario;
    let mut values = Some(request.additional);
    for path in &paths {
        match path.as_str() {
            "scenario" => {
                update.scenario = update.scenario.take().or(Some(scenario(new_scenario.take().unwrap_or_default())?))
            }
            "timeout" => update.timeout = Some(request.timeout.map(timeout).transpose()?),
            "until" => update.until = Some(request.until.map(until).transpose()?),
            "additional" => {
                if let Some(values) = values.take() {
                    update.additional = Some(additional(values)?);
                }
            }
            "min" => update.min = Some(request.min),
            "max" => update.max = Some(request.max),
            "update_strategy" => {}
            _ => unknown = true,
        }
    }
    if unknown {
        return Err(Error::InvalidUpdateMask(paths));
    }
    Ok((id, update))
}

/// Converts a time. Earlier builds accepted times before the year 1, which have no JSON form: they become the first second of that year.
pub(super) fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    // jiff's maximum is 26 hours before the end of the year 9999.
    if at == Timestamp::MAX {
        return prost_types::Timestamp { seconds: LAST_SECOND, nanos: 0 };
    }
    // jiff's seconds and nanoseconds have the same sign; protobuf's nanoseconds are never negative.
    let (seconds, nanos) = match (at.as_second(), at.subsec_nanosecond()) {
        (seconds, nanos) if nanos < 0 => (seconds - 1, nanos + 1_000_000_000),
        positive => positive,
    };
    if seconds < FIRST_SECOND {
        return prost_types::Timestamp { seconds: FIRST_SECOND, nanos: 0 };
    }
    prost_types::Timestamp { seconds, nanos }
}

/// Converts a duration. Earlier builds accepted durations that have no JSON form: they become the longest that has one.
fn duration(timeout: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(timeout.min(MAX_DURATION)).unwrap_or_default()
}

pub(super) fn challenge(challenge: Challenge, instances: Vec<Instance>) -> pbc::Challenge {
    pbc::Challenge {
        id: challenge.id.as_str().to_owned(),
        scenario: challenge.scenario.reference,
        timeout: challenge.timeout.map(duration),
        until: challenge.until.map(timestamp),
        instances: instances.into_iter().map(instance).collect(),
        additional: challenge.additional.into_iter().collect(),
        min: challenge.bounds.min(),
        max: challenge.bounds.max(),
    }
}

#[allow(deprecated, reason = "the field is deprecated, and clients read it")]
pub(super) fn instance(instance: Instance) -> pbi::Instance {
    let flag = match instance.flags.as_slice() {
        [only] => Some(only.clone()),
        _ => None,
    };
    pbi::Instance {
        challenge_id: instance.key.challenge.as_str().to_owned(),
        source_id: instance.key.assignment.source().map(|source| source.as_str().to_owned()).unwrap_or_default(),
        since: Some(timestamp(instance.since)),
        last_renew: Some(timestamp(instance.last_renew)),
        until: instance.until.map(timestamp),
        connection_info: instance.connection_info,
        flag,
        additional: instance.additional.into_iter().collect(),
        flags: instance.flags,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn invalid_durations_and_times_are_refused_with_their_value() {
        let request = |seconds| pbc::CreateChallengeRequest {
            id: "a".into(),
            scenario: "s".into(),
            timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
            ..Default::default()
        };
        assert_eq!(new_challenge(request(999_999_999)).unwrap().timeout, Some(Duration::from_secs(999_999_999)));
        let refused = new_challenge(request(-1)).unwrap_err();
        assert_eq!(refused.to_string(), "timeout: must not be negative, got -1s 0ns; leave it out for no timeout");
        assert!(until(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }).is_err());
    }

    #[test]
    fn values_without_a_json_form_are_refused() {
        let create = |seconds, nanos| {
            let timeout = Some(prost_types::Duration { seconds, nanos });
            new_challenge(pbc::CreateChallengeRequest {
                id: "a".into(),
                scenario: "s".into(),
                timeout,
                ..Default::default()
            })
        };
        assert_eq!(create(315_576_000_000, 0).unwrap().timeout, Some(Duration::from_secs(315_576_000_000)));
        for (seconds, nanos) in [(315_576_000_000, 1), (315_576_000_001, 0), (i64::MAX, 0), (1, 1_000_000_000), (1, -1)]
        {
            let refused = create(seconds, nanos).unwrap_err();
            assert!(matches!(refused, Error::Invalid { field: "timeout", .. }), "{refused}");
            assert!(refused.to_string().contains(&format!("got {seconds}s {nanos}ns")), "{refused}");
        }
        assert!(until(prost_types::Timestamp { seconds: FIRST_SECOND, nanos: 0 }).is_ok());
        for seconds in [i64::MIN, FIRST_SECOND - 1, LAST_SECOND + 1, i64::MAX] {
            let refused = until(prost_types::Timestamp { seconds, nanos: 0 }).unwrap_err().to_string();
            assert!(refused.starts_with("until: ") && refused.contains(&seconds.to_string()), "{refused}");
        }
    }

    #[test]
    fn end_of_the_year_9999_is_accepted() {
        let end = prost_types::Timestamp { seconds: LAST_SECOND, nanos: 0 };
        assert_eq!(timestamp(until(end).unwrap()), end);
        let later = prost_types::Timestamp { nanos: 999_999_999, ..end };
        assert_eq!(timestamp(until(later).unwrap()), end);
        // A timeout that would end later is cut to the same time.
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let lapses = gauntlet_domain::expiry(now, Some(Duration::from_secs(315_576_000_000)), None).unwrap();
        assert_eq!(timestamp(lapses), end);
    }

    #[test]
    fn stored_values_without_a_json_form_become_the_nearest() {
        for stored in [Timestamp::MIN, "-000001-01-01T00:00:00Z".parse().unwrap()] {
            assert_eq!(timestamp(stored), prost_types::Timestamp { seconds: FIRST_SECOND, nanos: 0 });
        }
        for stored in [Duration::from_secs(315_576_000_001), Duration::MAX] {
            assert_eq!(duration(stored), prost_types::Duration { seconds: 315_576_000_000, nanos: 0 });
        }
        assert_eq!(duration(Duration::from_millis(1500)), prost_types::Duration { seconds: 1, nanos: 500_000_000 });
    }

    #[test]
    fn times_before_1970_round_trip() {
        let at = prost_types::Timestamp { seconds: -2, nanos: 500_000_000 };
        assert_eq!(timestamp(until(at).unwrap()), at);
    }

    #[test]
    fn only_masked_fields_change() {
        let mut request = pbc::UpdateChallengeRequest { id: "a".into(), min: 3, ..Default::default() };
        assert_eq!(challenge_update(request.clone()).unwrap().1, ChallengeUpdate::default());
        request.update_mask = Some(prost_types::FieldMask { paths: vec!["min".into(), "until".into()] });
        let update = challenge_update(request.clone()).unwrap().1;
        assert_eq!((update.min, update.until, update.max), (Some(3), Some(None), None));
        request.update_mask = Some(prost_types::FieldMask { paths: vec!["min".into(), "instances".into()] });
        assert_eq!(
            challenge_update(request).unwrap_err(),
            Error::InvalidUpdateMask(vec!["min".into(), "instances".into()])
        );
    }
}
