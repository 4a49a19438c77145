//! What a person sees: where everything is and how to try it, then the live view, on a terminal in place, elsewhere as lines now and then.

use std::{fmt::Write as _, io::Write as _, path::PathBuf, time::Duration};

use gauntlet_telemetry::debug::Debug;
use tokio_util::sync::CancellationToken;

/// Between two looks on a terminal.
const LIVE_EVERY: Duration = Duration::from_secs(1);
/// Between two reports elsewhere.
const PRINT_EVERY: Duration = Duration::from_secs(15);
/// How many notices are shown.
const NOTICES: usize = 6;
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

pub(super) struct Screen {
    pub(super) debug: Debug,
    pub(super) api: String,
    pub(super) page: Option<String>,
    pub(super) hints: Vec<String>,
    pub(super) notices: Option<PathBuf>,
    pub(super) live: bool,
}

impl Screen {
    /// Shows the live view until told to stop.
    pub(super) async fn show(self, stop: CancellationToken) {
        let head = self.head();
        if !self.live {
            print!("{head}");
        }
        let mut told = 0;
        loop {
            let notices = self.read_notices();
            let text = self.debug.snapshot().await.render(width());
            if self.live {
                let from = notices.len().saturating_sub(NOTICES);
                let last: String = notices.iter().skip(from).fold(String::new(), |text, line| text + line + "\n");
                print!("{CLEAR}{head}\n{text}\n{last}Ctrl-C ends everything and keeps the data.\n");
            } else {
                for notice in notices.iter().skip(told) {
                    println!("{notice}");
                }
                told = notices.len();
                println!("\n{text}");
            }
            // A closed pipe is no reason to end.
            let _ = std::io::stdout().flush();
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(if self.live { LIVE_EVERY } else { PRINT_EVERY }) => {}
            }
        }
    }

    fn read_notices(&self) -> Vec<String> {
        let text = self.notices.as_ref().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn head(&self) -> String {
        let mut head = String::new();
        let (api, authority) = (&self.api, self.api.trim_start_matches("http://"));
        let _ = writeln!(head, "Gauntlet: gRPC, gRPC-web and REST at {api}");
        if let Some(page) = &self.page {
            let _ = writeln!(head, "the live page: {page}");
        }
        for hint in &self.hints {
            let _ = writeln!(head, "{hint}");
        }
        let _ = writeln!(
            head,
            "try:\n  curl -s {api}/api/v1/challenge\n  curl -s {api}/api/v1/instance -d '{{\"challengeId\":\"web\",\"sourceId\":\"me\"}}'\n  \
             curl -s -X DELETE {api}/api/v1/instance/web/me\n  grpcurl -plaintext {authority} list\n  \
             grpcurl -plaintext -d '{{\"challenge_id\":\"web\",\"source_id\":\"me\"}}' {authority} api.v1.instance.InstanceManager/CreateInstance",
        );
        head
    }
}

fn width() -> usize {
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(120, |size| usize::from(size.ws_col)).clamp(60, 160)
}
