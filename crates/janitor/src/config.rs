//! Flags and environment.

use std::{num::NonZeroUsize, time::Duration};

use clap::Parser;
use gauntlet_client::{Credentials, ServerAddress};
use gauntlet_startup::duration;
use gauntlet_telemetry::log_level;

/// An alias, because clap treats a field of type `Option` as optional and would not pass an empty value to the parser.
type Interval = Option<Duration>;

/// Deletes expired instances through the API of a manager.
///
/// By default it sweeps once and exits, which suits a CronJob. With --every it keeps running and sweeps periodically.
///
/// Exit codes: 0 if the sweep succeeded, even if some deletions failed (the next sweep tries them again); 1 if something failed and nothing
/// was deleted; 64 if a flag or variable is wrong. OpenTelemetry is configured by the standard OTEL_* variables.
#[derive(Debug, Clone, Parser)]
#[command(name = "gauntlet-janitor", version, about, long_about)]
pub struct Config {
    /// The address of the manager's API: host:port, http://host:port or https://host.
    #[arg(long, env = "URL", default_value = "localhost:8080", value_name = "URL")]
    pub url: ServerAddress,
    /// What the janitor shows to the manager. A token needs the scope operate.
    #[command(flatten, next_help_heading = "Credentials")]
    pub credentials: Credentials,
    /// Keep running and sweep at this interval, such as 30s or 1m30s; empty sweeps once.
    #[arg(long, env = "TICKER", visible_alias = "ticker", default_value = "", hide_default_value = true, value_parser = interval, value_name = "DURATION")]
    pub every: Interval,
    /// The number of deletions that run at once.
    #[arg(long, default_value = "4", value_name = "COUNT")]
    pub concurrency: NonZeroUsize,
    /// The deadline of each call.
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub timeout: Duration,
    /// Use the v1 API alone: read all instances, instead of asking the server for the expired ones (gauntlet.v1).
    #[arg(long)]
    pub v1_only: bool,
    /// The log level: error, warn, info, debug, trace or off, or a list such as info,gauntlet_janitor=debug.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = log_level, value_name = "LEVEL")]
    pub log_level: String,
}

impl Config {
    /// Returns the defaults for the API at `url`: one sweep, four deletions at once, 30 seconds for each call.
    #[must_use]
    pub fn new(url: ServerAddress) -> Self {
        Self {
            url,
            credentials: Credentials::default(),
            every: None,
            concurrency: NonZeroUsize::MIN.saturating_add(3),
            timeout: Duration::from_secs(30),
            v1_only: false,
            log_level: "info".into(),
        }
    }
}

fn interval(text: &str) -> Result<Interval, String> {
    if text.is_empty() { Ok(None) } else { duration(text).map(Some) }
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
    fn empty_interval_sweeps_once() {
        assert_eq!(parse(&[]).unwrap().every, None);
        assert_eq!(parse(&["--every", ""]).unwrap().every, None);
        assert_eq!(parse(&["--every", "30s"]).unwrap().every, Some(Duration::from_secs(30)));
        assert_eq!(parse(&["--ticker", "1m30s"]).unwrap().every, Some(Duration::from_secs(90)));
    }

    #[test]
    fn flags_and_new_have_the_same_defaults() {
        let parsed = parse(&[]).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::new("localhost:8080".parse().unwrap())));
    }

    #[test]
    fn invalid_value_names_its_flag_and_the_expected_form() {
        for (arguments, part) in [
            (["--every", "soon"], "expected a duration above zero such as 30s or 1m30s; got \"soon\""),
            (["--url", "localhost"], "localhost:8080"),
            (["--concurrency", "0"], "'0'"),
            (["--timeout", "0s"], "got \"0s\""),
            (["--log-level", "loud"], "got \"loud\""),
        ] {
            let text = parse(&arguments).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains(arguments[0]), "{text}");
        }
    }

    #[test]
    fn help_text() {
        insta::assert_snapshot!(
            Config::command().term_width(100).mut_args(|arg| arg.hide_env_values(true)).render_long_help().to_string()
        );
    }
}
