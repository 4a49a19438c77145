//! What commands print to standard output.

use std::io::{self, Write as _};

use anstyle::Style;
use clap::ValueEnum;
use comfy_table::{Table, presets};
use gauntlet_api::{
    json,
    v1::{challenge::Challenge, instance::Instance},
};
use jiff::{SignedDuration, Timestamp};
use prost::{Message, Name};

use super::{
    failure::Failure,
    printable::{NONE, printable},
};

/// The format of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

/// Standard output in one format. Only terminals get colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    format: Format,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Prints a message as one line of JSON.
    pub(super) fn json<M: Message + Name>(self, message: &M) -> Result<(), Failure> {
        write(&json::to_string(message).map_err(|error| Failure::Json(error.to_string()))?)
    }

    /// Prints that a call without a result succeeded: `text`, or `{}` in JSON, as in the REST API.
    pub(super) fn done(self, text: &str) -> Result<(), Failure> {
        write(if self.is_json() { "{}" } else { text })
    }

    pub(super) fn challenge(self, challenge: &Challenge) -> Result<(), Failure> {
        if self.is_json() { self.json(challenge) } else { write(&challenge_text(challenge, Timestamp::now())) }
    }

    pub(super) fn challenges(self, challenges: &[Challenge]) -> Result<(), Failure> {
        write(&challenges_text(challenges, Timestamp::now()))
    }

    pub(super) fn instance(self, instance: &Instance) -> Result<(), Failure> {
        if self.is_json() { self.json(instance) } else { write(&instance_text(instance, Timestamp::now())) }
    }

    pub(super) fn instances(self, instances: &[Instance]) -> Result<(), Failure> {
        write(&instances_text(instances, Timestamp::now()))
    }
}

/// Prints a text and a newline to standard output.
pub(super) fn write(text: &str) -> Result<(), Failure> {
    let mut out = anstream::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        // The reader, such as `head`, needs no more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Failure::Io),
    }
}

fn challenges_text(challenges: &[Challenge], now: Timestamp) -> String {
    if challenges.is_empty() {
        return "No challenges.".into();
    }
    let rows = challenges.iter().map(|challenge| {
        vec![
            challenge.id.clone(),
            challenge.instances.len().to_string(),
            pool(challenge),
            timeout(challenge.timeout),
            time(challenge.until, now),
            challenge.scenario.clone(),
        ]
    });
    table(&["ID", "INSTANCES", "POOL", "TIMEOUT", "UNTIL", "SCENARIO"], rows)
}

fn instances_text(instances: &[Instance], now: Timestamp) -> String {
    if instances.is_empty() {
        return "No instances.".into();
    }
    let rows = instances.iter().map(|instance| {
        vec![
            instance.challenge_id.clone(),
            instance.source_id.clone(),
            time(instance.until, now),
            instance.connection_info.clone(),
        ]
    });
    table(&["CHALLENGE", "SOURCE", "UNTIL", "CONNECTION"], rows)
}

fn challenge_text(challenge: &Challenge, now: Timestamp) -> String {
    let mut fields = vec![
        ("Challenge", challenge.id.clone()),
        ("Scenario", challenge.scenario.clone()),
        ("Timeout", timeout(challenge.timeout)),
        ("Until", time(challenge.until, now)),
        ("Pool", pool(challenge)),
    ];
    fields.extend(challenge.additional.iter().map(|(key, value)| ("Additional", format!("{key}={value}"))));
    fields.push(("Instances", challenge.instances.len().to_string()));
    let mut text = record(fields);
    if !challenge.instances.is_empty() {
        text.push_str("\n\n");
        text.push_str(&instances_text(&challenge.instances, now));
    }
    text
}

fn instance_text(instance: &Instance, now: Timestamp) -> String {
    let mut fields = vec![
        ("Challenge", instance.challenge_id.clone()),
        ("Source", instance.source_id.clone()),
        ("Connection", instance.connection_info.clone()),
    ];
    fields.extend(instance.flags.iter().map(|flag| ("Flag", flag.clone())));
    fields.extend([
        ("Since", time(instance.since, now)),
        ("Renewed", time(instance.last_renew, now)),
        ("Until", time(instance.until, now)),
    ]);
    fields.extend(instance.additional.iter().map(|(key, value)| ("Additional", format!("{key}={value}"))));
    record(fields)
}

/// Renders one field per line, with its name in bold.
fn record(fields: Vec<(&str, String)>) -> String {
    let bold = Style::new().bold();
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let line = |(name, value): (&str, String)| {
        let gap = " ".repeat(width - name.len());
        format!("{bold}{name}{bold:#}{gap}  {}", printable(&value))
    };
    fields.into_iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Renders rows in columns as wide as their content, below a header in bold.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table.add_rows(rows.map(|row| row.iter().map(|cell| printable(cell)).collect::<Vec<_>>()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.trim_fmt();
    let bold = Style::new().bold();
    match text.split_once('\n') {
        Some((header, rows)) => format!("{bold}{header}{bold:#}\n{rows}"),
        None => text,
    }
}

fn pool(challenge: &Challenge) -> String {
    match (challenge.min, challenge.max) {
        (0, 0) => NONE.into(),
        (min, 0) => format!("{min}, no bound"),
        (min, max) => format!("{min} to {max}"),
    }
}

fn timeout(duration: Option<prost_types::Duration>) -> String {
    duration
        .map_or_else(|| NONE.into(), |duration| format!("{:#}", SignedDuration::new(duration.seconds, duration.nanos)))
}

/// Renders a time to the second, and its distance from now.
fn time(timestamp: Option<prost_types::Timestamp>, now: Timestamp) -> String {
    let Some(timestamp) = timestamp else { return NONE.into() };
    let Ok(at) = Timestamp::new(timestamp.seconds, 0) else { return format!("{} s since 1970", timestamp.seconds) };
    let away = SignedDuration::from_secs(at.as_second().saturating_sub(now.as_second()));
    if away.is_zero() {
        format!("{at} (now)")
    } else if away.is_negative() {
        format!("{at} ({:#} ago)", away.abs())
    } else {
        format!("{at} (in {away:#})")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn at(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    fn instance() -> Instance {
        Instance {
            challenge_id: "web-1".into(),
            source_id: "42".into(),
            since: at(0),
            last_renew: at(60),
            until: at(630),
            connection_info: "curl http://127.0.0.1:20001\u{1b}[2J".into(),
            flags: vec!["FLAG{one}".into(), "FLAG{two}".into()],
            ..Instance::default()
        }
    }

    fn challenge() -> Challenge {
        Challenge {
            id: "web-1".into(),
            scenario: "registry.lan:5000/web:1@sha256:00".into(),
            timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
            instances: vec![instance()],
            additional: [("difficulty".into(), "hard".into())].into(),
            min: 2,
            max: 10,
            ..Challenge::default()
        }
    }

    fn now() -> Timestamp {
        Timestamp::new(60, 0).unwrap()
    }

    #[test]
    fn challenge_as_text() {
        insta::assert_snapshot!(plain(&challenge_text(&challenge(), now())), @r"
        Challenge   web-1
        Scenario    registry.lan:5000/web:1@sha256:00
        Timeout     10m
        Until       -
        Pool        2 to 10
        Additional  difficulty=hard
        Instances   1

        CHALLENGE  SOURCE  UNTIL                             CONNECTION
        web-1      42      1970-01-01T00:10:30Z (in 9m 30s)  curl http://127.0.0.1:20001\u{1b}[2J
        ");
    }

    #[test]
    fn challenges_as_table() {
        let other = Challenge { id: "日本".into(), min: 1, until: at(0), ..Challenge::default() };
        insta::assert_snapshot!(plain(&challenges_text(&[challenge(), other], now())), @"
        ID     INSTANCES  POOL         TIMEOUT  UNTIL                          SCENARIO
        web-1  1          2 to 10      10m      -                              registry.lan:5000/web:1@sha256:00
        日本   0          1, no bound  -        1970-01-01T00:00:00Z (1m ago)  -
        ");
    }

    #[test]
    fn instance_as_text() {
        insta::assert_snapshot!(plain(&instance_text(&instance(), now())), @r"
        Challenge   web-1
        Source      42
        Connection  curl http://127.0.0.1:20001\u{1b}[2J
        Flag        FLAG{one}
        Flag        FLAG{two}
        Since       1970-01-01T00:00:00Z (1m ago)
        Renewed     1970-01-01T00:01:00Z (now)
        Until       1970-01-01T00:10:30Z (in 9m 30s)
        ");
    }

    #[test]
    fn instances_as_table() {
        let other = Instance { source_id: "7".into(), ..Instance::default() };
        insta::assert_snapshot!(plain(&instances_text(&[instance(), other], now())), @r"
        CHALLENGE  SOURCE  UNTIL                             CONNECTION
        web-1      42      1970-01-01T00:10:30Z (in 9m 30s)  curl http://127.0.0.1:20001\u{1b}[2J
        -          7       -                                 -
        ");
    }
}
