//! The janitor: one sweep, or sweeps on a beat until it is told to stop.

use std::time::Duration;

use gauntlet_client::TlsError;
use gauntlet_telemetry::Instruments;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    sweep::{Summary, Sweep, Sweeper, said},
};

const AGENT: &str = concat!("gauntlet-janitor/", env!("CARGO_PKG_VERSION"));

/// How soon the first try follows when not everything could be read; it doubles, and never exceeds the beat.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Why the janitor could do nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// TLS cannot be set up, whatever the server.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Not everything could be read, and nothing that was read before the failure was deleted.
    #[error("what has expired on {server} could not be read: {reason}")]
    Unreadable {
        /// The server.
        server: String,
        /// Why not.
        reason: String,
    },
    /// Something had expired, and every deletion failed.
    #[error("none of {failed} expired instances could be deleted; the first: {reason}")]
    NothingDeleted {
        /// How many failed.
        failed: u64,
        /// Why the first did.
        reason: String,
    },
}

/// Runs the janitor against `config.url`: one sweep, or with `config.every` a sweep at once and then one on each beat, until
/// `stop` is cancelled. A beat that comes while a sweep is on is skipped, so sweeps never overlap.
///
/// The answer sums up all sweeps. When `stop` is cancelled no deletion begins and those under way get
/// [`FINISH_WITHIN`](crate::FINISH_WITHIN) to end. Dropping the future cancels the calls under way; each instance is then
/// either deleted or left for a later sweep.
///
/// `config.log_level` is for whoever starts telemetry.
///
/// # Errors
/// A single sweep fails when something went wrong and nothing was brought to its end: see [`Error`]. With `config.every`
/// failures are logged and the janitor goes on; it then fails only where there cannot be a connection at all. While what
/// has expired cannot be read it tries again after about 1 s, 2 s, 4 s and so on, up to the beat, with jitter.
pub async fn run(config: &Config, instruments: &Instruments, stop: CancellationToken) -> Result<Summary, Error> {
    let channel = config.url.channel(AGENT, instruments)?;
    let mut sweeper =
        Sweeper::new(channel, instruments.janitor.clone(), config.concurrency.get(), config.timeout, config.v1_only);
    let Some(every) = config.every else {
        let sweep = sweeper.sweep(&stop).await;
        if let Some(error) = futile(config, &sweep) {
            return Err(error);
        }
        report(&sweep.summary);
        return Ok(sweep.summary);
    };

    tracing::info!(server = %config.url, "Sweeping every {every:?}");
    let mut total = Summary::default();
    let mut beat = Instant::now();
    let mut failures = 0;
    while !stop.is_cancelled() {
        let sweep = sweeper.sweep(&stop).await;
        total.add(sweep.summary);
        if sweep.summary.expired > 0 {
            report(&sweep.summary);
        }
        let pause = if sweep.unread.is_some() {
            failures += 1;
            backoff(failures, every, rand::random())
        } else {
            failures = 0;
            beat = next_beat(beat, every, Instant::now());
            beat.saturating_duration_since(Instant::now())
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
    tracing::info!(deleted = total.deleted, failed = total.failed, "Stopped");
    Ok(total)
}

fn report(summary: &Summary) {
    let Summary { seen, expired, deleted, gone, renewed, failed } = *summary;
    tracing::info!(seen, expired, deleted, gone, renewed, failed, left = summary.left(), "Swept");
}

/// The error of a sweep that did nothing because something failed.
fn futile(config: &Config, sweep: &Sweep) -> Option<Error> {
    if sweep.summary.did_something() {
        return None;
    }
    if let Some(status) = &sweep.unread {
        return Some(Error::Unreadable { server: config.url.to_string(), reason: said(status) });
    }
    let first = sweep.first_failure.as_ref()?;
    Some(Error::NothingDeleted { failed: sweep.summary.failed, reason: said(first) })
}

/// The first beat after `now`, on the beats that count from `last`.
fn next_beat(last: Instant, every: Duration, now: Instant) -> Instant {
    let since = now.saturating_duration_since(last);
    let into = since.as_nanos().checked_rem(every.as_nanos()).and_then(|nanos| u64::try_from(nanos).ok());
    now + every.saturating_sub(Duration::from_nanos(into.unwrap_or_default()))
}

/// How long to wait after so many failures in a row: between half of the doubled time and all of it, as `chance` in 0 to 1 says.
fn backoff(failures: u32, every: Duration, chance: f64) -> Duration {
    let whole =
        FIRST_RETRY.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(every);
    whole.mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn retries_double_up_to_the_beat() {
        let whole: Vec<_> = (1..=6).map(|failures| backoff(failures, Duration::from_secs(10), 1.0).as_secs()).collect();
        assert_eq!(whole, [1, 2, 4, 8, 10, 10]);
        assert_eq!(backoff(3, Duration::from_secs(10), 0.0), Duration::from_secs(2));
        assert_eq!(backoff(u32::MAX, Duration::MAX, 0.0), backoff(33, Duration::MAX, 0.0));
    }

    proptest! {
        #[test]
        fn the_next_beat_is_the_first_to_come(every in 1_u64..100_000_000_000, since in 0_u64..10_000_000_000_000) {
            let last = Instant::now();
            let now = last + Duration::from_nanos(since);
            let next = next_beat(last, Duration::from_nanos(every), now);
            prop_assert!(next > now && next <= now + Duration::from_nanos(every));
            prop_assert_eq!((next - last).as_nanos() % u128::from(every), 0);
        }

        #[test]
        fn a_retry_never_waits_longer_than_the_beat(failures in 0_u32.., every in 1_u64..1_000_000, chance in 0.0..1.0) {
            let every = Duration::from_millis(every);
            let pause = backoff(failures, every, chance);
            prop_assert!(pause <= every && !pause.is_zero());
        }
    }
}
