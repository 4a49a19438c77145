//! Flags and environment, checked before anything starts.

use std::{num::NonZeroUsize, time::Duration};

use clap::Parser;
use gauntlet_client::ServerAddress;
use gauntlet_startup::duration;
use tracing::level_filters::LevelFilter;

/// Not `Option` by name, so that clap hands the parser an empty text too.
type Every = Option<Duration>;

/// Deletes expired instances through the API of a manager.
///
/// It sweeps once and ends, which suits a CronJob; with --every it stays and sweeps on that beat. It exits with 0 when it did what there was to
/// do, also when some deletions failed: the next run tries them again. It exits with 1 when something failed and nothing was
/// deleted, with 64 on a wrong flag or variable. OpenTelemetry is configured by the standard OTEL_* environment.
#[derive(Debug, Clone, Parser)]
#[command(name = "gauntlet-janitor", version, about, long_about)]
pub struct Config {
    /// The manager's API, as host:port, http://host:port or https://host.
    #[arg(long, env = "URL", default_value = "localhost:8080", value_name = "URL")]
    pub url: ServerAddress,
    /// Stay, and sweep this often, such as 30s or 1m30s; empty sweeps once.
    #[arg(long, env = "TICKER", visible_alias = "ticker", default_value = "", hide_default_value = true, value_parser = every, value_name = "DURATION")]
    pub every: Every,
    /// How many deletions run at once.
    #[arg(long, default_value = "4", value_name = "COUNT")]
    pub concurrency: NonZeroUsize,
    /// How long a call may take.
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub timeout: Duration,
    /// Never ask for the list of what has expired (gauntlet.v1), which other servers of the v1 API lack: read all instances.
    #[arg(long)]
    pub v1_only: bool,
    /// What to log: error, warn, info, debug or trace, or a list such as info,gauntlet_janitor=debug.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = log_level, value_name = "LEVEL")]
    pub log_level: String,
}

impl Config {
    /// The defaults, for the API at `url`: one sweep, four deletions at once, 30 s a call.
    #[must_use]
    pub fn new(url: ServerAddress) -> Self {
        Self {
            url,
            every: None,
            concurrency: NonZeroUsize::MIN.saturating_add(3),
            timeout: Duration::from_secs(30),
            v1_only: false,
            log_level: "info".into(),
        }
    }
}

fn every(text: &str) -> Result<Every, String> {
    if text.is_empty() { Ok(None) } else { duration(text).map(Some) }
}

fn log_level(text: &str) -> Result<String, String> {
    let is_level = |level: &str| level.parse::<LevelFilter>().is_ok();
    let is_directive = |directive: &str| match directive.rsplit_once('=') {
        Some((target, level)) => !target.is_empty() && is_level(level),
        None => is_level(directive),
    };
    if text.split(',').all(is_directive) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "expected error, warn, info, debug or trace, or a list such as info,gauntlet_janitor=debug; got {text:?}"
        ))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, clap::Error> {
        Config::try_parse_from(std::iter::once("gauntlet-janitor").chain(arguments.iter().copied()))
    }

    #[test]
    fn one_sweep_unless_a_beat_is_given() {
        assert_eq!(parse(&[]).unwrap().every, None);
        assert_eq!(parse(&["--every", ""]).unwrap().every, None);
        assert_eq!(parse(&["--every", "30s"]).unwrap().every, Some(Duration::from_secs(30)));
        assert_eq!(parse(&["--ticker", "1m30s"]).unwrap().every, Some(Duration::from_secs(90)));
    }

    #[test]
    fn the_defaults_are_one() {
        let parsed = parse(&[]).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::new("localhost:8080".parse().unwrap())));
    }

    #[test]
    fn wrong_values_name_themselves_and_the_fix() {
        for (arguments, part) in [
            (["--every", "soon"], "expected a duration above zero such as 30s or 1m30s; got \"soon\""),
            (["--url", "localhost"], "localhost:8080"),
            (["--concurrency", "0"], "\'0\'"),
            (["--timeout", "0s"], "got \"0s\""),
            (["--log-level", "loud"], "got \"loud\""),
        ] {
            let text = parse(&arguments).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains(arguments[0]), "{text}");
        }
    }

    #[test]
    fn help() {
        insta::assert_snapshot!(
            Config::command().term_width(100).mut_args(|arg| arg.hide_env_values(true)).render_long_help().to_string()
        );
    }
}
