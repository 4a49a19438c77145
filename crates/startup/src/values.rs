use std::time::Duration;

/// Parses a duration above zero: as people and Go write it (`30s`, `1m30s`, `1.5h`, `250ms`), or as whole seconds (`30`).
///
/// # Errors
/// When the text is not a duration, or one that is zero or negative. The message has the text and the expected form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().or_else(|error| text.parse().map(jiff::SignedDuration::from_secs).map_err(|_| error));
    parsed
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("expected a duration above zero such as 30s or 1m30s; got {text:?}"))
}

/// Parses a size in bytes: a whole number of B, KiB, MiB or GiB. A number without a unit is refused, as are decimal units and fractions,
/// which are easily mistaken for something else. The `bytesize` crate accepts all of these.
///
/// # Errors
/// When the text is not such a size, or one above 2^64 - 1 bytes. The message has the text and the expected form.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];
    let parsed = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)));
    parsed
        .and_then(|(number, bytes)| number.trim_end().parse::<u64>().ok()?.checked_mul(*bytes))
        .ok_or_else(|| format!("expected a size such as 500MiB or 10GiB; got {text:?}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_with_units_and_plain_seconds() {
        for (text, millis) in [
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("1h0m0s", 3_600_000),
            ("1.5h", 5_400_000),
            ("250ms", 250),
            ("45", 45_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "0", "0s", "-3s", "-3", "soon", "1e3", "3 parsecs"] {
            let error = format!("expected a duration above zero such as 30s or 1m30s; got {text:?}");
            assert_eq!(duration(text), Err(error));
        }
    }

    #[test]
    fn sizes_need_a_binary_unit() {
        assert_eq!(size("0B"), Ok(0));
        assert_eq!(size("3KiB"), Ok(3 << 10));
        assert_eq!(size("500 MiB"), Ok(500 << 20));
        assert_eq!(size("10GiB"), Ok(10 << 30));
        for text in ["", "B", "7", "-1KiB", "1.5GiB", "10GB", "99999999999GiB"] {
            assert_eq!(size(text), Err(format!("expected a size such as 500MiB or 10GiB; got {text:?}")));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_duration_above_zero_or_refused(text in ".{0,20}") {
            if let Ok(duration) = duration(&text) {
                prop_assert!(!duration.is_zero());
            }
        }
    }
}
