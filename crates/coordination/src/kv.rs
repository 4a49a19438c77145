//! The narrow port that everything here is built on: a transactional, ordered key-value store with leases, after etcd's model.
//!
//! Promises that the code above relies on, and that each backend keeps:
//! - A transaction is atomic and durable when it answers. Transactions are strictly serializable, and so are reads without a snapshot.
//! - Every transaction that changes something has a revision of its own, greater than all before it, also across restarts.
//! - A key under a lease goes when the lease is revoked or not kept alive for its time to live.
//! - Every call ends within the backend's deadline.

use std::{collections::BTreeMap, fmt, time::Duration};

use futures::future::BoxFuture;

/// Why a call was not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvError {
    /// Nothing happened: not reached, or refused.
    Unavailable(String),
    /// Sent and not answered: it may have happened, or may yet.
    Ambiguous(String),
    /// A key was to be put under a lease that is gone. Nothing happened.
    LeaseGone,
    /// The snapshot to read from is no longer kept. Nothing happened; what is there now can be read.
    Compacted,
    /// Nothing happened, and trying again will not help: wrong credentials, a damaged file, a fault of ours.
    Broken(String),
}

impl fmt::Display for KvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(detail) | Self::Broken(detail) => f.write_str(detail),
            Self::Ambiguous(detail) => write!(f, "{detail} (the outcome is unknown)"),
            Self::LeaseGone => f.write_str("the lease is gone"),
            Self::Compacted => f.write_str("the revision to read from has been compacted"),
        }
    }
}

/// The result of a call.
pub type KvResult<T> = Result<T, KvError>;

/// A lease, by the number the store gave it. Never reused.
pub type LeaseId = i64;

/// One key or a range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The key, or the first of the range.
    pub from: String,
    /// The end of the range, exclusive; `None` for one key.
    pub to: Option<String>,
}

impl Keys {
    /// One key.
    pub fn one(key: impl Into<String>) -> Self {
        Self { from: key.into(), to: None }
    }

    /// From the first, inclusive, to the second, exclusive.
    pub fn between(from: impl Into<String>, to: impl Into<String>) -> Self {
        Self { from: from.into(), to: Some(to.into()) }
    }
}

/// A key with its value, as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; empty when only keys were asked for.
    pub value: Vec<u8>,
    /// The revision at which the key came to be.
    pub created: u64,
    /// The revision at which it was last put.
    pub modified: u64,
}

/// A condition of a transaction. On a range it must hold for each key that is there; an empty range fulfils any but [`Test::Exists`],
/// which is for single keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// What is looked at.
    pub keys: Keys,
    /// What must hold.
    pub test: Test,
}

impl Compare {
    /// Nothing is there.
    pub fn absent(keys: Keys) -> Self {
        Self { keys, test: Test::Absent }
    }

    /// The key is there.
    pub fn exists(key: impl Into<String>) -> Self {
        Self { keys: Keys::one(key), test: Test::Exists }
    }

    /// The key came to be at that revision.
    pub fn created(key: impl Into<String>, revision: u64) -> Self {
        Self { keys: Keys::one(key), test: Test::Created(revision) }
    }

    /// The key came to be at that revision or before, or is not there.
    pub fn not_created_after(key: impl Into<String>, revision: u64) -> Self {
        Self { keys: Keys::one(key), test: Test::NotCreatedAfter(revision) }
    }

    /// The key was last put at that revision.
    pub fn modified(key: impl Into<String>, revision: u64) -> Self {
        Self { keys: Keys::one(key), test: Test::Modified(revision) }
    }

    /// The key has that value.
    pub fn value(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self { keys: Keys::one(key), test: Test::Value(value.into()) }
    }
}

/// What must hold of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    /// It is there.
    Exists,
    /// It is not there; of a range: nothing is there.
    Absent,
    /// It came to be at that revision.
    Created(u64),
    /// It came to be at that revision or before, or is not there.
    NotCreatedAfter(u64),
    /// It was last put at that revision.
    Modified(u64),
    /// It was last put at that revision or before, or is not there.
    NotAfter(u64),
    /// It has that value.
    Value(Vec<u8>),
}

/// A step of a transaction. The puts and deletes of one transaction never touch the same key twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Stores a value.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease it goes with.
        lease: Option<LeaseId>,
    },
    /// Removes what is there; nothing there is success.
    Delete(Keys),
    /// Reads.
    Get(Get),
    /// Reads those that came to be first, in order of creation, and counts all ([`TxnResult::counts`]).
    Oldest {
        /// What to read.
        keys: Keys,
        /// How many at most.
        limit: usize,
    },
}

impl Op {
    /// Stores a value that stays.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Removes one key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete(Keys::one(key))
    }

    /// Reads all that is there.
    pub fn get(keys: Keys) -> Self {
        Self::Get(Get { keys, limit: 0, keys_only: false })
    }

    /// Whether it changes nothing.
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Get(_) | Self::Oldest { .. })
    }

    /// Reads what is there, without the values.
    pub fn keys(keys: Keys) -> Self {
        Self::Get(Get { keys, limit: 0, keys_only: true })
    }
}

/// A read, in order of key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Get {
    /// What to read.
    pub keys: Keys,
    /// How many at most; 0 is no bound.
    pub limit: usize,
    /// Whether values are left out.
    pub keys_only: bool,
}

/// All compares hold: `then` is done; else `or`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions.
    pub when: Vec<Compare>,
    /// What is done if they hold.
    pub then: Vec<Op>,
    /// What is done if they do not.
    pub or: Vec<Op>,
}

impl Txn {
    /// The same, with what it puts under one lease put under another.
    #[must_use]
    pub(crate) fn under(mut self, before: LeaseId, after: LeaseId) -> Self {
        for op in self.then.iter_mut().chain(&mut self.or) {
            if let Op::Put { lease: Some(lease), .. } = op
                && *lease == before
            {
                *lease = after;
            }
        }
        self
    }
}

/// What a transaction did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnResult {
    /// Whether the compares held.
    pub succeeded: bool,
    /// The store's revision afterwards: of this transaction, if it changed something.
    pub revision: u64,
    /// What each [`Op::Get`] and [`Op::Oldest`] of the branch read, in order.
    pub reads: Vec<Vec<KeyValue>>,
    /// How many keys there are in the range of each [`Op::Oldest`] of the branch, in order.
    pub counts: Vec<usize>,
}

impl TxnResult {
    /// What the next read, in order, answered, and how many there are in all; for one that counts.
    pub fn next_counted(&mut self) -> (Vec<KeyValue>, usize) {
        let count = if self.counts.is_empty() { 0 } else { self.counts.remove(0) };
        (self.next_read(), count)
    }

    /// What the next read, in order, answered.
    pub fn next_read(&mut self) -> Vec<KeyValue> {
        if self.reads.is_empty() { Vec::new() } else { self.reads.remove(0) }
    }
}

/// Part of a range.
#[derive(Debug, Clone)]
pub struct Page<S> {
    /// The keys, in order.
    pub kvs: Vec<KeyValue>,
    /// Whether there are more after these.
    pub more: bool,
    /// What was read from, to read on from the same.
    pub at: S,
}

/// A change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: String,
    /// The revision of the change.
    pub revision: u64,
    /// The revision at which the key came to be; `None` if it is gone.
    pub created: Option<u64>,
}

/// Changes as they happen, in order of revision, none left out.
pub trait Events: Send {
    /// The next ones. An error ends it: what was followed must be listed again. Cancellation safe.
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>>;
}

/// Keys as they are, and then their changes.
pub struct Followed {
    /// The revision of the list.
    pub revision: u64,
    /// The keys at that revision and the revision at which each came to be.
    pub keys: BTreeMap<String, u64>,
    /// What changes after that revision.
    pub events: Box<dyn Events>,
}

/// A transactional key-value store.
pub trait Kv: Send + Sync + 'static {
    /// A point in the store's history that reads can go back to until it is compacted ([`KvError::Compacted`] from then on).
    type Snapshot: Clone + Send + Sync + 'static;

    /// `etcd` or `embedded`.
    fn name(&self) -> &'static str;

    /// How long a call may take.
    fn deadline(&self) -> Duration;

    /// Runs a transaction. Dropping the future once it was polled is ambiguous, like [`KvError::Ambiguous`].
    fn txn(&self, txn: Txn) -> impl Future<Output = KvResult<TxnResult>> + Send;

    /// Reads part of a range, at a snapshot or now.
    fn page(&self, get: Get, at: Option<Self::Snapshot>)
    -> impl Future<Output = KvResult<Page<Self::Snapshot>>> + Send;

    /// Counts the keys of a range, at a snapshot or now.
    fn count(&self, keys: Keys, at: Option<Self::Snapshot>) -> impl Future<Output = KvResult<u64>> + Send;

    /// Lists a range and follows it.
    fn follow(&self, keys: Keys) -> impl Future<Output = KvResult<Followed>> + Send;

    /// Makes a lease and answers its time to live, which may be another than asked for.
    fn grant(&self, ttl: Duration) -> impl Future<Output = KvResult<(LeaseId, Duration)>> + Send;

    /// Gives a lease its time to live again; [`KvError::LeaseGone`] if it has run out.
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = KvResult<()>> + Send;

    /// Ends a lease and removes its keys; one that is gone is success.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = KvResult<()>> + Send;

    /// Lets go of files and connections. Calls after it fail.
    fn close(&self) -> impl Future<Output = ()> + Send;
}
