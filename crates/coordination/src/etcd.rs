//! The backend for many replicas: etcd.
//!
//! One client for each endpoint, and failover here: the client library does not fail over by itself. A call goes to the endpoint that answered
//! last. One that was surely not sent is tried on the next endpoint; so is a read. A write whose answer is missing is answered
//! [`KvError::Ambiguous`] and not sent again.

mod connections;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{
    Client, CompareOp, DeleteOptions, EventType, GetOptions, PutOptions, SortOrder, SortTarget, TxnOp, TxnOpResponse,
    WatchOptions, WatchStream,
};
use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::Error;
use gauntlet_telemetry::{
    db::{Database, Operation},
    layers::code_name,
};
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use self::connections::Connections;
use crate::kv::{
    Compare, Condition, Event, EventStream, Get, KeyRange, KeyValue, Kv, KvError, KvResult, LeaseId, Op, Page, Txn,
    TxnResponse, Watch,
};

/// The largest answer accepted, in bytes.
const LARGEST: usize = 64 * 1024 * 1024;
/// Keys listed at once before they are followed.
const LISTED: usize = 4096;
/// Pings on a connection in use, and how long one may go unanswered. A frozen server is told from a quiet one by this. etcd allows one
/// every five seconds.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How etcd is reached.
#[derive(Clone)]
pub struct EtcdConfig {
    /// Where: `http://host:port`, `https://host:port` or `host:port`; at least one. Members of one cluster. Without a scheme it is https if
    /// there are TLS files, and refused if there is a password and no such file.
    pub endpoints: Vec<String>,
    /// Who to log in as, if authentication is on.
    pub username: Option<String>,
    /// The password that goes with it. Not shown by `Debug`.
    pub password: Option<String>,
    /// TLS files. An `https` endpoint needs none if the system trusts who signed its certificate.
    pub tls: Option<EtcdTls>,
    /// What every key begins with.
    pub prefix: String,
    /// How long after a replica was last heard of what it owns counts as given up. etcd takes whole seconds and no less than two.
    pub lease_ttl: Duration,
    /// How long one call may take, over all endpoints tried.
    pub deadline: Duration,
}

/// TLS files, in PEM form. They are read again when they change: a certificate can be replaced while it is in use.
#[derive(Debug, Clone, Default)]
pub struct EtcdTls {
    /// The certificates of the authorities that sign the members' certificates; those of the system if there is none.
    pub ca: Option<PathBuf>,
    /// The client's certificate and its key, if members ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl EtcdConfig {
    /// Endpoints, with neither login nor TLS; leases of ten seconds and calls of five.
    pub fn new(endpoints: impl IntoIterator<Item = String>) -> Self {
        Self {
            endpoints: endpoints.into_iter().collect(),
            username: None,
            password: None,
            tls: None,
            prefix: crate::PREFIX.to_owned(),
            lease_ttl: Duration::from_secs(10),
            deadline: Duration::from_secs(5),
        }
    }
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "hidden"))
            .field("tls", &self.tls)
            .field("prefix", &self.prefix)
            .field("lease_ttl", &self.lease_ttl)
            .field("deadline", &self.deadline)
            .finish()
    }
}

/// An etcd cluster.
pub struct Etcd {
    connections: Connections,
    /// The endpoint that answered last.
    current: AtomicUsize,
    deadline: Duration,
    database: Database,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.connections.addresses()).finish()
    }
}

/// Why one call to one endpoint failed.
#[derive(Debug)]
enum Failure {
    Client(etcd_client::Error),
    Deadline,
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Self {
        Self::Client(error)
    }
}

/// What a failure says about the call.
enum Meaning {
    /// It did not reach the endpoint.
    NotSent,
    /// It may have been done.
    Unknown,
    /// It was refused.
    Refused(KvError),
}

impl Etcd {
    /// Checks the configuration and reads its files. Connects when first called, and again whenever it must.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming what is wrong with the configuration.
    pub fn new(config: &EtcdConfig, database: Database) -> Result<Self, Error> {
        Ok(Self {
            connections: Connections::new(config)?,
            current: AtomicUsize::new(0),
            deadline: config.deadline,
            database,
        })
    }

    /// Has the first call go to the endpoint of that number, counted round and round: replicas are not all to begin with the same one.
    pub(crate) fn start_at(&self, number: u64) {
        let all = u64::try_from(self.connections.len()).unwrap_or(u64::MAX).max(1);
        self.current.store(usize::try_from(number % all).unwrap_or(0), Ordering::Relaxed);
    }

    /// Makes a call; one that is `repeatable` is made again on another endpoint if its outcome is unknown.
    async fn call<T, F>(&self, operation: Operation, repeatable: bool, call: impl Fn(Client) -> F) -> KvResult<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let ends = Instant::now() + self.deadline;
        let first = self.current.load(Ordering::Relaxed);
        let all = self.connections.len();
        let mut last = KvError::Unavailable("no endpoint".to_owned());
        for (tried, at) in (first..first + all).map(|at| at % all).enumerate() {
            let address = self.connections.address(at);
            // What may be tried elsewhere must leave time for it.
            let left = ends.saturating_duration_since(Instant::now());
            let ends = if repeatable && tried + 1 < all { Instant::now() + left / 2 } else { ends };
            let attempt = async {
                let client = timeout_at(ends, self.connections.client(at)).await.map_err(|_| Failure::Deadline)??;
                timeout_at(ends, call(client)).await.map_err(|_| Failure::Deadline)?.map_err(Failure::from)
            };
            match self.database.call(operation, address, Failure::code, attempt).await {
                Ok(answer) => {
                    if tried > 0 {
                        self.current.store(at, Ordering::Relaxed);
                    }
                    return Ok(answer);
                }
                Err(failure) => {
                    let detail = format!("{address}: {failure}");
                    match failure.meaning() {
                        Meaning::Refused(error) => return Err(error),
                        Meaning::Unknown if !repeatable => {
                            self.current.store((at + 1) % all, Ordering::Relaxed);
                            return Err(KvError::Ambiguous(detail));
                        }
                        Meaning::Unknown | Meaning::NotSent => last = KvError::Unavailable(detail),
                    }
                }
            }
        }
        Err(last)
    }
}

fn invalid(field: &'static str, problem: String) -> Error {
    Error::Invalid { field, problem }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline => f.write_str("no answer in time"),
            Self::Client(etcd_client::Error::GRpcStatus(status)) => {
                write!(f, "{:?}: {}", status.code(), status.message())?;
                let mut source = std::error::Error::source(status);
                while let Some(error) = source {
                    source = error.source();
                    if source.is_none() {
                        write!(f, ": {error}")?;
                    }
                }
                Ok(())
            }
            Self::Client(error) => error.fmt(f),
        }
    }
}

impl Failure {
    /// `error.type` on spans and metrics.
    fn code(&self) -> &'static str {
        match self {
            Self::Deadline => "DEADLINE_EXCEEDED",
            Self::Client(etcd_client::Error::GRpcStatus(status)) => code_name(status.code()),
            Self::Client(_) => "client",
        }
    }

    fn meaning(&self) -> Meaning {
        use etcd_client::Error as E;
        let status = match self {
            Self::Client(E::GRpcStatus(status)) => status,
            Self::Client(E::TransportError(_)) => return Meaning::NotSent,
            // What the library says when a lease that is to be kept alive is gone.
            Self::Client(E::LeaseKeepAliveError(_)) => return Meaning::Refused(KvError::LeaseNotFound),
            Self::Client(E::InvalidArgs(_) | E::InvalidUri(_) | E::InvalidMetadataValue(_)) => {
                return Meaning::Refused(KvError::Permanent(format!("etcd client: {self}")));
            }
            Self::Client(_) | Self::Deadline => return Meaning::Unknown,
        };
        match status.code() {
            Code::NotFound if status.message().contains("lease not found") => Meaning::Refused(KvError::LeaseNotFound),
            Code::ResourceExhausted if status.message().contains("space exceeded") => {
                Meaning::Refused(KvError::Unavailable(format!(
                    "etcd is out of space and takes no writes until there is room: compact and defragment it, or raise its \
                     --quota-backend-bytes, then disarm its alarm (etcd: {})",
                    status.message()
                )))
            }
            Code::OutOfRange if status.message().contains("compacted") => Meaning::Refused(KvError::Compacted),
            Code::OutOfRange | Code::ResourceExhausted => {
                Meaning::Refused(KvError::Unavailable(format!("etcd: {}", status.message())))
            }
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented => {
                Meaning::Refused(KvError::Permanent(format!("etcd refused: {}", status.message())))
            }
            _ if never_connected(status) => Meaning::NotSent,
            _ => Meaning::Unknown,
        }
    }
}

fn never_connected(status: &tonic::Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

impl Kv for Etcd {
    /// A revision.
    type Snapshot = i64;

    fn name(&self) -> &'static str {
        "etcd"
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let repeatable = txn.is_read_only();
        let counted =
            |ops: &[Op]| ops.iter().filter(|op| op.is_read()).map(|op| matches!(op, Op::Oldest { .. })).collect();
        let (success, failure): (Vec<bool>, Vec<bool>) = (counted(&txn.success), counted(&txn.failure));
        let txn = etcd_client::Txn::new()
            .when(txn.compare.into_iter().map(compare).collect::<Vec<_>>())
            .and_then(txn.success.into_iter().map(op).collect::<Vec<_>>())
            .or_else(txn.failure.into_iter().map(op).collect::<Vec<_>>());
        let answer = self.call(Operation::Txn, repeatable, |client| {
            let (mut kv, txn) = (client.kv_client().max_decoding_message_size(LARGEST), txn.clone());
            async move { kv.txn(txn).await }
        });
        let answer = answer.await?;
        let read = answer.op_responses().into_iter().filter_map(|response| match response {
            TxnOpResponse::Get(get) => Some(get),
            TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
        });
        let (mut reads, mut counts) = (Vec::new(), Vec::new());
        for (mut get, counted) in read.zip(if answer.succeeded() { success } else { failure }) {
            reads.push(get.take_kvs().into_iter().filter_map(key_value).collect());
            if counted {
                counts.push(usize::try_from(get.count()).unwrap_or(0));
            }
        }
        Ok(TxnResponse {
            succeeded: answer.succeeded(),
            revision: revision(answer.header().map(|header| header.revision())),
            reads,
            counts,
        })
    }

    async fn page(&self, get: Get, at: Option<i64>) -> KvResult<Page<i64>> {
        let options = options(&get).with_revision(at.unwrap_or(0));
        let answer = self.call(Operation::Range, true, |client| {
            let (mut kv, from) = (client.kv_client().max_decoding_message_size(LARGEST), get.range.start.clone());
            let options = options.clone();
            async move { kv.get(from, Some(options)).await }
        });
        let mut answer = answer.await?;
        let now = answer.header().map_or(0, |header| header.revision());
        Ok(Page {
            more: answer.more(),
            kvs: answer.take_kvs().into_iter().filter_map(key_value).collect(),
            snapshot: at.unwrap_or(now),
        })
    }

    async fn count(&self, range: KeyRange, at: Option<i64>) -> KvResult<u64> {
        let get = Get { range, limit: 0, keys_only: false };
        let options = options(&get).with_count_only().with_revision(at.unwrap_or(0));
        let answer = self.call(Operation::Range, true, |client| {
            let (mut kv, from, options) = (client.kv_client(), get.range.start.clone(), options.clone());
            async move { kv.get(from, Some(options)).await }
        });
        Ok(u64::try_from(answer.await?.count()).unwrap_or(0))
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (mut listed, mut at, mut rest) = (BTreeMap::new(), None, Some(range.clone()));
        while let Some(left) = rest.take() {
            let get = Get { range: left, limit: LISTED, keys_only: true };
            let page = match self.page(get.clone(), at).await {
                // What is followed is of one revision: from the beginning, at a new one.
                Err(KvError::Compacted) => {
                    (listed, at, rest) = (BTreeMap::new(), None, Some(range.clone()));
                    continue;
                }
                page => page?,
            };
            at = Some(page.snapshot);
            if page.more
                && let Some(last) = page.kvs.last()
            {
                rest = Some(KeyRange { start: format!("{}\0", last.key), ..get.range });
            }
            listed.extend(page.kvs.into_iter().map(|kv| (kv.key, kv.create_revision)));
        }
        let listed_at = at.unwrap_or(0);
        let mut options = WatchOptions::new().with_start_revision(listed_at + 1);
        if let Some(end) = &range.end {
            options = options.with_range(end.as_str());
        }
        let stream = self.call(Operation::Watch, true, |client| {
            let (mut watch, from, options) = (client.watch_client(), range.start.clone(), options.clone());
            async move {
                let mut stream = watch.watch(from, Some(options)).await?;
                // The first message says that it was made.
                match stream.message().await? {
                    Some(made) if made.created() && !made.canceled() => Ok(stream),
                    refused => Err(etcd_client::Error::WatchError(format!("not made: {refused:?}"))),
                }
            }
        });
        Ok(Watch { revision: revision(Some(listed_at)), keys: listed, events: Box::new(Watching(stream.await?)) })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        // A lease granted twice runs out by itself.
        let answer = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.grant(seconds, None).await }
        });
        let answer = answer.await?;
        Ok((answer.id(), Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0))))
    }

    async fn keep_alive(&self, id: LeaseId) -> KvResult<()> {
        // The library waits for the first answer, and fails if it says that the lease is gone.
        let answer = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.keep_alive(id).await }
        });
        answer.await.map(|_| ())
    }

    async fn revoke(&self, id: LeaseId) -> KvResult<()> {
        let answer = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.revoke(id).await }
        });
        match answer.await {
            Ok(_) | Err(KvError::LeaseNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Connections end with the last call.
    async fn close(&self) {}
}

struct Watching(WatchStream);

impl EventStream for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async {
            let ended = |detail: String| KvError::Unavailable(format!("watch: {detail}"));
            match self.0.message().await {
                Err(error) => Err(ended(Failure::Client(error).to_string())),
                Ok(None) => Err(ended("ended by the server".to_owned())),
                Ok(Some(message)) if message.canceled() => Err(ended(message.cancel_reason().to_owned())),
                Ok(Some(message)) => Ok(message.events().iter().filter_map(event).collect()),
            }
        }
        .boxed()
    }
}

fn event(event: &etcd_client::Event) -> Option<Event> {
    let kv = event.kv()?;
    let create_revision = match event.event_type() {
        EventType::Put => Some(revision(Some(kv.create_revision()))),
        EventType::Delete => None,
    };
    Some(Event { key: kv.key_str().ok()?.to_owned(), revision: revision(Some(kv.mod_revision())), create_revision })
}

fn revision(number: Option<i64>) -> u64 {
    number.and_then(|number| u64::try_from(number).ok()).unwrap_or(0)
}

/// A revision as the wire has it.
fn number(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

/// `None` for a key that is no text: none of ours.
fn key_value(kv: etcd_client::KeyValue) -> Option<KeyValue> {
    let (create_revision, mod_revision) = (revision(Some(kv.create_revision())), revision(Some(kv.mod_revision())));
    let (key, value) = kv.into_key_value();
    Some(KeyValue { key: String::from_utf8(key).ok()?, value, create_revision, mod_revision })
}

fn compare(compare: Compare) -> etcd_client::Compare {
    use etcd_client::Compare as C;
    let Compare { range, condition } = compare;
    let key = range.start;
    // A key that is not there has revisions of 0, and no value to compare.
    let compare = match condition {
        Condition::Exists => C::create_revision(key, CompareOp::Greater, 0),
        Condition::Absent => C::create_revision(key, CompareOp::Equal, 0),
        Condition::CreateRevision(revision) => C::create_revision(key, CompareOp::Equal, number(revision)),
        Condition::CreateRevisionAtMost(revision) => {
            C::create_revision(key, CompareOp::Less, number(revision).saturating_add(1))
        }
        Condition::ModRevision(revision) => C::mod_revision(key, CompareOp::Equal, number(revision)),
        Condition::ModRevisionAtMost(revision) => {
            C::mod_revision(key, CompareOp::Less, number(revision).saturating_add(1))
        }
        Condition::Value(value) => C::value(key, CompareOp::Equal, value),
    };
    match range.end {
        None => compare,
        Some(end) => compare.with_range(end),
    }
}

fn op(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => TxnOp::put(key, value, lease.map(|lease| PutOptions::new().with_lease(lease))),
        Op::Delete(range) => TxnOp::delete(range.start, range.end.map(|end| DeleteOptions::new().with_range(end))),
        Op::Get(get) => {
            let options = options(&get);
            TxnOp::get(get.range.start, Some(options))
        }
        Op::Oldest { range, limit } => {
            let options = options(&Get { range: range.clone(), limit, keys_only: false });
            TxnOp::get(range.start, Some(options.with_sort(SortTarget::Create, SortOrder::Ascend)))
        }
    }
}

fn options(get: &Get) -> GetOptions {
    let mut options = GetOptions::new().with_limit(i64::try_from(get.limit).unwrap_or(i64::MAX));
    if let Some(end) = &get.range.end {
        options = options.with_range(end.as_str());
    }
    if get.keys_only {
        options = options.with_keys_only();
    }
    options
}

#[cfg(test)]
mod tests;
