//! The janitor: one sweep, or periodic sweeps until it is stopped.

use std::time::Duration;

use gauntlet_client::ChannelError;
use gauntlet_telemetry::Instruments;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    sweep::{Summary, Sweep, Sweeper, describe},
};

const USER_AGENT: &str = concat!("gauntlet-janitor/", env!("CARGO_PKG_VERSION"));

/// The delay before the first retry after a sweep that could not read everything. It doubles with each failure, up to the interval.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Why the janitor failed without deleting anything.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The credentials or TLS cannot be used, whatever the server answers.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Reading failed, and none of the instances read before the failure was deleted.
    #[error("cannot read the expired instances from {server}: {reason}")]
    Unreadable {
        /// The server.
        server: String,
        /// The error, with its code.
        reason: String,
    },
    /// Every deletion failed.
    #[error("cannot delete any of the {failed} expired instances; first error: {reason}")]
    NothingDeleted {
        /// The number of failed deletions.
        failed: u64,
        /// The first error, with its code.
        reason: String,
    },
}

/// Runs the janitor against `config.url` and returns the sum of all sweeps.
///
/// Without `config.every` it sweeps once. With it, it sweeps at once and then at every multiple of the interval, until `stop` is cancelled.
/// A time that passes while a sweep is running is skipped, so sweeps never overlap. When reading fails, the next sweep follows after about
/// 1 s, then 2 s, 4 s and so on up to the interval, with jitter.
///
/// When `stop` is cancelled, no further deletion begins, and those under way have [`FINISH_TIMEOUT`](crate::FINISH_TIMEOUT) to end.
///
/// `config.log_level` is not used here: it is for the caller, who starts telemetry.
///
/// # Errors
/// A single sweep fails when something went wrong and nothing was deleted: see [`Error`]. With `config.every`, failures are logged and the
/// janitor keeps running; it fails only when the credentials or TLS cannot be used.
///
/// # Cancel safety
/// Dropping the future cancels the calls under way. Each of their instances is then either deleted or left for a later sweep.
pub async fn run(config: &Config, instruments: &Instruments, stop: CancellationToken) -> Result<Summary, Error> {
    let channel = config.url.channel(&config.credentials, USER_AGENT, instruments)?;
    let mut sweeper =
        Sweeper::new(channel, instruments.janitor.clone(), config.concurrency.get(), config.timeout, config.v1_only);
    let Some(every) = config.every else {
        let sweep = sweeper.sweep(&stop).await;
        if let Some(error) = fatal_error(config, &sweep) {
            return Err(error);
        }
        log_summary(&sweep.summary);
        return Ok(sweep.summary);
    };

    tracing::info!(server = %config.url, "Sweeping every {every:?}");
    let mut total = Summary::default();
    let mut scheduled = Instant::now();
    let mut failures = 0;
    while !stop.is_cancelled() {
        let sweep = sweeper.sweep(&stop).await;
        total.add(sweep.summary);
        if sweep.summary.expired > 0 {
            log_summary(&sweep.summary);
        }
        let pause = if sweep.read_error.is_some() {
            failures += 1;
            backoff(failures, every, rand::random())
        } else {
            failures = 0;
            scheduled = next_time(scheduled, every, Instant::now());
            scheduled.saturating_duration_since(Instant::now())
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
    tracing::info!(deleted = total.deleted, failed = total.failed, "Stopped");
    Ok(total)
}

fn log_summary(summary: &Summary) {
    let Summary { seen, expired, deleted, gone, renewed, failed } = *summary;
    tracing::info!(seen, expired, deleted, gone, renewed, failed, left = summary.left(), "Swept");
}

/// Returns the error of a sweep that deleted nothing because something failed.
fn fatal_error(config: &Config, sweep: &Sweep) -> Option<Error> {
    if sweep.summary.made_progress() {
        return None;
    }
    if let Some(status) = &sweep.read_error {
        return Some(Error::Unreadable { server: config.url.to_string(), reason: describe(status) });
    }
    let first = sweep.first_failure.as_ref()?;
    Some(Error::NothingDeleted { failed: sweep.summary.failed, reason: describe(first) })
}

/// Returns the first time after `now` that is a multiple of `every` after `last`.
fn next_time(last: Instant, every: Duration, now: Instant) -> Instant {
    let since = now.saturating_duration_since(last);
    let into = since.as_nanos().checked_rem(every.as_nanos()).and_then(|nanos| u64::try_from(nanos).ok());
    now + every.saturating_sub(Duration::from_nanos(into.unwrap_or_default()))
}

/// Returns the delay before the next sweep after `failures` failures in a row. `jitter`, from 0 to 1, picks a value between half of the
/// exponential delay and all of it.
fn backoff(failures: u32, every: Duration, jitter: f64) -> Duration {
    let delay =
        FIRST_RETRY.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(every);
    delay.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn retry_delay_doubles_up_to_the_interval() {
        let delays: Vec<_> =
            (1..=6).map(|failures| backoff(failures, Duration::from_secs(10), 1.0).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 10, 10]);
        assert_eq!(backoff(3, Duration::from_secs(10), 0.0), Duration::from_secs(2));
        assert_eq!(backoff(u32::MAX, Duration::MAX, 0.0), backoff(33, Duration::MAX, 0.0));
    }

    proptest! {
        #[test]
        fn next_time_is_the_first_multiple_after_now(every in 1_u64..100_000_000_000, since in 0_u64..10_000_000_000_000) {
            let last = Instant::now();
            let now = last + Duration::from_nanos(since);
            let next = next_time(last, Duration::from_nanos(every), now);
            prop_assert!(next > now && next <= now + Duration::from_nanos(every));
            prop_assert_eq!((next - last).as_nanos() % u128::from(every), 0);
        }

        #[test]
        fn retry_delay_never_exceeds_the_interval(failures in 0_u32.., every in 1_u64..1_000_000, jitter in 0.0..1.0) {
            let every = Duration::from_millis(every);
            let pause = backoff(failures, every, jitter);
            prop_assert!(pause <= every && !pause.is_zero());
        }
    }
}
