//! Prints the figures as a table and writes them as JSON.

use std::io;
use std::path::Path;

use crate::level::Level;

/// The target of a row.
enum Target {
    /// Operations per second, at least this share of the figure on an empty store.
    Share(f64),
    /// Milliseconds, at most.
    AtMost(f64),
    /// At most this multiple of the raw start of the program.
    TimesRaw(f64),
    /// No target.
    None,
}

type Figure = fn(&Level) -> f64;

const ROWS: &[(&str, Figure, Target)] = &[
    ("create per s", |level| level.create_alone, Target::Share(0.8)),
    ("create per s, 64 at once", |level| level.create_together, Target::Share(0.8)),
    ("claim per s", |level| level.claim_alone, Target::None),
    ("renew per s", |level| level.renew_alone, Target::None),
    ("renew per s, 64 at once", |level| level.renew_together, Target::None),
    ("delete per s", |level| level.delete_alone, Target::Share(0.8)),
    ("delete per s, 64 at once", |level| level.delete_together, Target::Share(0.8)),
    ("cold create, ms", |level| level.create_ms, Target::TimesRaw(4.0)),
    ("raw start of the program, ms", |level| level.raw_start_ms, Target::None),
    ("restart until it serves, ms", |level| level.restart_ms, Target::AtMost(1000.0)),
    ("reconcile pass, ms", |level| level.reconcile_ms, Target::None),
    ("full list, ms", |level| level.list_ms, Target::None),
];

/// Prints a row for each operation with a column for each level, and whether the last level meets the target.
pub(crate) fn print(levels: &[(usize, Level)]) {
    let (Some((_, first)), Some((_, last))) = (levels.first(), levels.last()) else { return };
    print!("| running instances |");
    levels.iter().for_each(|(running, _)| print!(" {running} |"));
    println!(" last to first | target |");
    println!("|---|{}---:|---|", "---:|".repeat(levels.len()));
    for (name, figure, target) in ROWS {
        print!("| {name} |");
        levels.iter().for_each(|(_, level)| print!(" {:.1} |", figure(level)));
        let ratio = figure(last) / figure(first);
        let (target, met) = match target {
            Target::Share(share) => (format!("at least {share} of the first"), ratio >= *share),
            Target::AtMost(limit) => (format!("at most {limit:.0}"), figure(last) <= *limit),
            Target::TimesRaw(limit) => {
                let times = first.create_ms / first.raw_start_ms;
                (format!("at most {limit:.0} times the raw start; {times:.1} on an empty store"), times <= *limit)
            }
            Target::None => (String::new(), true),
        };
        println!(" {ratio:.2} | {target}{} |", if met { "" } else { ": MISSED" });
    }
}

/// Writes the figures of all levels to a file.
pub(crate) fn write(levels: &[(usize, Level)], to: &Path) -> io::Result<()> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let levels: Vec<_> =
        levels.iter().map(|(running, level)| serde_json::json!({ "running": running, "figures": level })).collect();
    std::fs::write(to, serde_json::to_vec_pretty(&levels)?)
}
