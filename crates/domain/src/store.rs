//! The port to the coordinated store: records, and the locks under which they change.

mod layer;
mod lock;

use std::{collections::BTreeMap, pin::Pin};

use async_trait::async_trait;
use jiff::Timestamp;

pub use self::{
    layer::{Acquired, Layered, LockLayer},
    lock::{Change, LockGuard, LockKind, LockOptions, Ownership, WaitStats},
};
#[cfg(doc)]
use crate::Error;
use crate::{Challenge, ChallengeId, Instance, InstanceKey, PhaseName, Result, SourceId, Target};

/// A stream of records. The store logs and skips a record that does not parse, and goes on with the next.
pub type Stream<'a, T> = Pin<Box<dyn futures::Stream<Item = Result<T>> + Send + 'a>>;

/// The version of a stored record. Every write changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(pub u64);

/// A record and the version at which it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<T> {
    /// The record.
    pub value: T,
    /// The version.
    pub version: Version,
}

/// What a create or a renewal needs to know, read at one revision.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The challenge.
    pub challenge: Option<Stored<Challenge>>,
    /// The source's instance, in any phase.
    pub instance: Option<Stored<Instance>>,
    /// Some of the ready pooled instances, at most 16: enough that concurrent callers who pick one at random rarely collide.
    pub pooled: Vec<Stored<Instance>>,
}

impl Snapshot {
    /// Whether challenge and instance are of the same update. If not, the two were cached at different times.
    pub fn agrees(&self) -> bool {
        let revision = self.challenge.as_ref().map(|challenge| challenge.value.revision);
        self.instance.as_ref().is_none_or(|instance| Some(instance.value.applied_revision) == revision)
    }
}

/// A challenge's pool at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Changes whenever the challenge gets another instance that its bounds count: a pooled one, or a claimed one if there is an upper bound.
    pub version: Version,
    /// The number of claimed instances in any phase, up to the requested limit.
    pub claimed: usize,
    /// The pooled instances and their phases, up to the requested limit.
    pub pooled: Vec<(InstanceKey, PhaseName)>,
}

/// What a caller is about to do with a stored instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// Move it to a target: the phase becomes updating. [`Error::Conflict`] if the instance is being deleted.
    Update(Target),
    /// Remove it: the phase becomes deleting.
    Delete,
    /// Finish work that a crash or a failure left behind: the phase stays. [`Error::Conflict`] if the instance is
    /// ready or has an owner.
    Recover,
}

/// The outcome of work on an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The instance has this record now.
    Put(Box<Instance>),
    /// The instance is removed.
    Remove,
}

/// Work without an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfinished {
    /// An instance in a working phase that has no owner, or a failed one that is due for another try.
    Instance(InstanceKey),
    /// A challenge whose update or deletion has not reached every instance.
    Challenge(ChallengeId),
}

/// The number of stored records.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Census {
    /// Challenges, including those that are being deleted.
    pub challenges: u64,
    /// Instances by challenge, phase, and whether they are pooled.
    pub instances: BTreeMap<(ChallengeId, PhaseName, bool), u64>,
    /// Claimed instances whose time has run out.
    pub overdue: u64,
}

/// Records and locks.
///
/// Every method is one transaction, or a paged read at one revision. If that revision is compacted meanwhile, the read goes on at a later
/// one: no record is returned twice, and none that was there all the time is left out. The store bounds the duration of every method, and a
/// method waits for other owners no longer than [`LockOptions::timeout`].
///
/// # Errors
/// Any method fails with [`Error::Unavailable`] if the store does not respond (the outcome of a write is then
/// unknown), and with [`Error::Internal`] for data that does not parse.
///
/// # Cancel safety
/// Dropping the future of any method releases a lock that it has acquired.
#[async_trait]
pub trait Store: Send + Sync {
    /// `etcd` or `embedded`: the attribute `lock.backend` on spans.
    fn backend(&self) -> &'static str;

    /// Checks cheaply that the store responds.
    async fn ping(&self) -> Result<()>;

    /// Stores a new challenge. [`Error::ChallengeExists`] if one with that id is stored, even one that is
    /// being deleted.
    async fn insert_challenge(&self, challenge: &Challenge) -> Result<()>;

    /// Reads a challenge.
    async fn challenge(&self, id: &ChallengeId) -> Result<Option<Stored<Challenge>>>;

    /// Reads what a create or a renewal needs, at one revision.
    async fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Result<Snapshot>;

    /// Returns the replica's cached parts of a [`Store::snapshot`], without a request; `None` if the challenge is not cached. Any part may
    /// be stale. Use it to try a method that compares versions, never to refuse a call: [`Error::Conflict`] from
    /// such a method refreshes the cache.
    fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot>;

    /// Lists all challenges in order of id, each with all its instances, at one revision, in pages.
    fn challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)>;

    /// Reads one instance.
    async fn instance(&self, key: &InstanceKey) -> Result<Option<Stored<Instance>>>;

    /// Lists all instances of a challenge, including pooled ones.
    fn instances_of(&self, id: &ChallengeId) -> Stream<'_, Stored<Instance>>;

    /// Checks that every instance of a challenge can be read; [`Error::Internal`] names the first record that
    /// cannot, and why. A caller that concludes something from the *absence* of an instance must check this as well: a newer version may
    /// have written a record that this one skips.
    async fn all_readable(&self, id: &ChallengeId) -> Result<()>;

    /// Lists a source's instances, or the claimed instances of all sources if `source` is `None`.
    fn instances_by_source(&self, source: Option<&SourceId>) -> Stream<'_, Instance>;

    /// Lists the claimed instances that end at `now` or before, the longest overdue first, in pages. The cost depends on their number alone.
    /// An instance that is renewed or removed during the read may be left out.
    fn expired(&self, now: Timestamp) -> Stream<'_, Instance>;

    /// Reads a pool in one transaction, by keys alone: an instance that cannot be read is counted. Reads at most `claimed` claimed and
    /// `pooled` pooled instances, however many there are.
    async fn pool(&self, id: &ChallengeId, claimed: usize, pooled: usize) -> Result<Pool>;

    /// Acquires a challenge's lock, first come, first served. The challenge need not exist. [`Error::Busy`] after the
    /// timeout.
    async fn lock(&self, kind: LockKind, id: &ChallengeId, options: &LockOptions) -> Result<LockGuard>;

    /// Records the intent to create an instance and takes ownership of it. Waits while the challenge's lock is held.
    /// [`Error::Conflict`] if the challenge has changed since it was read, the instance exists, or `pool` is not
    /// the pool's version any more. If this changes the pool's version ([`Pool::version`]), the new version is the guard's fencing token.
    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        options: &LockOptions,
    ) -> Result<LockGuard>;

    /// Assigns a pooled instance to a source: replaces the record `pooled` by `claimed`. Returns a guard if `claimed` is in a working phase.
    /// [`Error::Conflict`] as for [`Store::begin_create`], or if the pooled instance has changed.
    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        options: &LockOptions,
    ) -> Result<Option<LockGuard>>;

    /// Takes ownership of a stored instance and records what the caller is about to do. Returns the record as it is then.
    ///
    /// [`Error::Conflict`] if the instance is not stored or as [`Intent`] says, [`Error::Busy`]
    /// after the timeout. A record that cannot be read is left alone: [`Error::Internal`] names it, or
    /// [`Error::Conflict`] for [`Intent::Recover`], since the version that wrote it recovers it.
    async fn begin(&self, key: &InstanceKey, intent: Intent, options: &LockOptions) -> Result<(LockGuard, Instance)>;

    /// Writes an instance that has no owner, if it is still at the version that was read: for a renewal, or an update that touches no
    /// resource. Waits for an owner; [`Error::Conflict`] if the instance has changed.
    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, options: &LockOptions) -> Result<()>;

    /// Lists the work that has no owner at `now`.
    async fn unfinished(&self, now: Timestamp) -> Result<Vec<Unfinished>>;

    /// Lists the challenges that keep a pool (a lower bound above zero) or have pooled instances.
    async fn pools(&self) -> Result<Vec<ChallengeId>>;

    /// Counts the stored records at one revision.
    async fn census(&self, now: Timestamp) -> Result<Census>;
}
