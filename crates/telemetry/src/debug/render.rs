use std::fmt::Write as _;

use super::{Group, Operation, Snapshot, Trace};

impl Snapshot {
    /// The snapshot as plain text, no line longer than `width` characters (but at least 60), for a terminal.
    pub fn render(&self, width: usize) -> String {
        let width = width.max(60);
        let mut text = String::new();
        self.gauges_line(&mut text);
        if self.disabled {
            text.push_str("the SDK is disabled (OTEL_SDK_DISABLED=true): no operations and no traces are seen\n");
        }
        for (group, title) in
            [(Group::Served, "served"), (Group::Locks, "locks"), (Group::Work, "work"), (Group::Called, "called")]
        {
            let rows: Vec<_> = self.operations.iter().filter(|operation| operation.group == group).collect();
            if !rows.is_empty() {
                table(&mut text, title, &rows, width);
            }
        }
        traces(&mut text, "slowest", &self.slow, 3);
        traces(&mut text, "failed", &self.failed, 3);
        for exporter in &self.exporters {
            if let Some(error) = &exporter.error {
                let _ = writeln!(
                    text,
                    "{} to {}: {} lost, {} dropped: {error}",
                    exporter.signal, exporter.target, exporter.failed, exporter.dropped
                );
            }
        }
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
                None => gauge.name.to_owned(),
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

fn table(text: &mut String, title: &str, rows: &[&Operation], width: usize) {
    // Seven columns of numbers of eight characters; the name takes what is left.
    let name_width = (width - 7 * 8).max(16);
    let _ = writeln!(
        text,
        "{title:<name_width$}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}",
        "count", "errors", "refused", "per s", "p50", "p95", "p99"
    );
    for row in rows {
        let name: String = row.name.chars().take(name_width - 1).collect();
        let latency = |read: fn(&super::Latency) -> f64| row.latency.as_ref().map_or("-".into(), |l| duration(read(l)));
        let _ = writeln!(
            text,
            "{name:<name_width$}{:>8}{:>8}{:>8}{:>8.1}{:>8}{:>8}{:>8}",
            row.count,
            row.errors,
            row.refused,
            row.rate,
            latency(|l| l.p50),
            latency(|l| l.p95),
            latency(|l| l.p99)
        );
    }
}

fn traces(text: &mut String, title: &str, traces: &[Trace], most: usize) {
    for trace in traces.iter().take(most) {
        let error = trace.spans.iter().find_map(|span| span.error.as_deref()).unwrap_or_default();
        let _ = writeln!(text, "{title} {:>8}  {}  {}  {error}", duration(trace.duration), trace.name, trace.trace_id);
    }
}

fn duration(millis: f64) -> String {
    match millis {
        m if m < 10.0 => format!("{m:.1}ms"),
        m if m < 1000.0 => format!("{m:.0}ms"),
        m => format!("{:.1}s", m / 1000.0),
    }
}
