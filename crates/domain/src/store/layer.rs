//! Decorating the locks of a store: everything else passes through.

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{
    Census, Intent, LockGuard, LockKind, LockOptions, Pool, Snapshot, Store, Stored, Stream, Unfinished, Version,
};
use crate::{Challenge, ChallengeId, Instance, InstanceKey, Result, SourceId};

/// Sees every acquisition of a lock, and every guard that is issued.
pub trait LockLayer: Send + Sync {
    /// Runs an acquisition. [`Acquired::map_guard`] reaches the guard in its result.
    fn acquire<T: Acquired>(
        &self,
        kind: LockKind,
        challenge: &ChallengeId,
        acquisition: impl Future<Output = Result<T>> + Send,
    ) -> impl Future<Output = Result<T>> + Send;
}

/// The result of an acquisition.
pub trait Acquired: Sized + Send {
    /// Replaces the guard, if one was issued.
    #[must_use]
    fn map_guard(self, map: impl FnOnce(LockGuard) -> LockGuard) -> Self;

    /// The stored instance whose ownership was taken.
    fn instance(&self) -> Option<&Instance> {
        None
    }
}

impl Acquired for LockGuard {
    fn map_guard(self, map: impl FnOnce(LockGuard) -> LockGuard) -> Self {
        map(self)
    }
}

impl Acquired for Option<LockGuard> {
    fn map_guard(self, map: impl FnOnce(LockGuard) -> LockGuard) -> Self {
        self.map(map)
    }
}

impl Acquired for (LockGuard, Instance) {
    fn map_guard(self, map: impl FnOnce(LockGuard) -> LockGuard) -> Self {
        (map(self.0), self.1)
    }

    fn instance(&self) -> Option<&Instance> {
        Some(&self.1)
    }
}

/// A store whose locks are acquired through a [`LockLayer`].
pub struct Layered<S: ?Sized, L> {
    layer: L,
    inner: Arc<S>,
}

impl<S: ?Sized, L> Layered<S, L> {
    /// Puts `layer` around `inner`.
    pub fn new(layer: L, inner: Arc<S>) -> Self {
        Self { layer, inner }
    }
}

#[async_trait]
impl<S: Store + ?Sized, L: LockLayer> Store for Layered<S, L> {
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

    async fn lock(&self, kind: LockKind, id: &ChallengeId, options: &LockOptions) -> Result<LockGuard> {
        self.layer.acquire(kind, id, self.inner.lock(kind, id, options)).await
    }

    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        options: &LockOptions,
    ) -> Result<LockGuard> {
        let begin = self.inner.begin_create(challenge, intent, pool, options);
        self.layer.acquire(LockKind::Instance, &intent.key.challenge, begin).await
    }

    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        options: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        let claim = self.inner.claim(challenge, pooled, claimed, options);
        self.layer.acquire(LockKind::Instance, &claimed.key.challenge, claim).await
    }

    async fn begin(&self, key: &InstanceKey, intent: Intent, options: &LockOptions) -> Result<(LockGuard, Instance)> {
        let begin = self.inner.begin(key, intent, options);
        self.layer.acquire(LockKind::Instance, &key.challenge, begin).await
    }

    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, options: &LockOptions) -> Result<()> {
        self.inner.rewrite(read, instance, options).await
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
