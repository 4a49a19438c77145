//! The tables in `docs/telemetry.md` match the tables in the code. `UPDATE_DOCS=1 cargo test -p gauntlet-telemetry --test docs` regenerates
//! them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashSet;
use std::fmt::Write as _;

use gauntlet_telemetry::names::{METRICS, MetricKind, SPANS};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/telemetry.md");

fn list(attributes: &[&str]) -> String {
    if attributes.is_empty() {
        return "-".into();
    }
    attributes.iter().map(|attribute| format!("`{attribute}`")).collect::<Vec<_>>().join(", ")
}

fn spans() -> String {
    let mut table = String::from("| name | kind | one span is | notable attributes |\n|---|---|---|---|\n");
    for span in SPANS {
        let kind = span.kind.as_str().to_uppercase();
        writeln!(table, "| `{}` | {kind} | {} | {} |", span.name, span.description, list(span.attributes)).unwrap();
    }
    table
}

fn metrics() -> String {
    let mut table = String::from(
        "| name | kind | unit | description | attributes | name in Prometheus |\n|---|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        writeln!(
            table,
            "| `{}` | {} | `{}` | {} | {} | `{}` |",
            metric.name,
            metric.kind.as_str(),
            metric.unit,
            metric.description,
            list(metric.attributes),
            metric.prometheus_name()
        )
        .unwrap();
    }
    table
}

fn buckets() -> String {
    let mut table = String::from("| histogram | upper bounds in seconds |\n|---|---|\n");
    for metric in METRICS.iter().filter(|metric| metric.kind == MetricKind::Histogram) {
        let bounds: Vec<_> = metric.buckets.iter().map(ToString::to_string).collect();
        writeln!(table, "| `{}` | {} |", metric.name, bounds.join(", ")).unwrap();
    }
    table
}

#[test]
fn tables_in_the_document_match_the_code() {
    let document = std::fs::read_to_string(PATH).expect("docs/telemetry.md");
    let mut expected = document.clone();
    for (name, table) in [("spans", spans()), ("metrics", metrics()), ("buckets", buckets())] {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), format!("<!-- end: {name} -->"));
        let (before, rest) = expected.split_once(&begin).unwrap_or_else(|| panic!("docs/telemetry.md has no {begin}"));
        let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("docs/telemetry.md has no {end}"));
        expected = format!("{before}{begin}{table}{end}{after}");
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PATH, &expected).unwrap();
        return;
    }
    assert!(
        document == expected,
        "docs/telemetry.md does not match crates/telemetry/src/names.rs; regenerate its tables with\n\
         UPDATE_DOCS=1 cargo test -p gauntlet-telemetry --test docs"
    );
}

#[test]
fn metric_rows_are_well_formed() {
    let names: HashSet<_> = METRICS.iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), METRICS.len(), "duplicate metric name");
    let prometheus: HashSet<_> = METRICS.iter().map(|metric| metric.prometheus_name()).collect();
    assert_eq!(prometheus.len(), METRICS.len(), "two metrics have the same name in Prometheus");
    for metric in METRICS {
        assert_eq!(metric.kind == MetricKind::Histogram, !metric.buckets.is_empty(), "{}", metric.name);
        assert!(metric.buckets.is_sorted(), "{}", metric.name);
        assert!(metric.description.ends_with('.') && !metric.description.contains('|'), "{}", metric.name);
        assert!(metric.name.chars().all(|c| c.is_ascii_lowercase() || ".__".contains(c)), "{}", metric.name);
    }
}
