//! What a person sees: where everything is and how to try it, then the live view: on a terminal a block of lines at the bottom that is
//! redrawn in place, elsewhere a report now and then.

use std::{fmt::Write as _, io::Write as _, path::PathBuf, time::Duration};

use gauntlet_telemetry::debug::{DebugPage, Snapshot};
use tokio_util::sync::CancellationToken;

/// Between two looks on a terminal.
const LIVE_EVERY: Duration = Duration::from_secs(1);
/// Between two reports elsewhere.
const PRINT_EVERY: Duration = Duration::from_secs(15);
/// The live block has at least this many lines where the terminal has as many; what was said before scrolls up.
const LEAST: usize = 22;
/// Without a terminal, or before it says its size.
const SIZE: (usize, usize) = (120, 40);

const DIM: anstyle::Style = anstyle::Style::new().dimmed();
const BOLD: anstyle::Style = anstyle::Style::new().bold();
const BAD: anstyle::Style = anstyle::AnsiColor::Red.on_default();

pub(super) struct Screen {
    debug: DebugPage,
    intro: String,
    notices: Option<PathBuf>,
    live: bool,
    /// Lines of the block on the terminal, and the width they were cut to.
    drawn: (usize, usize),
}

impl Screen {
    /// Says where the API at `api` and the page are, what `hints` say, and how to try it.
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

    /// Shows the live view until told to stop.
    pub(super) async fn show(mut self, stop: CancellationToken) {
        let every = if self.live { LIVE_EVERY } else { PRINT_EVERY };
        let mut told = 0;
        let mut said = std::mem::take(&mut self.intro);
        let mut kept = said.lines().count();
        loop {
            for notice in self.read_notices().iter().skip(told) {
                told += 1;
                kept += 1;
                let _ = writeln!(said, "> {notice}");
            }
            let snapshot = self.debug.snapshot().await;
            let text = if self.live { self.block(&snapshot, kept) } else { format!("\n{}", snapshot.render(SIZE.0)) };
            // A pipe or a terminal that is gone is no reason to end.
            let mut out = std::io::stdout();
            let _ = out.write_all(self.over(&said, &text).as_bytes()).and_then(|()| out.flush());
            said.clear();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
        }
    }

    /// What replaces the block that is on the terminal: `said`, which stays above it, and the block.
    fn over(&mut self, said: &str, block: &str) -> String {
        if !self.live {
            return format!("{said}{block}");
        }
        let (lines, width) = self.drawn;
        let now = size().0;
        // Lines cut to another width may have wrapped since: nobody knows where the block begins.
        let back = if lines == 0 || width != now { String::new() } else { format!("\x1b[{lines}F\x1b[J") };
        self.drawn = (block.lines().count(), now);
        format!("{back}{said}{block}")
    }

    /// The live block, no higher than the terminal, and not over what is `kept` above it where there is room for both.
    fn block(&self, snapshot: &Snapshot, kept: usize) -> String {
        let (width, height) = size();
        let most = height.saturating_sub(kept + 1).max(LEAST).min(height.saturating_sub(1)).max(4);
        // One column less than there is: a full line makes some terminals wrap.
        block(&snapshot.render(width.saturating_sub(1)), snapshot.uptime, width, most)
    }

    fn read_notices(&self) -> Vec<String> {
        let text = self.notices.as_ref().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        // A line that is just being written comes with the next look.
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().map(str::to_owned).collect()
    }
}

fn intro(api: &str, page: Option<&str>, hints: &[String]) -> String {
    let mut intro = String::new();
    let authority = api.trim_start_matches("http://");
    let _ = writeln!(intro, "Gauntlet runs: manager, janitor and a few players in this process.");
    let _ = writeln!(intro, "  the API         {api} (gRPC, gRPC-web and REST)");
    if let Some(page) = page {
        let _ = writeln!(intro, "  the live page   {page}");
    }
    for hint in hints {
        let _ = writeln!(intro, "  {hint}");
    }
    let seat = r#"{"challengeId":"web","sourceId":"me"}"#;
    let _ = writeln!(
        intro,
        "Try it:\n  curl -s {api}/api/v1/challenge\n  curl -s {api}/api/v1/instance -d '{seat}'\n  \
         curl -s -X DELETE {api}/api/v1/instance/web/me\n  grpcurl -plaintext {authority} list\n  \
         grpcurl -plaintext -d '{seat}' {authority} api.v1.instance.InstanceManager/CreateInstance",
    );
    intro
}

/// `text` below a title and above what ends it all, in at most `most` lines.
fn block(text: &str, uptime: u64, width: usize, most: usize) -> String {
    let up = format!("{} min {:02} s", uptime / 60, uptime % 60);
    let title = format!("── live, up {up} ");
    let rule = "─".repeat(width.saturating_sub(title.chars().count() + 1));
    let mut block = format!("{BOLD}{title}{rule}{BOLD:#}\n");
    let lines: Vec<&str> = text.lines().collect();
    let room = most.saturating_sub(2);
    let shown = if lines.len() <= room { lines.len() } else { room.saturating_sub(1) };
    for line in lines.iter().take(shown) {
        let style = style(line);
        let cut: String = line.chars().take(width.saturating_sub(1)).collect();
        let _ = writeln!(block, "{style}{cut}{style:#}");
    }
    if shown < lines.len() {
        let _ = writeln!(
            block,
            "{DIM}… and {} lines more: a higher window or the page shows them{DIM:#}",
            lines.len() - shown
        );
    }
    let _ = writeln!(block, "{DIM}Ctrl-C ends everything and keeps the data.{DIM:#}");
    block
}

/// Failures stand out, headings stand back.
fn style(line: &str) -> anstyle::Style {
    if line.starts_with("failed ") || line.starts_with("export ") {
        BAD
    } else if line.ends_with("p99") {
        DIM
    } else {
        anstyle::Style::new()
    }
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(SIZE, |size| {
        let or = |given: u16, usual| if given == 0 { usual } else { usize::from(given) };
        (or(size.ws_col, SIZE.0).min(200), or(size.ws_row, SIZE.1))
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
    fn the_block_fits_and_says_what_it_leaves_out() {
        let text: String = (0..30).map(|line| format!("line {line} {}\n", "x".repeat(100))).collect();
        for most in [4, 10, 31, 32, 40] {
            let block = plain(&block(&text, 83, 60, most));
            assert!(block.lines().count() <= most, "{most}: {block}");
            assert!(block.lines().all(|line| line.chars().count() < 80), "{block}");
            assert_eq!(block.contains("lines more"), most < 32, "{block}");
            assert!(block.starts_with("── live, up 1 min 23 s ──") && block.ends_with("keeps the data.\n"), "{block}");
        }
    }

    #[test]
    fn says_how_to_try_it() {
        let hints = ["challenges      web".to_owned()];
        insta::assert_snapshot!(intro("http://127.0.0.1:8080", Some("http://127.0.0.1:8081/"), &hints), @r#"
        Gauntlet runs: manager, janitor and a few players in this process.
          the API         http://127.0.0.1:8080 (gRPC, gRPC-web and REST)
          the live page   http://127.0.0.1:8081/
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
