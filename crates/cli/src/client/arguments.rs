//! Parsers for the values of flags.

use std::{convert::Infallible, path::PathBuf};

use jiff::{SignedDuration, Timestamp};

/// A key and its value.
pub(super) type Setting = (String, String);

pub(super) fn setting(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected KEY=VALUE such as difficulty=hard; got {text:?}")),
    }
}

/// Parses a duration into the form of the API.
pub(super) fn timeout(text: &str) -> Result<prost_types::Duration, String> {
    let duration = gauntlet_startup::duration(text)?;
    prost_types::Duration::try_from(duration).map_err(|_| format!("expected at most 315576000000s; got {text:?}"))
}

/// Takes any path, also an empty one: an empty variable counts as unset.
pub(super) fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

/// Parses how long something is valid: days (`30d`), or a duration with smaller units.
pub(super) fn lifetime(text: &str) -> Result<SignedDuration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok()).filter(|days| *days > 0);
    match days {
        Some(days) => Ok(SignedDuration::from_hours(24 * i64::from(days))),
        None => gauntlet_startup::duration(text)
            .ok()
            .and_then(|duration| SignedDuration::try_from(duration).ok())
            .ok_or_else(|| format!("expected a duration above zero such as 30d or 12h; got {text:?}")),
    }
}

/// Parses a time into the form of the API.
pub(super) fn time(text: &str) -> Result<prost_types::Timestamp, String> {
    let at: Timestamp =
        text.parse().map_err(|_| format!("expected a time in RFC 3339 such as 2026-01-31T18:00:00Z; got {text:?}"))?;
    // Protobuf's nanoseconds count forward, also before 1970.
    let seconds = at.as_nanosecond().div_euclid(1_000_000_000);
    let nanos = at.as_nanosecond().rem_euclid(1_000_000_000);
    match (i64::try_from(seconds), i32::try_from(nanos)) {
        (Ok(seconds), Ok(nanos)) => Ok(prost_types::Timestamp { seconds, nanos }),
        _ => Err(format!("expected a time within the years 1 to 9999; got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn setting_is_split_at_the_first_equals_sign() {
        assert_eq!(setting("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert_eq!(setting("a=").unwrap(), ("a".to_owned(), String::new()));
        assert!(setting("=b").is_err() && setting("a").unwrap_err().contains("got \"a\""));
    }

    #[test]
    fn lifetime_takes_days_and_smaller_units() {
        assert_eq!(lifetime("30d").unwrap(), SignedDuration::from_hours(720));
        assert_eq!(lifetime("1h30m").unwrap(), SignedDuration::from_mins(90));
        for wrong in ["", "0d", "-1d", "1.5d", "4294967296d", "soon"] {
            assert!(lifetime(wrong).unwrap_err().contains("30d or 12h"), "{wrong}");
        }
    }

    #[test]
    fn time_is_converted_to_seconds_and_positive_nanoseconds() {
        assert_eq!(time("1970-01-01T00:00:01.5Z").unwrap(), prost_types::Timestamp { seconds: 1, nanos: 500_000_000 });
        assert_eq!(time("1969-12-31T23:59:59.5Z").unwrap(), prost_types::Timestamp { seconds: -1, nanos: 500_000_000 });
        assert_eq!(time("1970-01-01T01:00:00+01:00").unwrap(), prost_types::Timestamp::default());
        assert!(time("tomorrow").is_err());
    }
}
