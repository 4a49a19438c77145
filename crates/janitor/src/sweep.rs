//! One sweep: reads the expired instances and deletes them.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use gauntlet_api::{
    error::reason,
    extension::{DeleteExpiredRequest, ExpiredInstance, ListExpiredRequest, sweeper_client::SweeperClient},
    v1::{
        challenge::{Challenge, challenge_store_client::ChallengeStoreClient},
        instance::{DeleteInstanceRequest, RetrieveInstanceRequest, instance_manager_client::InstanceManagerClient},
    },
};
use gauntlet_client::{Channel, call_with_deadline, challenge_store};
use gauntlet_telemetry::layers::code_name;
use gauntlet_telemetry::{context, instruments, names};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{Instrument as _, Span, field::Empty};

/// How long deletions under way may take to end once the janitor is stopped. Together with the rest of its shutdown this is less than the
/// 10 seconds that Docker allows. The manager finishes deletions that take longer.
pub const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to try `ListExpired` again on a server that lacked it: a newer server may replace it without breaking the connection.
const RECHECK_INTERVAL: Duration = Duration::from_secs(300);

/// The outcome of one sweep or of many, in numbers of instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Read from the API: the expired ones if the server lists them, otherwise all.
    pub seen: u64,
    /// Expired when they were read.
    pub expired: u64,
    /// Deleted.
    pub deleted: u64,
    /// Deleted by somebody else in the meantime.
    pub gone: u64,
    /// Renewed, or created again, in the meantime. They were left alone.
    pub renewed: u64,
    /// Not deleted because a call failed.
    pub failed: u64,
}

impl Summary {
    /// Returns the number of expired instances that were left for the next sweep because the janitor was stopped.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.expired.saturating_sub(self.deleted + self.gone + self.renewed + self.failed)
    }

    /// Whether at least one expired instance needs no further work.
    pub(crate) fn made_progress(&self) -> bool {
        self.deleted + self.gone + self.renewed > 0
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.seen += other.seen;
        self.expired += other.expired;
        self.deleted += other.deleted;
        self.gone += other.gone;
        self.renewed += other.renewed;
        self.failed += other.failed;
    }

    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Deleted => self.deleted += 1,
            Outcome::Gone => self.gone += 1,
            Outcome::Renewed => self.renewed += 1,
            Outcome::TimedOut | Outcome::Unavailable | Outcome::Refused => self.failed += 1,
        }
    }
}

/// The result of one sweep.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    pub(crate) summary: Summary,
    /// The error that ended reading early. Instances read before it are in the summary.
    pub(crate) read_error: Option<Status>,
    /// The error of the first deletion that failed.
    pub(crate) first_failure: Option<Status>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Deleted,
    Gone,
    Renewed,
    TimedOut,
    Unavailable,
    Refused,
}

impl Outcome {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Deleted => "ok",
            Self::Gone => "gone",
            Self::Renewed => "renewed",
            Self::TimedOut => "timeout",
            Self::Unavailable => "unavailable",
            Self::Refused => "error",
        }
    }

    fn of_failure(code: Code) -> Self {
        match code {
            Code::DeadlineExceeded => Self::TimedOut,
            Code::Unavailable => Self::Unavailable,
            _ => Self::Refused,
        }
    }
}

/// An expired instance.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Expired {
    challenge: String,
    source: String,
    /// When the instance was created or claimed, by the server. Distinguishes it from a later instance of the same source.
    since: Option<prost_types::Timestamp>,
    /// When the instance expired.
    until: Timestamp,
    /// The end of its challenge, if the instance's own `until` does not include that.
    challenge_until: Option<Timestamp>,
    /// Whether it was listed by `gauntlet.v1`, which can also delete it.
    listed: bool,
}

impl Expired {
    /// Returns `None` if the message has no valid end, which an expired instance always has.
    fn from_listed(listed: ExpiredInstance) -> Option<Self> {
        let ExpiredInstance { challenge_id, source_id, until, since } = listed;
        Some(Self {
            challenge: challenge_id,
            source: source_id,
            since,
            until: time(until)?,
            challenge_until: None,
            listed: true,
        })
    }
}

/// Whether the server has `ListExpired`, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListSupport {
    /// It had it at the last call, or has not been called yet.
    Assumed,
    /// It lacked it at this time.
    MissingSince(Instant),
    /// Not to be used (`--v1-only`).
    Disabled,
}

impl ListSupport {
    fn should_try(self, recheck_interval: Duration) -> bool {
        match self {
            Self::Assumed => true,
            Self::MissingSince(time) => time.elapsed() >= recheck_interval,
            Self::Disabled => false,
        }
    }
}

/// Sweeps through one channel.
#[derive(Clone, Debug)]
pub(crate) struct Sweeper {
    sweeper: SweeperClient<Channel>,
    list_support: ListSupport,
    challenges: ChallengeStoreClient<Channel>,
    instances: InstanceManagerClient<Channel>,
    instruments: instruments::Janitor,
    concurrency: usize,
    timeout: Duration,
    recheck_interval: Duration,
}

impl Sweeper {
    pub(crate) fn new(
        channel: Channel,
        instruments: instruments::Janitor,
        concurrency: usize,
        timeout: Duration,
        v1_only: bool,
    ) -> Self {
        Self {
            sweeper: SweeperClient::new(channel.clone()),
            list_support: if v1_only { ListSupport::Disabled } else { ListSupport::Assumed },
            challenges: challenge_store(channel.clone()),
            instances: InstanceManagerClient::new(channel),
            instruments,
            concurrency,
            timeout,
            recheck_interval: RECHECK_INTERVAL,
        }
    }

    /// Sweeps once. When `stop` is cancelled, reading ends, no further deletion begins, and those under way have [`FINISH_TIMEOUT`] to end.
    pub(crate) async fn sweep(&mut self, stop: &CancellationToken) -> Sweep {
        let span = tracing::info_span!(
            parent: None,
            names::JANITOR_SWEEP.name,
            janitor.scanned = Empty,
            janitor.expired = Empty,
            janitor.deleted = Empty,
            janitor.failed = Empty,
            outcome = Empty,
            error.type = Empty,
        );
        async {
            let sweep = self.read_and_delete(stop).await;
            let Summary { seen, expired, deleted, failed, .. } = sweep.summary;
            let span = Span::current();
            span.record("janitor.scanned", seen);
            span.record("janitor.expired", expired);
            span.record("janitor.deleted", deleted);
            span.record("janitor.failed", failed);
            let outcome = match &sweep {
                Sweep { read_error: Some(status), .. } => {
                    tracing::warn!(read = seen, "Reading the expired instances failed: {}", describe(status));
                    span.record("error.type", error_type(status));
                    context::fail_span("reading the expired instances failed");
                    "unread"
                }
                _ if failed > 0 => {
                    context::fail_span(format!("{failed} of {expired} deletions failed"));
                    "partial"
                }
                _ if sweep.summary.left() > 0 => "stopped",
                _ => "ok",
            };
            span.record("outcome", outcome);
            sweep
        }
        .instrument(span)
        .await
    }

    async fn read_and_delete(&mut self, stop: &CancellationToken) -> Sweep {
        let mut sweep = Sweep::default();
        let mut found = Vec::new();
        tokio::select! {
            read = self.read(&mut sweep.summary.seen, &mut found) => sweep.read_error = read.err(),
            () = stop.cancelled() => {}
        }
        // The longest overdue is deleted first.
        found.sort_by_key(|expired| expired.until);
        sweep.summary.expired = u64::try_from(found.len()).unwrap_or(u64::MAX);

        let mut deletions = pin!(
            stream::iter(found)
                .take_until(stop.cancelled())
                .map(|expired| self.delete_observed(expired))
                .buffer_unordered(self.concurrency)
        );
        let mut finish_timeout = pin!(async {
            stop.cancelled().await;
            tokio::time::sleep(FINISH_TIMEOUT).await;
        });
        loop {
            tokio::select! {
                deleted = deletions.next() => match deleted {
                    Some(Ok(outcome)) => sweep.summary.count(outcome),
                    Some(Err(status)) => {
                        sweep.summary.count(Outcome::of_failure(status.code()));
                        sweep.first_failure.get_or_insert(status);
                    }
                    None => return sweep,
                },
                () = &mut finish_timeout => return sweep,
            }
        }
    }

    /// Reads the expired instances into `found`: from the server's list of them if it has one, otherwise from all instances. When reading
    /// fails, the instances read before stay in `found`.
    async fn read(&mut self, seen: &mut u64, found: &mut Vec<Expired>) -> Result<(), Status> {
        if self.list_support.should_try(self.recheck_interval) {
            match self.list(seen, found).await {
                Err(status) if status.code() == Code::Unimplemented => {
                    tracing::debug!("The server does not list expired instances: reading all instances");
                    self.list_support = ListSupport::MissingSince(Instant::now());
                }
                read => {
                    self.list_support = ListSupport::Assumed;
                    return read;
                }
            }
        }
        let read = self.query(seen, found).await;
        // When the server is back, it may be another version.
        if self.list_support != ListSupport::Disabled
            && read.as_ref().is_err_and(|status| status.code() == Code::Unavailable)
        {
            self.list_support = ListSupport::Assumed;
        }
        read
    }

    async fn list(&self, seen: &mut u64, found: &mut Vec<Expired>) -> Result<(), Status> {
        let mut client = self.sweeper.clone();
        call_with_deadline(self.timeout, ListExpiredRequest::default(), async |request| {
            let mut answers = client.list_expired(request).await?.into_inner();
            while let Some(listed) = answers.message().await? {
                *seen += 1;
                found.extend(Expired::from_listed(listed));
            }
            Ok(())
        })
        .await
    }

    async fn query(&self, seen: &mut u64, found: &mut Vec<Expired>) -> Result<(), Status> {
        let mut client = self.challenges.clone();
        call_with_deadline(self.timeout, (), async |request| {
            let mut answers = client.query_challenge(request).await?.into_inner();
            while let Some(challenge) = answers.message().await? {
                *seen += u64::try_from(challenge.instances.len()).unwrap_or(u64::MAX);
                found.extend(expired(challenge, Timestamp::now()));
            }
            Ok(())
        })
        .await
    }

    /// Deletes one expired instance, with its span, metric and log.
    async fn delete_observed(&self, expired: Expired) -> Result<Outcome, Status> {
        let span = tracing::info_span!(
            names::JANITOR_EXPIRE.name,
            challenge.id = expired.challenge,
            source.id = expired.source,
            outcome = Empty,
            error.type = Empty,
        );
        async {
            let result = self.delete(&expired).await;
            let outcome = match &result {
                Ok(outcome) => *outcome,
                Err(status) => {
                    Span::current().record("error.type", error_type(status));
                    context::fail_span(status.message().to_owned());
                    tracing::warn!(
                        challenge.id = expired.challenge,
                        source.id = expired.source,
                        "Deleting an expired instance failed, the next sweep tries again: {}",
                        describe(status),
                    );
                    Outcome::of_failure(status.code())
                }
            };
            Span::current().record("outcome", outcome.as_str());
            let lag = Duration::try_from(Timestamp::now().duration_since(expired.until)).unwrap_or_default();
            self.instruments.record_expiry(outcome.as_str(), lag);
            result
        }
        .instrument(span)
        .await
    }

    /// Deletes the instance, unless it was renewed or replaced since it was read.
    async fn delete(&self, expired: &Expired) -> Result<Outcome, Status> {
        let result = match expired.since {
            Some(since) if expired.listed => match self.delete_listed(expired, since).await {
                // An older manager answered, behind the same address as the one that listed the instance.
                Err(status) if status.code() == Code::Unimplemented => self.delete_read(expired).await,
                result => result,
            },
            _ => self.delete_read(expired).await,
        };
        match result {
            Err(status) if status.code() == Code::NotFound => Ok(Outcome::Gone),
            result => result,
        }
    }

    /// Deletes by `gauntlet.v1`: the server checks in one transaction whether the instance is still the one that expired.
    async fn delete_listed(&self, expired: &Expired, since: prost_types::Timestamp) -> Result<Outcome, Status> {
        let mut client = self.sweeper.clone();
        let request = DeleteExpiredRequest {
            challenge_id: expired.challenge.clone(),
            source_id: expired.source.clone(),
            since: Some(since),
        };
        let answer =
            call_with_deadline(self.timeout, request, async |request| client.delete_expired(request).await).await?;
        Ok(if answer.get_ref().deleted { Outcome::Deleted } else { Outcome::Renewed })
    }

    /// Deletes by v1, which deletes whatever instance the source has. The best that can be done is to read it again just before.
    async fn delete_read(&self, expired: &Expired) -> Result<Outcome, Status> {
        let (challenge_id, source_id) = (expired.challenge.clone(), expired.source.clone());
        let mut client = self.instances.clone();
        let request = RetrieveInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
        let answer =
            call_with_deadline(self.timeout, request, async |request| client.retrieve_instance(request).await).await?;
        let (since, until) = (answer.get_ref().since, earliest(time(answer.get_ref().until), expired.challenge_until));
        // The server's clock, by which the instance was listed, may be ahead of this one.
        let now = Timestamp::now().max(expired.until);
        if since != expired.since || until.is_none_or(|until| until > now) {
            return Ok(Outcome::Renewed);
        }
        let request = DeleteInstanceRequest { challenge_id, source_id };
        call_with_deadline(self.timeout, request, async |request| client.delete_instance(request).await).await?;
        Ok(Outcome::Deleted)
    }
}

/// Returns the instances of `challenge` whose end, or whose challenge's end, is not after `now`.
fn expired(challenge: Challenge, now: Timestamp) -> impl Iterator<Item = Expired> {
    let challenge_until = time(challenge.until);
    challenge.instances.into_iter().filter_map(move |instance| {
        let until = earliest(time(instance.until), challenge_until).filter(|until| *until <= now)?;
        Some(Expired {
            challenge: instance.challenge_id,
            source: instance.source_id,
            since: instance.since,
            until,
            challenge_until,
            listed: false,
        })
    })
}

fn earliest(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    one.into_iter().chain(other).min()
}

/// Returns `None` for a time that is unset or out of range.
fn time(timestamp: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    timestamp.and_then(|timestamp| Timestamp::new(timestamp.seconds, timestamp.nanos).ok())
}

/// Returns the reason of the v1 contract, or the code if the status has none.
fn error_type(status: &Status) -> String {
    reason(status).unwrap_or_else(|| code_name(status.code()).to_owned())
}

/// Returns the message and the error type.
pub(crate) fn describe(status: &Status) -> String {
    format!("{} ({})", status.message(), error_type(status))
}

#[cfg(test)]
mod tests;
