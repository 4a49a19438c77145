//! The port to the coordinated store: records, ownership and locks, changed in one transaction.

use std::{any::Any, collections::BTreeMap, fmt, pin::Pin, time::Duration};

use async_trait::async_trait;
use futures::future::BoxFuture;
use jiff::Timestamp;

use crate::{Challenge, ChallengeId, Error, Instance, InstanceKey, PhaseName, Result, SourceId, Target};

/// A stream of records; one that does not parse is reported by the adapter and skipped, it hides no other.
pub type Stream<'a, T> = Pin<Box<dyn futures::Stream<Item = Result<T>> + Send + 'a>>;

/// The store's own version of a record: changes with every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(pub u64);

/// A record and the version it was read at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<T> {
    /// The record.
    pub value: T,
    /// The version.
    pub version: Version,
}

/// On whose behalf: written beside each ownership, so that who waits can be told who holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LockOptions {
    /// The trace of the call, in W3C traceparent form.
    pub traceparent: Option<String>,
    /// How long to wait for whoever owns it now; zero does not wait.
    pub timeout: Duration,
}

/// What a lock is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// A challenge's settings: held while they change; no instance is begun meanwhile.
    Challenge,
    /// The work that a challenge's update or deletion spreads over its instances.
    Rollout,
    /// One instance.
    Instance,
}

impl LockKind {
    /// Its name on spans and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Challenge => "challenge",
            Self::Rollout => "rollout",
            Self::Instance => "instance",
        }
    }
}

/// What happened while waiting for an ownership.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WaitStats {
    /// Whether somebody was ahead.
    pub contended: bool,
    /// How many were ahead at first, the holder included.
    pub queue_depth: u64,
    /// The trace of the last one waited for, in W3C traceparent form.
    pub holder: Option<String>,
}

/// The adapter's side of an ownership. Dropping it gives the ownership up (the adapter removes its key in the background); a commit uses
/// it up.
pub trait Grant: Send + Sync {
    /// Resolves when the ownership may have been lost: the lease behind it was not renewed in time.
    fn lost(&self) -> BoxFuture<'static, ()>;

    /// For the adapter to find its own type again.
    fn as_any(&self) -> &dyn Any;
}

/// An ownership: a lock, or an instance's owner key. Whoever holds it may commit, as long as its lease lives.
pub struct LockGuard {
    /// What it is on.
    pub kind: LockKind,
    /// The fencing token: grows with every acquisition in the store, compared in every commit.
    pub token: u64,
    /// What happened while waiting for it.
    pub waited: WaitStats,
    grant: Box<dyn Grant>,
    witness: Option<Box<dyn Any + Send + Sync>>,
}

impl LockGuard {
    /// For adapters.
    pub fn new(kind: LockKind, token: u64, waited: WaitStats, grant: Box<dyn Grant>) -> Self {
        Self { kind, token, waited, grant, witness: None }
    }

    /// Attaches something that lives exactly as long as the ownership; decorators measure with it.
    #[must_use]
    pub fn witnessed(mut self, witness: impl Any + Send + Sync) -> Self {
        self.witness = Some(Box::new(witness));
        self
    }

    /// The adapter's side.
    pub fn grant(&self) -> &dyn Grant {
        self.grant.as_ref()
    }

    /// Does the work unless the ownership may be lost first; then the work is dropped and the answer is [`Error::Fenced`].
    pub async fn run<T>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let work = std::pin::pin!(work);
        match futures::future::select(work, self.grant.lost()).await {
            futures::future::Either::Left((result, _)) => result,
            futures::future::Either::Right(((), _)) => {
                Err(Error::Fenced(format!("{} (token {})", self.kind.name(), self.token)))
            }
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard").field("kind", &self.kind).field("token", &self.token).finish_non_exhaustive()
    }
}

/// What a create or a renewal needs to know, read at one revision.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The challenge.
    pub challenge: Option<Stored<Challenge>>,
    /// The source's instance, in whatever phase.
    pub instance: Option<Stored<Instance>>,
    /// Some of the ready pooled instances (at most 16): enough to pick one at random and not collide.
    pub pooled: Vec<Stored<Instance>>,
}

impl Snapshot {
    /// Whether challenge and instance are of the same update, which tells parts that were seen at different times.
    pub fn agrees(&self) -> bool {
        let revision = self.challenge.as_ref().map(|challenge| challenge.value.revision);
        self.instance.as_ref().is_none_or(|instance| Some(instance.value.applied_revision) == revision)
    }
}

/// What the bounds of a challenge's pool are about, at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Changes whenever the challenge is given another instance that its bounds count: pooled, or claimed where there is an upper bound.
    pub version: Version,
    /// Claimed instances, in whatever phase, counted no further than was asked for.
    pub claimed: usize,
    /// Pooled instances and their phases, read no further than was asked for.
    pub pooled: Vec<(InstanceKey, PhaseName)>,
}

/// What is about to be done with a stored instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// It becomes its target: the phase is set to updating. Answers [`Error::Conflict`] if it is being deleted, which goes on.
    Update(Target),
    /// It goes: the phase is set to deleting.
    Delete,
    /// What a crash left, or what failed, is finished: the phase stays. Answers [`Error::Conflict`] if somebody owns it, or it is ready.
    Recover,
}

/// How an ownership of an instance ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The instance is now this.
    Put(Box<Instance>),
    /// The instance is gone.
    Remove,
}

/// Work that nobody owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfinished {
    /// An instance in a working phase without an owner, or failed and due for another try.
    Instance(InstanceKey),
    /// A challenge whose update or deletion has not reached every instance.
    Challenge(ChallengeId),
}

/// What is stored, counted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Census {
    /// Challenges, closing ones included.
    pub challenges: u64,
    /// Instances by challenge, phase, and whether they are pooled.
    pub instances: BTreeMap<(ChallengeId, PhaseName, bool), u64>,
    /// Claimed instances whose end has passed.
    pub overdue: u64,
}

/// Records, ownership and locks. Every method is one transaction or a paged read at one revision (a read goes on at a later one where that is no
/// longer kept: nothing is read twice, and what was there all the time is not left out); every method is bounded in time by the adapter, and
/// waits no longer than [`LockOptions::timeout`] for others. Dropping a method's future leaves nothing behind: an ownership that was taken meanwhile is
/// given up.
///
/// Errors of any method: [`Error::Unavailable`] when the store does not answer (the outcome of a write is then unknown),
/// [`Error::Internal`] for data that does not parse.
#[async_trait]
pub trait Store: Send + Sync {
    /// `etcd` or `embedded`; `lock.backend` on spans.
    fn backend(&self) -> &'static str;

    /// Cheap proof that the store answers.
    async fn ping(&self) -> Result<()>;

    /// Stores a new challenge; [`Error::ChallengeExists`] if one of that id is stored, closing or not.
    async fn insert_challenge(&self, challenge: &Challenge) -> Result<()>;

    /// Reads a challenge.
    async fn challenge(&self, id: &ChallengeId) -> Result<Option<Stored<Challenge>>>;

    /// Reads what a create or a renewal needs, at one revision.
    async fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Result<Snapshot>;

    /// What this replica saw last of what [`Store::snapshot`] reads, without asking; `None` if it saw too little. Any part of it may be old,
    /// so it is good for a try (a method that compares, and answers [`Error::Conflict`] if it was old) and for no refusal. A conflict
    /// leaves behind what it met.
    fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot>;

    /// All challenges in order of id, each with all its instances, at one revision, in pages.
    fn challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)>;

    /// Reads one instance.
    async fn instance(&self, key: &InstanceKey) -> Result<Option<Stored<Instance>>>;

    /// All instances of a challenge, pooled ones too.
    fn instances_of(&self, id: &ChallengeId) -> Stream<'_, Stored<Instance>>;

    /// Whether every instance of a challenge can be read: [`Error::Internal`] that names the first record that cannot, and why. Whoever
    /// draws conclusions from what is *not* among a challenge's instances asks this too: a newer build may have written what is there.
    async fn all_readable(&self, id: &ChallengeId) -> Result<()>;

    /// A source's instances; every source's claimed ones when `None`.
    fn instances_by_source(&self, source: Option<&SourceId>) -> Stream<'_, Instance>;

    /// Claimed instances whose end is at `now` or before, the longest overdue first, in pages; costs what it answers. One that is renewed
    /// or goes while this is read may be left out.
    fn expired(&self, now: Timestamp) -> Stream<'_, Instance>;

    /// Reads what the bounds of a pool are about, by keys alone: an instance that cannot be read counts. One transaction, which reads no more
    /// than `claimed` claimed and `pooled` pooled instances, however many there are.
    async fn pool(&self, id: &ChallengeId, claimed: usize, pooled: usize) -> Result<Pool>;

    /// Takes a challenge's lock exclusively, first come first served. The challenge need not exist. [`Error::Busy`] when patience ends.
    async fn lock(&self, kind: LockKind, id: &ChallengeId, by: &LockOptions) -> Result<LockGuard>;

    /// Gives a lock up without writing anything.
    async fn release(&self, held: LockGuard) -> Result<()>;

    /// Writes a challenge under its lock and releases the lock, in one transaction. [`Error::Fenced`] if the lock was lost;
    /// [`Error::ChallengeNotFound`] if it is not stored.
    async fn update_challenge(&self, held: LockGuard, challenge: &Challenge) -> Result<()>;

    /// Removes a closing challenge that has no instance left, and releases the lock. [`Error::Fenced`] if the lock was lost;
    /// [`Error::Conflict`] if instances are left.
    async fn remove_challenge(&self, held: LockGuard, id: &ChallengeId) -> Result<()>;

    /// Records the intent of a new instance and takes its ownership. Waits while the challenge's lock is held. [`Error::Conflict`] if the
    /// challenge changed since it was read, the seat is taken, or `pool` is not the pool's version any more. Where the pool's version
    /// changes by this ([`Pool::version`]) it becomes the fencing token of the answer.
    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        by: &LockOptions,
    ) -> Result<LockGuard>;

    /// Gives a pooled instance to a source: the pooled record goes, `claimed` is stored. The answer is an ownership if `claimed` is in a
    /// working phase. [`Error::Conflict`] as above, or if the pooled instance changed.
    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        by: &LockOptions,
    ) -> Result<Option<LockGuard>>;

    /// Takes the ownership of a stored instance and records what is about to be done; answers the record as it now stands.
    /// [`Error::Conflict`] if nothing is stored there or as [`Intent`] says, [`Error::Busy`] when patience ends. A record that cannot be read stays as it is:
    /// [`Error::Internal`] names it, or [`Error::Conflict`] for [`Intent::Recover`], as it is somebody else's to recover.
    async fn begin(&self, key: &InstanceKey, begin: Intent, by: &LockOptions) -> Result<(LockGuard, Instance)>;

    /// Records an outcome and gives the ownership up. [`Error::Fenced`] if the ownership was lost: nothing was written.
    async fn commit(&self, held: LockGuard, key: &InstanceKey, commit: Outcome) -> Result<()>;

    /// Writes an instance that nobody owns, if it is still at that version (a renewal, or an update that touches no resource). Waits while
    /// somebody owns it; [`Error::Conflict`] if it changed.
    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, by: &LockOptions) -> Result<()>;

    /// Work that nobody owns, at `now`.
    async fn unfinished(&self, now: Timestamp) -> Result<Vec<Unfinished>>;

    /// Challenges that keep a pool (a lower bound above zero) or have pooled instances.
    async fn pools(&self) -> Result<Vec<ChallengeId>>;

    /// Counts what is stored, at one revision.
    async fn census(&self, now: Timestamp) -> Result<Census>;
}
