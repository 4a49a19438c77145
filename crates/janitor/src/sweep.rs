//! One sweep: read what has expired, delete it.

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

/// How long deletions under way may go on once the janitor is told to stop: with the rest of its shutdown less than the 10 s that Docker
/// gives. The manager finishes those that take longer.
pub const FINISH_WITHIN: Duration = Duration::from_secs(5);

/// A server that lacks `ListExpired` may be replaced by one that has it, without a connection lost: it is asked again this often.
const ASK_AGAIN: Duration = Duration::from_secs(300);

/// What a sweep, or all sweeps of a service, came to, in instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Read from the API: all there are, or what has expired where the server lists that.
    pub seen: u64,
    /// Past their end when they were read.
    pub expired: u64,
    /// Deleted.
    pub deleted: u64,
    /// Deleted by somebody else meanwhile.
    pub gone: u64,
    /// Given more time, or begun anew, meanwhile; left alone.
    pub renewed: u64,
    /// Not deleted because the API, or the way to it, failed.
    pub failed: u64,
}

impl Summary {
    /// Expired ones that a stop left for the next sweep.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.expired.saturating_sub(self.deleted + self.gone + self.renewed + self.failed)
    }

    /// Whether something was brought to its end.
    pub(crate) fn did_something(&self) -> bool {
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

/// What a sweep came to, and what went wrong.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    pub(crate) summary: Summary,
    /// Why not everything could be read. What was read before counts.
    pub(crate) unread: Option<Status>,
    /// Why the first of the deletions that failed did.
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

/// An instance past its end.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Expired {
    challenge: String,
    source: String,
    /// When it was created or claimed, as the server says: tells it from one that is created later for the same source.
    since: Option<prost_types::Timestamp>,
    /// When it should have ended.
    until: Timestamp,
    /// The end that its challenge sets, where its own does not heed that.
    challenge_until: Option<Timestamp>,
    /// By `gauntlet.v1`, which also deletes.
    listed: bool,
}

impl Expired {
    /// None without an end that a clock can reach: nothing that has expired is without.
    fn listed(listed: ExpiredInstance) -> Option<Self> {
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

/// Whether a server has `ListExpired`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offered {
    /// It did, or was not asked.
    Perhaps,
    /// It did not, when it was asked then.
    NotAt(Instant),
    /// It is not to be asked.
    Never,
}

impl Offered {
    fn worth_asking(self, again: Duration) -> bool {
        match self {
            Self::Perhaps => true,
            Self::NotAt(asked) => asked.elapsed() >= again,
            Self::Never => false,
        }
    }
}

/// Sweeps through one channel.
#[derive(Clone, Debug)]
pub(crate) struct Sweeper {
    index: SweeperClient<Channel>,
    /// Whether `index` is served, as far as is known.
    offered: Offered,
    challenges: ChallengeStoreClient<Channel>,
    instances: InstanceManagerClient<Channel>,
    instruments: instruments::Janitor,
    concurrency: usize,
    timeout: Duration,
    ask_again: Duration,
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
            index: SweeperClient::new(channel.clone()),
            offered: if v1_only { Offered::Never } else { Offered::Perhaps },
            challenges: challenge_store(channel.clone()),
            instances: InstanceManagerClient::new(channel),
            instruments,
            concurrency,
            timeout,
            ask_again: ASK_AGAIN,
        }
    }

    /// Sweeps once. When `stop` is cancelled reading ends, no deletion begins, and those under way get [`FINISH_WITHIN`].
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
            let sweep = self.read_and_expire(stop).await;
            let Summary { seen, expired, deleted, failed, .. } = sweep.summary;
            let span = Span::current();
            span.record("janitor.scanned", seen);
            span.record("janitor.expired", expired);
            span.record("janitor.deleted", deleted);
            span.record("janitor.failed", failed);
            let outcome = match &sweep {
                Sweep { unread: Some(status), .. } => {
                    tracing::warn!(read = seen, "Not everything could be read: {}", said(status));
                    span.record("error.type", error_type(status));
                    context::fail_span("not everything could be read");
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

    async fn read_and_expire(&mut self, stop: &CancellationToken) -> Sweep {
        let mut sweep = Sweep::default();
        let mut found = Vec::new();
        tokio::select! {
            read = self.read(&mut sweep.summary.seen, &mut found) => sweep.unread = read.err(),
            () = stop.cancelled() => {}
        }
        // What is overdue longest goes first.
        found.sort_by_key(|expired| expired.until);
        sweep.summary.expired = u64::try_from(found.len()).unwrap_or(u64::MAX);

        let mut ends = pin!(
            stream::iter(found)
                .take_until(stop.cancelled())
                .map(|expired| self.expire(expired))
                .buffer_unordered(self.concurrency)
        );
        let mut too_late = pin!(async {
            stop.cancelled().await;
            tokio::time::sleep(FINISH_WITHIN).await;
        });
        loop {
            tokio::select! {
                end = ends.next() => match end {
                    Some(Ok(outcome)) => sweep.summary.count(outcome),
                    Some(Err(status)) => {
                        sweep.summary.count(Outcome::of_failure(status.code()));
                        sweep.first_failure.get_or_insert(status);
                    }
                    None => return sweep,
                },
                () = &mut too_late => return sweep,
            }
        }
    }

    /// Reads what has expired, by the server's list of it or, where there is none, from among all there is. What was read before a
    /// failure stays.
    async fn read(&mut self, seen: &mut u64, found: &mut Vec<Expired>) -> Result<(), Status> {
        if self.offered.worth_asking(self.ask_again) {
            match self.list(seen, found).await {
                Err(status) if status.code() == Code::Unimplemented => {
                    tracing::debug!("The server does not list what has expired: all is read");
                    self.offered = Offered::NotAt(Instant::now());
                }
                read => {
                    self.offered = Offered::Perhaps;
                    return read;
                }
            }
        }
        let read = self.query(seen, found).await;
        // Whoever answers when it is back may be another.
        if self.offered != Offered::Never && read.as_ref().is_err_and(|status| status.code() == Code::Unavailable) {
            self.offered = Offered::Perhaps;
        }
        read
    }

    async fn list(&self, seen: &mut u64, found: &mut Vec<Expired>) -> Result<(), Status> {
        let mut client = self.index.clone();
        call_with_deadline(self.timeout, ListExpiredRequest::default(), async |request| {
            let mut answers = client.list_expired(request).await?.into_inner();
            while let Some(listed) = answers.message().await? {
                *seen += 1;
                found.extend(Expired::listed(listed));
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

    /// Brings one expired instance to its end, and says so: span, metric, log.
    async fn expire(&self, expired: Expired) -> Result<Outcome, Status> {
        let span = tracing::info_span!(
            names::JANITOR_EXPIRE.name,
            challenge.id = expired.challenge,
            source.id = expired.source,
            outcome = Empty,
            error.type = Empty,
        );
        async {
            let result = self.end(&expired).await;
            let outcome = match &result {
                Ok(outcome) => *outcome,
                Err(status) => {
                    Span::current().record("error.type", error_type(status));
                    context::fail_span(status.message().to_owned());
                    tracing::warn!(
                        challenge.id = expired.challenge,
                        source.id = expired.source,
                        "An expired instance could not be deleted, the next sweep tries again: {}",
                        said(status),
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

    /// Deletes it, unless it is another by now or has been given more time.
    async fn end(&self, expired: &Expired) -> Result<Outcome, Status> {
        let ended = match expired.since {
            Some(since) if expired.listed => match self.end_listed(expired, since).await {
                // A manager of before, behind the same address as the one that listed it.
                Err(status) if status.code() == Code::Unimplemented => self.end_read(expired).await,
                ended => ended,
            },
            _ => self.end_read(expired).await,
        };
        match ended {
            Err(status) if status.code() == Code::NotFound => Ok(Outcome::Gone),
            ended => ended,
        }
    }

    /// The server decides in one transaction whether it is still the one that expired.
    async fn end_listed(&self, expired: &Expired, since: prost_types::Timestamp) -> Result<Outcome, Status> {
        let mut client = self.index.clone();
        let request = DeleteExpiredRequest {
            challenge_id: expired.challenge.clone(),
            source_id: expired.source.clone(),
            since: Some(since),
        };
        let answer =
            call_with_deadline(self.timeout, request, async |request| client.delete_expired(request).await).await?;
        Ok(if answer.get_ref().deleted { Outcome::Deleted } else { Outcome::Renewed })
    }

    /// v1 deletes whatever is there: all that can be done is to look just before.
    async fn end_read(&self, expired: &Expired) -> Result<Outcome, Status> {
        let (challenge_id, source_id) = (expired.challenge.clone(), expired.source.clone());
        let mut client = self.instances.clone();
        let request = RetrieveInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() };
        let answer =
            call_with_deadline(self.timeout, request, async |request| client.retrieve_instance(request).await).await?;
        let (since, until) = (answer.get_ref().since, earliest(time(answer.get_ref().until), expired.challenge_until));
        // The server's clock, by which it was listed, may be ahead of ours.
        let passed = Timestamp::now().max(expired.until);
        if since != expired.since || until.is_none_or(|until| until > passed) {
            return Ok(Outcome::Renewed);
        }
        let request = DeleteInstanceRequest { challenge_id, source_id };
        call_with_deadline(self.timeout, request, async |request| client.delete_instance(request).await).await?;
        Ok(Outcome::Deleted)
    }
}

/// The instances of `challenge` whose end, or whose challenge's end, is not after `now`.
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

/// None for what is unset, and for what no clock will reach.
fn time(timestamp: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    timestamp.and_then(|timestamp| Timestamp::new(timestamp.seconds, timestamp.nanos).ok())
}

/// What clients match on: the reason, or the code where there is none.
fn error_type(status: &Status) -> String {
    reason(status).unwrap_or_else(|| code_name(status.code()).to_owned())
}

/// An error for operators.
pub(crate) fn said(status: &Status) -> String {
    format!("{} ({})", status.message(), error_type(status))
}

#[cfg(test)]
mod tests;
