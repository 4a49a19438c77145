//! The limits that scenarios ask for and operators set, by the same names and in the same form.

use gauntlet_domain::Limits;

use crate::{
    quantity::{self, COUNTS, SECOND, SHARES, SIZES, TIMES},
    yaml::{self, Node, Problems, join},
};

struct Limit {
    name: &'static str,
    units: &'static [(&'static str, u64)],
    min: &'static str,
    max: &'static str,
    /// The value in [`Limits`] is the number divided by this, rounded up.
    divisor: u64,
    slot: fn(&mut Limits) -> &mut Option<u64>,
}

const LIMITS: [Limit; 7] = [
    limit("memory", &SIZES, "1MiB", "1024GiB", |limits| &mut limits.memory),
    limit("processes", &COUNTS, "1", "1000000", |limits| &mut limits.processes),
    limit("cpu_quota", &SHARES, "1%", "100000%", |limits| &mut limits.cpu_quota),
    limit("disk", &SIZES, "64KiB", "1024GiB", |limits| &mut limits.disk),
    Limit { divisor: SECOND, ..limit("cpu", &TIMES, "1s", "24h", |limits| &mut limits.cpu_seconds) },
    limit("open_files", &COUNTS, "8", "1048576", |limits| &mut limits.open_files),
    limit("output", &SIZES, "1KiB", "64MiB", |limits| &mut limits.output),
];

const fn limit(
    name: &'static str,
    units: &'static [(&'static str, u64)],
    min: &'static str,
    max: &'static str,
    slot: fn(&mut Limits) -> &mut Option<u64>,
) -> Limit {
    Limit { name, units, min, max, divisor: 1, slot }
}

fn names() -> [&'static str; LIMITS.len()] {
    LIMITS.map(|limit| limit.name)
}

/// Reads the limits of a scenario.
pub(crate) fn read(node: Node, field: &str, problems: &mut Problems) -> Option<Limits> {
    let nodes = problems.fields(node, field, names())?;
    let mut limits = Limits::default();
    for (limit, node) in LIMITS.iter().zip(nodes) {
        let Some(node) = node else { continue };
        let value = quantity::read(node, &join(field, limit.name), limit.units, limit.min, limit.max, problems);
        *(limit.slot)(&mut limits) = value.map(|value| value.div_ceil(limit.divisor));
    }
    Some(limits)
}

/// Parses limits as operators write them: names and values as in `scenario.yaml`, such as `memory=256MiB,processes=128`; `none` is no limit.
/// Output is always limited.
///
/// # Errors
/// The first limit that is unknown, given twice, or not within its bounds; with its value and what is expected.
pub fn parse_limits(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("expected NAME=VALUE such as memory=256MiB; got {part:?}"))?;
        let Some(limit) = LIMITS.iter().find(|limit| limit.name == name) else {
            let fix = match yaml::nearest(name, &names()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("known limits: {}", names().join(", ")),
            };
            return Err(format!("unknown limit {name:?}; {fix}"));
        };
        let value = match value {
            "none" if name != "output" => Limits::NONE,
            value => quantity::parse(value, limit.units, limit.min, limit.max)
                .map_err(|problem| format!("{name}: {problem}"))?
                .div_ceil(limit.divisor),
        };
        if (limit.slot)(&mut limits).replace(value).is_some() {
            return Err(format!("{name} is given twice; remove one"));
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn operators_limits_have_the_scenarios_names_and_units() {
        let text = "memory=256MiB, processes=128,cpu_quota=50%,disk=64MiB,cpu=90s,open_files=256,output=1MiB";
        let limits = Limits {
            memory: Some(256 << 20),
            processes: Some(128),
            cpu_quota: Some(50),
            disk: Some(64 << 20),
            cpu_seconds: Some(90),
            open_files: Some(256),
            output: Some(1 << 20),
        };
        assert_eq!(parse_limits(text), Ok(limits));
        assert_eq!(parse_limits(""), Ok(Limits::default()));
        assert_eq!(parse_limits("memory=none"), Ok(Limits { memory: Some(Limits::NONE), ..Limits::default() }));
    }

    #[test]
    fn wrong_limits_are_refused_with_name_value_and_fix() {
        let refused: Vec<String> = [
            "memory",
            "memroy=1GiB",
            "colour=red",
            "memory=256",
            "memory=1KiB",
            "cpu_quota=0.5",
            "processes=0",
            "disk=1MiB,disk=2MiB",
            "output=none",
        ]
        .map(|text| parse_limits(text).unwrap_err())
        .into();
        insta::assert_snapshot!(refused.join("\n"));
    }

    proptest! {
        #[test]
        fn any_text_is_limits_or_refused(text in "((memory|cpu|x)=?[0-9]{0,25}(MiB|s|%)?,?){0,4}|.{0,20}") {
            let _ = parse_limits(&text);
        }
    }
}
