//! The snapshot as text, for a terminal.

use std::fmt::Write as _;

use super::{Group, Latency, Snapshot, Trace};

impl Snapshot {
    /// The snapshot as plain text with lines of at most `width` characters. A `width` below 60 counts as 60.
    pub fn render(&self, width: usize) -> String {
        let width = width.max(60);
        let mut text = String::new();
        self.gauges_line(&mut text);
        if self.disabled {
            text.push_str("telemetry is disabled (OTEL_SDK_DISABLED=true): operations and traces are not shown\n");
        }
        // Errors come before slow traces, and both before details, because a short window cuts off the end.
        for exporter in &self.exporters {
            if let Some(error) = &exporter.error {
                let _ = writeln!(
                    text,
                    "export of {} to {} fails: {error} ({} lost, {} dropped)",
                    exporter.signal, exporter.target, exporter.failed, exporter.dropped
                );
            }
        }
        self.table(&mut text, Group::Served, "served", width);
        traces(&mut text, "failed", &self.failed, self.at);
        traces(&mut text, "slow", &self.slow, self.at);
        self.table(&mut text, Group::Locks, "locks", width);
        self.table(&mut text, Group::Work, "work", width);
        self.table(&mut text, Group::Called, "called", width);
        text.lines().fold(String::new(), |mut cut, line| {
            cut.extend(line.chars().take(width));
            cut.push('\n');
            cut
        })
    }

    fn gauges_line(&self, text: &mut String) {
        let mut sums: Vec<(String, u64)> = Vec::new();
        for gauge in &self.gauges {
            let name = match gauge.attributes.get("state") {
                Some(state) => format!("{} {state}", gauge.name),
                None => gauge.name.trim_start_matches("gauntlet.").replace('.', " "),
            };
            match sums.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += gauge.value,
                None => sums.push((name, gauge.value)),
            }
        }
        if !sums.is_empty() {
            let parts: Vec<_> = sums.iter().map(|(name, sum)| format!("{name}: {sum}")).collect();
            let _ = writeln!(text, "{}", parts.join("   "));
        }
    }
}

/// The number of traces of each kind.
const TRACES: usize = 3;
/// The headings and widths of the columns.
const COLUMNS: [(&str, usize); 7] =
    [("count", 8), ("errors", 8), ("rejected", 9), ("per s", 7), ("p50", 7), ("p95", 7), ("p99", 7)];

impl Snapshot {
    fn table(&self, text: &mut String, group: Group, title: &str, width: usize) {
        let mut rows = self.operations.iter().filter(|operation| operation.group == group).peekable();
        if rows.peek().is_none() {
            return;
        }
        let room = width.saturating_sub(COLUMNS.iter().map(|(_, width)| width).sum()).max(8);
        let line = |text: &mut String, name: &str, cells: [String; COLUMNS.len()]| {
            let _ = write!(text, "{name:<room$}");
            for (cell, (_, width)) in cells.iter().zip(COLUMNS) {
                let _ = write!(text, "{cell:>width$}");
            }
            text.push('\n');
        };
        line(text, title, COLUMNS.map(|(heading, _)| heading.to_owned()));
        for row in rows {
            let latency =
                |read: fn(&Latency) -> f64| row.latency.as_ref().map_or("-".into(), |l| format_millis(read(l)));
            let cells = [
                row.count.to_string(),
                row.errors.to_string(),
                row.refused.to_string(),
                format!("{:.1}", row.rate),
                latency(|latency| latency.p50),
                latency(|latency| latency.p95),
                latency(|latency| latency.p99),
            ];
            line(text, shorten(&row.name, room - 1), cells);
        }
    }
}

/// Shortens an operation's name to `room` characters: without its package, then without its service, then truncated.
fn shorten(name: &str, room: usize) -> &str {
    let rpc = (!name.contains(' ')).then(|| name.rsplit_once('/')).flatten();
    let without_package =
        rpc.and_then(|(service, _)| Some(service.rfind('.')? + 1)).and_then(|start| name.get(start..));
    let shorter = [Some(name), without_package, rpc.map(|(_, method)| method)];
    let fitting = shorter.into_iter().flatten().find(|name| name.chars().count() <= room);
    fitting.unwrap_or_else(|| name.char_indices().nth(room).and_then(|(end, _)| name.get(..end)).unwrap_or(name))
}

/// One line for each trace: its age, duration, name and challenge, and its error, or its id if it did not fail.
fn traces(text: &mut String, title: &str, traces: &[Trace], now: u64) {
    for trace in traces.iter().take(TRACES) {
        let challenge = trace.spans.iter().find_map(|span| span.attributes.get("challenge.id"));
        let of = challenge.map(|challenge| format!(" of {challenge}")).unwrap_or_default();
        let error = trace.spans.iter().find_map(|span| span.error.as_deref()).unwrap_or_default();
        // An error may contain the last lines of a program's output.
        let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            text,
            "{title:<7}{:>7} ago {:>7}  {}{of}  {}",
            format_age(now.saturating_sub(trace.started / 1000)),
            format_millis(trace.duration),
            shorten(&trace.name, 32),
            if error.is_empty() { &trace.trace_id } else { &error },
        );
    }
}

fn format_age(seconds: u64) -> String {
    match seconds {
        s if s < 120 => format!("{s}s"),
        s if s < 7200 => format!("{}min", s / 60),
        s => format!("{}h", s / 3600),
    }
}

fn format_millis(millis: f64) -> String {
    match millis {
        m if m < 10.0 => format!("{m:.1}ms"),
        m if m < 1000.0 => format!("{m:.0}ms"),
        m => format!("{:.1}s", m / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::{format_age, format_millis, shorten};

    #[test]
    fn names_lose_their_package_first_and_then_their_service() {
        let name = "api.v1.instance.InstanceManager/CreateInstance";
        assert_eq!(shorten(name, 46), name);
        assert_eq!(shorten(name, 45), "InstanceManager/CreateInstance");
        assert_eq!(shorten(name, 20), "CreateInstance");
        assert_eq!(shorten(name, 4), "api.");
        assert_eq!(shorten("GET /api/v1/instance/{challenge_id}/{source_id}", 20), "GET /api/v1/instance");
        assert_eq!(shorten("été", 2), "ét");
    }

    #[test]
    fn times_have_the_unit_that_suits_them() {
        assert_eq!([0, 119, 120, 7199, 7200, 90_000].map(format_age), ["0s", "119s", "2min", "119min", "2h", "25h"]);
        assert_eq!(
            [0.25, 9.94, 10.0, 999.0, 1000.0, 61_500.0].map(format_millis),
            ["0.2ms", "9.9ms", "10ms", "999ms", "1.0s", "61.5s"]
        );
    }
}
