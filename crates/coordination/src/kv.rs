//! The key-value port that every other module builds on: a transactional, ordered store with leases and watches, modelled on etcd.
//!
//! Every backend guarantees:
//! - A transaction is atomic, and durable once it returns. Transactions are strictly serializable, and so are reads without a snapshot.
//! - Every transaction that changes a key gets its own revision, greater than all earlier ones, across restarts too.
//! - Keys attached to a lease are deleted when the lease is revoked or expires.
//! - Every call returns within the backend's deadline.

use std::{collections::BTreeMap, fmt, time::Duration};

use futures::future::BoxFuture;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvError {
    /// The store was not reached or refused the call; nothing changed. A retry may succeed.
    Unavailable(String),
    /// The request was sent and no response arrived: it may have been applied, or may still be.
    Ambiguous(String),
    /// A put names a lease that was revoked or has expired. Nothing changed.
    LeaseNotFound,
    /// The snapshot was compacted. Nothing changed; a read without a snapshot works.
    Compacted,
    /// Nothing changed and a retry cannot succeed: wrong credentials, a damaged file, or a bug in this crate.
    Permanent(String),
}

impl fmt::Display for KvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(detail) | Self::Permanent(detail) => f.write_str(detail),
            Self::Ambiguous(detail) => write!(f, "{detail} (the outcome is unknown)"),
            Self::LeaseNotFound => f.write_str("the lease has expired or was revoked"),
            Self::Compacted => f.write_str("the revision to read from has been compacted"),
        }
    }
}

/// The result of a call.
pub type KvResult<T> = Result<T, KvError>;

/// A lease's ID, assigned by the store and never reused.
pub type LeaseId = i64;

/// A single key or a range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The key, or the first key of the range.
    pub start: String,
    /// The end of the range, exclusive; `None` for a single key.
    pub end: Option<String>,
}

impl KeyRange {
    /// A single key.
    pub fn key(key: impl Into<String>) -> Self {
        Self { start: key.into(), end: None }
    }

    /// The keys from `start`, inclusive, to `end`, exclusive.
    pub fn between(start: impl Into<String>, end: impl Into<String>) -> Self {
        Self { start: start.into(), end: Some(end.into()) }
    }

    /// Whether the range contains `key`.
    pub fn contains(&self, key: &str) -> bool {
        match &self.end {
            None => key == self.start,
            Some(end) => (self.start.as_str()..end.as_str()).contains(&key),
        }
    }
}

/// A key and its value at the revision that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; empty if the read was keys-only.
    pub value: Vec<u8>,
    /// The revision at which the key was created.
    pub create_revision: u64,
    /// The revision of the last put.
    pub mod_revision: u64,
}

/// A condition of a transaction. Over a range it must hold for every existing key; an empty range satisfies every condition but
/// [`Condition::Exists`], which applies to single keys only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The keys to check.
    pub range: KeyRange,
    /// What must hold for each of them.
    pub condition: Condition,
}

impl Compare {
    /// No key of the range exists.
    pub fn absent(range: KeyRange) -> Self {
        Self { range, condition: Condition::Absent }
    }

    /// The key exists.
    pub fn exists(key: impl Into<String>) -> Self {
        Self { range: KeyRange::key(key), condition: Condition::Exists }
    }

    /// The key exists and was created at `revision`.
    pub fn create_revision(key: impl Into<String>, revision: u64) -> Self {
        Self { range: KeyRange::key(key), condition: Condition::CreateRevision(revision) }
    }

    /// The key was created at `revision` or earlier, or is absent.
    pub fn create_revision_at_most(key: impl Into<String>, revision: u64) -> Self {
        Self { range: KeyRange::key(key), condition: Condition::CreateRevisionAtMost(revision) }
    }

    /// The key exists and was last put at `revision`.
    pub fn mod_revision(key: impl Into<String>, revision: u64) -> Self {
        Self { range: KeyRange::key(key), condition: Condition::ModRevision(revision) }
    }

    /// The key exists and has this value.
    pub fn value(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self { range: KeyRange::key(key), condition: Condition::Value(value.into()) }
    }
}

/// What must hold for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key exists.
    Exists,
    /// The key, or every key of the range, is absent.
    Absent,
    /// The key was created at this revision.
    CreateRevision(u64),
    /// The key was created at this revision or earlier, or is absent.
    CreateRevisionAtMost(u64),
    /// The key was last put at this revision.
    ModRevision(u64),
    /// The key was last put at this revision or earlier, or is absent.
    ModRevisionAtMost(u64),
    /// The key has this value.
    Value(Vec<u8>),
}

impl Condition {
    /// Whether the condition holds for a key with these revisions and this value.
    pub fn holds_for(&self, create_revision: u64, mod_revision: u64, value: &[u8]) -> bool {
        match self {
            Self::Exists => true,
            Self::Absent => false,
            Self::CreateRevision(revision) => create_revision == *revision,
            Self::CreateRevisionAtMost(revision) => create_revision <= *revision,
            Self::ModRevision(revision) => mod_revision == *revision,
            Self::ModRevisionAtMost(revision) => mod_revision <= *revision,
            Self::Value(expected) => value == expected,
        }
    }

    /// Whether the condition holds for a single key that is absent.
    pub fn holds_if_absent(&self) -> bool {
        match self {
            Self::Absent | Self::CreateRevisionAtMost(_) | Self::ModRevisionAtMost(_) => true,
            Self::Exists | Self::CreateRevision(_) | Self::ModRevision(_) | Self::Value(_) => false,
        }
    }
}

/// One operation of a transaction. The puts and deletes of one transaction must not touch the same key twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Stores a value.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease that the key is attached to; `None` keeps the key until it is deleted.
        lease: Option<LeaseId>,
    },
    /// Deletes the keys of a range. Deleting an absent key succeeds.
    Delete(KeyRange),
    /// Reads a range.
    Get(Get),
    /// Reads the keys with the lowest create revisions, in that order, and counts the whole range ([`TxnResponse::counts`]).
    Oldest {
        /// The range to read.
        range: KeyRange,
        /// The maximum number of keys to return.
        limit: usize,
    },
}

impl Op {
    /// Stores a value without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Deletes a single key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete(KeyRange::key(key))
    }

    /// Reads a whole range with its values.
    pub fn get(range: KeyRange) -> Self {
        Self::Get(Get { range, limit: 0, keys_only: false })
    }

    /// Reads the keys of a whole range without their values.
    pub fn get_keys(range: KeyRange) -> Self {
        Self::Get(Get { range, limit: 0, keys_only: true })
    }

    /// Whether the operation changes nothing.
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Get(_) | Self::Oldest { .. })
    }
}

/// A read of a range, in key order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Get {
    /// The range to read.
    pub range: KeyRange,
    /// The maximum number of keys to return; 0 means no limit.
    pub limit: usize,
    /// Whether to leave out the values.
    pub keys_only: bool,
}

/// A transaction: runs `success` if every compare holds, otherwise `failure`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions, all of which must hold.
    pub compare: Vec<Compare>,
    /// The operations to run if they hold.
    pub success: Vec<Op>,
    /// The operations to run if one of them does not.
    pub failure: Vec<Op>,
}

impl Txn {
    /// Whether neither branch changes a key.
    pub fn is_read_only(&self) -> bool {
        self.success.iter().chain(&self.failure).all(Op::is_read)
    }

    /// Moves the puts attached to lease `from` to lease `to`.
    #[must_use]
    pub(crate) fn with_lease(mut self, from: LeaseId, to: LeaseId) -> Self {
        for op in self.success.iter_mut().chain(&mut self.failure) {
            if let Op::Put { lease: Some(lease), .. } = op
                && *lease == from
            {
                *lease = to;
            }
        }
        self
    }
}

/// The response to a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnResponse {
    /// Whether the compares held.
    pub succeeded: bool,
    /// The store's revision after the transaction; the transaction's own revision if it changed a key.
    pub revision: u64,
    /// The results of the [`Op::Get`]s and [`Op::Oldest`]s of the branch that ran, in order.
    pub reads: Vec<Vec<KeyValue>>,
    /// The number of keys in the range of each [`Op::Oldest`] of the branch that ran, in order.
    pub counts: Vec<usize>,
}

impl TxnResponse {
    /// Takes the result of the next read; empty if none is left.
    pub fn next_read(&mut self) -> Vec<KeyValue> {
        if self.reads.is_empty() { Vec::new() } else { self.reads.remove(0) }
    }

    /// Takes the result and the count of the next read, which must be an [`Op::Oldest`].
    pub fn next_counted_read(&mut self) -> (Vec<KeyValue>, usize) {
        let count = if self.counts.is_empty() { 0 } else { self.counts.remove(0) };
        (self.next_read(), count)
    }
}

/// One page of a range.
#[derive(Debug, Clone)]
pub struct Page<S> {
    /// The keys of the page, in order.
    pub kvs: Vec<KeyValue>,
    /// Whether the range has more keys after these.
    pub more: bool,
    /// The snapshot that was read, to read the next page from.
    pub snapshot: S,
}

/// A change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: String,
    /// The revision of the change.
    pub revision: u64,
    /// The revision at which the key was created; `None` if the change is a deletion.
    pub create_revision: Option<u64>,
}

/// The changes of a range in revision order, without gaps.
pub trait EventStream: Send {
    /// Returns the next changes.
    ///
    /// # Errors
    /// An error ends the stream: the range must be listed and watched again.
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>>;
}

/// The keys of a range at one revision, and the changes after it.
pub struct Watch {
    /// The revision of the list.
    pub revision: u64,
    /// The keys at that revision, each with its create revision.
    pub keys: BTreeMap<String, u64>,
    /// The changes after that revision.
    pub events: Box<dyn EventStream>,
}

/// A transactional key-value store.
pub trait Kv: Send + Sync + 'static {
    /// A point in the store's history that reads can refer to until it is compacted ([`KvError::Compacted`] from then on).
    type Snapshot: Clone + Send + Sync + 'static;

    /// The backend's name: `etcd` or `embedded`.
    fn name(&self) -> &'static str;

    /// The longest time that a call takes.
    fn deadline(&self) -> Duration;

    /// Runs a transaction.
    ///
    /// # Cancel safety
    /// Dropping the future after its first poll leaves the outcome unknown, as with [`KvError::Ambiguous`].
    fn txn(&self, txn: Txn) -> impl Future<Output = KvResult<TxnResponse>> + Send;

    /// Reads a page of a range, at a snapshot or at the latest revision.
    fn page(&self, get: Get, at: Option<Self::Snapshot>)
    -> impl Future<Output = KvResult<Page<Self::Snapshot>>> + Send;

    /// Counts the keys of a range, at a snapshot or at the latest revision.
    fn count(&self, range: KeyRange, at: Option<Self::Snapshot>) -> impl Future<Output = KvResult<u64>> + Send;

    /// Lists a range and watches it from there.
    fn list_and_watch(&self, range: KeyRange) -> impl Future<Output = KvResult<Watch>> + Send;

    /// Grants a lease and returns its time to live, which may differ from the requested one.
    fn grant(&self, ttl: Duration) -> impl Future<Output = KvResult<(LeaseId, Duration)>> + Send;

    /// Renews a lease for its whole time to live; [`KvError::LeaseNotFound`] if it has expired.
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = KvResult<()>> + Send;

    /// Revokes a lease and deletes its keys. Revoking an unknown lease succeeds.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = KvResult<()>> + Send;

    /// Closes files and connections. Later calls fail.
    fn close(&self) -> impl Future<Output = ()> + Send;
}
