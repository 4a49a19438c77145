//! Whether one holds a lock at a time, by what managers were told alone: each is taken to hold it from when it is told so until it says
//! that it is done, or is told that it may have lost it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_coordination::Coordination;
use gauntlet_domain::{
    Census, Challenge, ChallengeId, Instance, InstanceKey, Intent, LockGuard, LockKind, LockOptions, Outcome, Pool,
    Result, Snapshot, SourceId, Store, Stored, Stream, Unfinished, Version,
};
use jiff::Timestamp;

use super::{coverage::Event, network::Client, process::Process, world::World};
use crate::etcd::{Change, Server};

/// One who was told that it holds a lock, by its token.
struct Holder {
    lock: (&'static str, ChallengeId),
    process: Arc<Process>,
    /// Resolves when it is told that it may have lost it.
    lost: Mutex<BoxFuture<'static, ()>>,
}

/// Who holds which lock, as far as they know.
#[derive(Default)]
pub struct Observer {
    holders: BTreeMap<u64, Holder>,
    /// The last token told of each lock.
    last: BTreeMap<(&'static str, ChallengeId), u64>,
    /// Tokens whose lease etcd lost before its time: who was told them cannot know that yet.
    early: BTreeSet<u64>,
}

impl Observer {
    /// A manager is told that it holds a lock; answers whether one that cannot know had held it until then.
    fn told(&mut self, etcd: &Server, token: u64, holder: Holder) -> std::result::Result<bool, String> {
        let stands = |token: u64| {
            etcd.entries().any(|(key, entry)| entry.create_revision == token && key.contains("live locks"))
        };
        if self.early.contains(&token) {
            return Ok(false);
        }
        let name = &holder.process.name;
        if !stands(token) {
            return Err(format!("{name} is told that it holds {:?} ({token}), and its key is gone", holder.lock));
        }
        let last = self.last.insert(holder.lock.clone(), token).unwrap_or(0);
        if last >= token {
            return Err(format!("{:?}: token {token} is told after {last}", holder.lock));
        }
        let (mut over, mut behind) = (Vec::new(), false);
        for (before, other) in self.holders.iter().filter(|(_, other)| other.lock == holder.lock) {
            over.push(*before);
            let told = other.lost.lock().unwrap().as_mut().now_or_never().is_some();
            let its = &other.process.name;
            if told || self.early.contains(before) {
                continue;
            }
            if other.process.runs() && !other.process.goes_on_now() {
                return Err(format!("{:?} is held by {name} ({token}) and by {its} ({before})", holder.lock));
            }
            // One that does not run cannot be told. Its lease must be over.
            if stands(*before) {
                let lock = &holder.lock;
                return Err(format!("{lock:?}: {name} ({token}) comes in though the key of {its} ({before}) is there"));
            }
            behind = true;
        }
        over.iter().for_each(|token| self.done(*token));
        self.holders.insert(token, holder);
        Ok(behind)
    }

    /// A manager is done with it.
    fn done(&mut self, token: u64) {
        self.holders.remove(&token);
    }

    /// Etcd loses a lease before its time, and these keys with it.
    pub fn lost_early(&mut self, gone: &[Change]) {
        self.early.extend(gone.iter().filter_map(|change| Some(change.before.as_ref()?.create_revision)));
    }
}

/// The store of one manager: whatever it is told of locks is noted.
pub struct Observed {
    pub inner: Arc<Coordination<Client>>,
    pub process: Arc<Process>,
}

/// Dropped with the lock.
struct Until(Arc<World>, u64);

impl Drop for Until {
    fn drop(&mut self) {
        self.0.lock().observer.done(self.1);
    }
}

impl Observed {
    fn done(&self, held: &LockGuard) {
        self.process.world.lock().observer.done(held.token);
    }
}

#[async_trait]
impl Store for Observed {
    fn backend(&self) -> &'static str {
        self.inner.backend()
    }

    async fn ping(&self) -> Result<()> {
        self.inner.ping().await
    }

    async fn insert_challenge(&self, challenge: &Challenge) -> Result<()> {
        self.inner.insert_challenge(challenge).await
    }

    async fn challenge(&self, id: &ChallengeId) -> Result<Option<Stored<Challenge>>> {
        self.inner.challenge(id).await
    }

    async fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Result<Snapshot> {
        self.inner.snapshot(id, source).await
    }

    fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot> {
        self.inner.cached_snapshot(id, source)
    }

    fn challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)> {
        self.inner.challenges()
    }

    async fn instance(&self, key: &InstanceKey) -> Result<Option<Stored<Instance>>> {
        self.inner.instance(key).await
    }

    fn instances_of(&self, id: &ChallengeId) -> Stream<'_, Stored<Instance>> {
        self.inner.instances_of(id)
    }

    async fn all_readable(&self, id: &ChallengeId) -> Result<()> {
        self.inner.all_readable(id).await
    }

    fn instances_by_source(&self, source: Option<&SourceId>) -> Stream<'_, Instance> {
        self.inner.instances_by_source(source)
    }

    fn expired(&self, now: Timestamp) -> Stream<'_, Instance> {
        self.inner.expired(now)
    }

    async fn pool(&self, id: &ChallengeId, claimed: usize, pooled: usize) -> Result<Pool> {
        self.inner.pool(id, claimed, pooled).await
    }

    async fn lock(&self, kind: LockKind, id: &ChallengeId, by: &LockOptions) -> Result<LockGuard> {
        let held = self.inner.lock(kind, id, by).await?;
        let (world, token) = (&self.process.world, held.token);
        let holder = Holder {
            lock: (kind.name(), id.clone()),
            process: self.process.clone(),
            lost: Mutex::new(held.grant().lost()),
        };
        let told = {
            let mut state = world.lock();
            let super::world::State { observer, etcd, .. } = &mut *state;
            let told = observer.told(etcd, token, holder);
            state.count(Event::Told);
            if told == Ok(true) {
                state.count(Event::ToldBehind);
            }
            told
        };
        world.check(told.map(|_| ()).map_err(|what| format!("exclusion: {what}")));
        Ok(held.witnessed(Until(world.clone(), token)))
    }

    async fn release(&self, held: LockGuard) -> Result<()> {
        self.done(&held);
        self.inner.release(held).await
    }

    async fn update_challenge(&self, held: LockGuard, challenge: &Challenge) -> Result<()> {
        self.done(&held);
        self.inner.update_challenge(held, challenge).await
    }

    async fn remove_challenge(&self, held: LockGuard, id: &ChallengeId) -> Result<()> {
        self.done(&held);
        self.inner.remove_challenge(held, id).await
    }

    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        by: &LockOptions,
    ) -> Result<LockGuard> {
        self.inner.begin_create(challenge, intent, pool, by).await
    }

    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        by: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        self.inner.claim(challenge, pooled, claimed, by).await
    }

    async fn begin(&self, key: &InstanceKey, begin: Intent, by: &LockOptions) -> Result<(LockGuard, Instance)> {
        self.inner.begin(key, begin, by).await
    }

    async fn commit(&self, held: LockGuard, key: &InstanceKey, commit: Outcome) -> Result<()> {
        self.inner.commit(held, key, commit).await
    }

    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, by: &LockOptions) -> Result<()> {
        self.inner.rewrite(read, instance, by).await
    }

    async fn unfinished(&self, now: Timestamp) -> Result<Vec<Unfinished>> {
        self.inner.unfinished(now).await
    }

    async fn pools(&self) -> Result<Vec<ChallengeId>> {
        self.inner.pools().await
    }

    async fn census(&self, now: Timestamp) -> Result<Census> {
        self.inner.census(now).await
    }
}
