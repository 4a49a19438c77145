//! The output of `gauntlet dev`: the addresses and examples of calls, then the live view. On a terminal that is a block of lines redrawn in
//! place; elsewhere, a report from time to time.

use std::{fmt::Write as _, io::Write as _, path::PathBuf, time::Duration};

use gauntlet_telemetry::debug::{DebugPage, Snapshot};
use tokio_util::sync::CancellationToken;

/// How often the block on a terminal is redrawn.
const REDRAW_INTERVAL: Duration = Duration::from_secs(1);
/// How often a report is printed elsewhere.
const REPORT_INTERVAL: Duration = Duration::from_secs(15);
/// The minimum height of the block in lines, if the terminal is as high. Text above it scrolls up.
const MIN_HEIGHT: usize = 22;
/// The size in columns and rows when there is no terminal, or its size is unknown.
const DEFAULT_SIZE: (usize, usize) = (120, 40);

const DIM: anstyle::Style = anstyle::Style::new().dimmed();
const BOLD: anstyle::Style = anstyle::Style::new().bold();
const BAD: anstyle::Style = anstyle::AnsiColor::Red.on_default();

pub(super) struct Screen {
    debug: DebugPage,
    intro: String,
    notices: Option<PathBuf>,
    live: bool,
    /// The height of the block on the terminal, and the width its lines were cut to.
    drawn: (usize, usize),
}

impl Screen {
    /// Prepares a screen that starts with the address of the API, the debug page, `hints` and example calls.
    pub(super) fn new(
        debug: DebugPage,
        api: &str,
        page: Option<String>,
        hints: &[String],
        notices: Option<PathBuf>,
        live: bool,
    ) -> Self {
        Self { debug, intro: intro(api, page.as_deref(), hints), notices, live, drawn: (0, 0) }
    }

    /// Shows the live view until `stop` is cancelled.
    pub(super) async fn show(mut self, stop: CancellationToken) {
        let every = if self.live { REDRAW_INTERVAL } else { REPORT_INTERVAL };
        let mut shown_notices = 0;
        let mut above = std::mem::take(&mut self.intro);
        let mut lines_above = above.lines().count();
        loop {
            for notice in self.read_notices().iter().skip(shown_notices) {
                shown_notices += 1;
                lines_above += 1;
                let _ = writeln!(above, "> {notice}");
            }
            let snapshot = self.debug.snapshot().await;
            let text = if self.live {
                self.block(&snapshot, lines_above)
            } else {
                format!("\n{}", snapshot.render(DEFAULT_SIZE.0))
            };
            // A closed pipe or terminal does not stop the manager.
            let mut out = std::io::stdout();
            let _ = out.write_all(self.update(&above, &text).as_bytes()).and_then(|()| out.flush());
            above.clear();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
        }
    }

    /// Returns the output that replaces the block on the terminal by the lines `above`, which stay, and the new block.
    fn update(&mut self, above: &str, block: &str) -> String {
        if !self.live {
            return format!("{above}{block}");
        }
        let (lines, width) = self.drawn;
        let current_width = size().0;
        // After a change of width the lines may have wrapped, and the beginning of the block is unknown.
        let back = if lines == 0 || width != current_width { String::new() } else { format!("\x1b[{lines}F\x1b[J") };
        self.drawn = (block.lines().count(), current_width);
        format!("{back}{above}{block}")
    }

    /// Renders the block, no higher than the terminal, and below the `lines_above` if there is room for both.
    fn block(&self, snapshot: &Snapshot, lines_above: usize) -> String {
        let (width, height) = size();
        let max_height = height.saturating_sub(lines_above + 1).max(MIN_HEIGHT).min(height.saturating_sub(1)).max(4);
        // One column is left free: some terminals wrap a full line.
        block(&snapshot.render(width.saturating_sub(1)), snapshot.uptime, width, max_height)
    }

    fn read_notices(&self) -> Vec<String> {
        let text = self.notices.as_ref().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        // A line that is still being written is shown next time.
        let complete = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        complete.lines().map(str::to_owned).collect()
    }
}

fn intro(api: &str, page: Option<&str>, hints: &[String]) -> String {
    let mut intro = String::new();
    let authority = api.trim_start_matches("http://");
    let _ = writeln!(intro, "Gauntlet is running: manager, janitor and a few simulated players in this process.");
    let _ = writeln!(intro, "  API             {api} (gRPC, gRPC-web and REST)");
    if let Some(page) = page {
        let _ = writeln!(intro, "  debug page      {page}");
    }
    for hint in hints {
        let _ = writeln!(intro, "  {hint}");
    }
    let instance = r#"{"challengeId":"web","sourceId":"me"}"#;
    let _ = writeln!(
        intro,
        "Try it:\n  curl -s {api}/api/v1/challenge\n  curl -s {api}/api/v1/instance -d '{instance}'\n  \
         curl -s -X DELETE {api}/api/v1/instance/web/me\n  grpcurl -plaintext {authority} list\n  \
         grpcurl -plaintext -d '{instance}' {authority} api.v1.instance.InstanceManager/CreateInstance",
    );
    intro
}

/// Renders `text` below a title and above a footer, in at most `max_height` lines.
fn block(text: &str, uptime: u64, width: usize, max_height: usize) -> String {
    let up = format!("{} min {:02} s", uptime / 60, uptime % 60);
    let title = format!("── live, up {up} ");
    let rule = "─".repeat(width.saturating_sub(title.chars().count() + 1));
    let mut block = format!("{BOLD}{title}{rule}{BOLD:#}\n");
    let lines: Vec<&str> = text.lines().collect();
    let room = max_height.saturating_sub(2);
    let shown = if lines.len() <= room { lines.len() } else { room.saturating_sub(1) };
    for line in lines.iter().take(shown) {
        let style = style(line);
        let cut: String = line.chars().take(width.saturating_sub(1)).collect();
        let _ = writeln!(block, "{style}{cut}{style:#}");
    }
    if shown < lines.len() {
        let _ = writeln!(
            block,
            "{DIM}… and {} lines more: enlarge the window or open the debug page{DIM:#}",
            lines.len() - shown
        );
    }
    let _ = writeln!(block, "{DIM}Ctrl-C stops everything and keeps the data.{DIM:#}");
    block
}

/// Highlights failures and dims headings.
fn style(line: &str) -> anstyle::Style {
    if line.starts_with("failed ") || line.starts_with("export ") {
        BAD
    } else if line.ends_with("p99") {
        DIM
    } else {
        anstyle::Style::new()
    }
}

/// Returns the columns and rows of the terminal.
fn size() -> (usize, usize) {
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(DEFAULT_SIZE, |size| {
        let or = |given: u16, usual| if given == 0 { usual } else { usize::from(given) };
        (or(size.ws_col, DEFAULT_SIZE.0).min(200), or(size.ws_row, DEFAULT_SIZE.1))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn block_fits_and_counts_the_lines_left_out() {
        let text: String = (0..30).map(|line| format!("line {line} {}\n", "x".repeat(100))).collect();
        for max_height in [4, 10, 31, 32, 40] {
            let block = plain(&block(&text, 83, 60, max_height));
            assert!(block.lines().count() <= max_height, "{max_height}: {block}");
            assert!(block.lines().all(|line| line.chars().count() < 80), "{block}");
            assert_eq!(block.contains("lines more"), max_height < 32, "{block}");
            assert!(block.starts_with("── live, up 1 min 23 s ──") && block.ends_with("keeps the data.\n"), "{block}");
        }
    }

    #[test]
    fn intro_has_addresses_and_example_calls() {
        let hints = ["challenges      web".to_owned()];
        insta::assert_snapshot!(intro("http://127.0.0.1:8080", Some("http://127.0.0.1:8081/"), &hints), @r#"
        Gauntlet is running: manager, janitor and a few simulated players in this process.
          API             http://127.0.0.1:8080 (gRPC, gRPC-web and REST)
          debug page      http://127.0.0.1:8081/
          challenges      web
        Try it:
          curl -s http://127.0.0.1:8080/api/v1/challenge
          curl -s http://127.0.0.1:8080/api/v1/instance -d '{"challengeId":"web","sourceId":"me"}'
          curl -s -X DELETE http://127.0.0.1:8080/api/v1/instance/web/me
          grpcurl -plaintext 127.0.0.1:8080 list
          grpcurl -plaintext -d '{"challengeId":"web","sourceId":"me"}' 127.0.0.1:8080 api.v1.instance.InstanceManager/CreateInstance
        "#);
    }
}
