//! Values of flags, read.

use jiff::Timestamp;

/// What a setting is called and what it is.
pub(super) type Setting = (String, String);

pub(super) fn setting(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected KEY=VALUE such as difficulty=hard; got {text:?}")),
    }
}

/// A length of time as the API carries it.
pub(super) fn timeout(text: &str) -> Result<prost_types::Duration, String> {
    let duration = gauntlet_startup::duration(text)?;
    prost_types::Duration::try_from(duration).map_err(|_| format!("expected at most 315576000000s; got {text:?}"))
}

/// A moment as the API carries it.
pub(super) fn moment(text: &str) -> Result<prost_types::Timestamp, String> {
    let at: Timestamp =
        text.parse().map_err(|_| format!("expected a time in RFC 3339 such as 2026-01-31T18:00:00Z; got {text:?}"))?;
    // Protobuf's nanoseconds always count forward.
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
    fn settings() {
        assert_eq!(setting("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert_eq!(setting("a=").unwrap(), ("a".to_owned(), String::new()));
        assert!(setting("=b").is_err() && setting("a").unwrap_err().contains("got \"a\""));
    }

    #[test]
    fn moments() {
        assert_eq!(
            moment("1970-01-01T00:00:01.5Z").unwrap(),
            prost_types::Timestamp { seconds: 1, nanos: 500_000_000 }
        );
        assert_eq!(
            moment("1969-12-31T23:59:59.5Z").unwrap(),
            prost_types::Timestamp { seconds: -1, nanos: 500_000_000 }
        );
        assert_eq!(moment("1970-01-01T01:00:00+01:00").unwrap(), prost_types::Timestamp::default());
        assert!(moment("tomorrow").is_err());
    }
}
