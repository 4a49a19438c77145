//! Parses numbers with a unit, such as `100ms` or `256MiB`.

use crate::yaml::{Node, Problems, Value};

pub(crate) const SECOND: u64 = 1000;
/// In milliseconds.
pub(crate) const TIMES: [(&str, u64); 4] = [("ms", 1), ("s", SECOND), ("m", 60 * SECOND), ("h", 3600 * SECOND)];
/// In bytes.
pub(crate) const SIZES: [(&str, u64); 4] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
/// In percent.
pub(crate) const SHARES: [(&str, u64); 1] = [("%", 1)];
/// Things that are counted.
pub(crate) const COUNTS: [(&str, u64); 1] = [("", 1)];

/// Reads a number with one of the units. The bounds have the same form.
pub(crate) fn read(
    node: Node,
    field: &str,
    units: &[(&str, u64)],
    min: &str,
    max: &str,
    problems: &mut Problems,
) -> Option<u64> {
    let line = node.line;
    let text = match node.value {
        Value::Text(text) => text,
        Value::Int(number) => number.to_string(),
        _ => {
            problems.text(node, field)?;
            return None;
        }
    };
    parse(&text, units, min, max).map_err(|problem| problems.at(line, field, problem)).ok()
}

/// Parses a number with one of the units, within the bounds. The error says what is expected.
pub(crate) fn parse(text: &str, units: &[(&str, u64)], min: &str, max: &str) -> Result<u64, String> {
    let bounds = amount(min, units).unwrap_or(0)..=amount(max, units).unwrap_or(u64::MAX);
    match amount(text, units) {
        Some(value) if bounds.contains(&value) => Ok(value),
        Some(_) => Err(format!("must be {min} to {max}, not {text}")),
        None => {
            let units: Vec<&str> = units.iter().map(|(unit, _)| *unit).filter(|unit| !unit.is_empty()).collect();
            let unit = if units.is_empty() { String::new() } else { format!(" and a unit ({})", units.join(", ")) };
            Err(format!("must be a whole number{unit}, such as {min}; not {text:?}"))
        }
    }
}

fn amount(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_have_no_unit_and_others_need_one() {
        assert_eq!(parse("12", &COUNTS, "1", "20"), Ok(12));
        assert_eq!(parse("50%", &SHARES, "1%", "100%"), Ok(50));
        assert!(parse("12B", &COUNTS, "1", "20").is_err() && parse("12", &SIZES, "1B", "1GiB").is_err());
        assert_eq!(parse("21", &COUNTS, "1", "20"), Err("must be 1 to 20, not 21".to_owned()));
    }

    proptest! {
        #[test]
        fn amounts_never_wrap(text in "[0-9]{0,30}(ms|s|m|h|B|KiB|MiB|GiB|%)?") {
            for units in [&TIMES[..], &SIZES, &SHARES, &COUNTS] {
                let _ = amount(&text, units);
            }
        }
    }
}
