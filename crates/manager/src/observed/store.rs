//! The store, observed: `lock.acquire` and `lock.hold` spans, and the `gauntlet.lock.*` metrics, wherever an ownership is taken.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use futures::FutureExt as _;
use gauntlet_domain::{
    Census, Challenge, ChallengeId, Error, Instance, InstanceKey, Intent, LockGuard, LockKind, LockOptions, Outcome,
    Pool, Result, Snapshot, SourceId, Store, Stored, Stream, Unfinished, Version,
};
use gauntlet_telemetry::{context, instruments::Instruments};
use jiff::Timestamp;
use tracing::{Instrument as _, Span, field::Empty, info_span};

/// Measures every ownership taken through the store behind it.
pub(crate) struct ObservedStore {
    inner: Arc<dyn Store>,
    instruments: Instruments,
}

/// Lives as long as an ownership; its end is the release.
struct Hold {
    kind: LockKind,
    since: Instant,
    instruments: Instruments,
    span: Span,
    lost: futures::future::BoxFuture<'static, ()>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.instruments.lock.record_release(self.kind.name(), self.since.elapsed());
        if (&mut self.lost).now_or_never().is_some() {
            self.instruments.lock.record_loss(self.kind.name());
            self.span.record("error.type", "FENCED");
            self.span.in_scope(|| context::fail_span("the lease ran out while this was held"));
        }
    }
}

impl ObservedStore {
    pub(crate) fn new(inner: Arc<dyn Store>, instruments: Instruments) -> Self {
        Self { inner, instruments }
    }

    /// Runs something that takes an ownership; `held` finds it in the answer, to be wrapped.
    async fn acquire<T>(
        &self,
        kind: LockKind,
        challenge: &ChallengeId,
        work: impl Future<Output = Result<T>>,
        wrap: impl FnOnce(T, &dyn Fn(LockGuard) -> LockGuard) -> T,
    ) -> Result<T> {
        let span = info_span!(
            "lock.acquire",
            lock.kind = kind.name(),
            lock.backend = self.inner.backend(),
            challenge.id = %challenge,
            lock.contended = Empty,
            lock.queue_depth = Empty,
            lock.token = Empty,
            outcome = Empty,
            error.type = Empty,
        );
        let waiting = self.instruments.lock.start_wait(kind.name());
        let started = Instant::now();
        let result = work.instrument(span.clone()).await;
        drop(waiting);
        let outcome = match &result {
            Ok(_) => "acquired",
            Err(error) => error.code(),
        };
        self.instruments.lock.record_attempt(kind.name(), outcome, started.elapsed());
        span.record("outcome", outcome);
        match result {
            Ok(answer) => Ok(wrap(answer, &|held| self.witnessed(&span, held))),
            Err(error) => {
                if error.is_fault() && error != Error::Conflict {
                    span.record("error.type", error.code());
                    span.in_scope(|| context::fail_span(error.to_string()));
                }
                Err(error)
            }
        }
    }

    fn witnessed(&self, acquire: &Span, held: LockGuard) -> LockGuard {
        acquire.record("lock.contended", held.waited.contended);
        acquire.record("lock.queue_depth", held.waited.queue_depth);
        acquire.record("lock.token", held.token);
        if let Some(holder) = &held.waited.holder {
            context::link_span(acquire, holder);
        }
        let span = info_span!(
            "lock.hold",
            lock.kind = held.kind.name(),
            lock.backend = self.inner.backend(),
            lock.token = held.token,
            error.type = Empty,
        );
        let hold = Hold {
            kind: held.kind,
            since: Instant::now(),
            instruments: self.instruments.clone(),
            span,
            lost: held.grant().lost(),
        };
        held.witnessed(std::sync::Mutex::new(hold))
    }
}

#[async_trait]
impl Store for ObservedStore {
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
        self.acquire(kind, id, self.inner.lock(kind, id, by), |held, wrap| wrap(held)).await
    }

    async fn release(&self, held: LockGuard) -> Result<()> {
        self.inner.release(held).await
    }

    async fn update_challenge(&self, held: LockGuard, challenge: &Challenge) -> Result<()> {
        self.inner.update_challenge(held, challenge).await
    }

    async fn remove_challenge(&self, held: LockGuard, id: &ChallengeId) -> Result<()> {
        self.inner.remove_challenge(held, id).await
    }

    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        by: &LockOptions,
    ) -> Result<LockGuard> {
        let begin = self.inner.begin_create(challenge, intent, pool, by);
        self.acquire(LockKind::Instance, &intent.key.challenge, begin, |held, wrap| wrap(held)).await
    }

    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        by: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        let claim = self.inner.claim(challenge, pooled, claimed, by);
        self.acquire(LockKind::Instance, &claimed.key.challenge, claim, |held, wrap| held.map(wrap)).await
    }

    async fn begin(&self, key: &InstanceKey, begin: Intent, by: &LockOptions) -> Result<(LockGuard, Instance)> {
        let begin = async {
            let (held, instance) = self.inner.begin(key, begin, by).await?;
            // From an instance's end, or its recovery, to its beginning.
            if let Some(traceparent) = &instance.traceparent {
                context::link_to(traceparent);
            }
            Ok((held, instance))
        };
        self.acquire(LockKind::Instance, &key.challenge, begin, |(held, instance), wrap| (wrap(held), instance)).await
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
