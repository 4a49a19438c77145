//! Locks, observed: the spans `lock.acquire` and `lock.hold`, and the metrics `gauntlet.lock.*`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::{
    Acquired, ChallengeId, Change, Error, Layered, LockGuard, LockKind, LockLayer, Ownership, Result, Store,
};
use gauntlet_telemetry::{context, instruments::Instruments};
use tracing::{Instrument as _, Span, field::Empty, info_span};

/// Returns `store` with every acquired lock measured.
pub(crate) fn observed_store(store: Arc<dyn Store>, instruments: Instruments) -> Arc<dyn Store> {
    Arc::new(Layered::new(ObservedLocks { backend: store.backend(), instruments }, store))
}

/// Measures every acquisition, and how long each lock is held.
struct ObservedLocks {
    backend: &'static str,
    instruments: Instruments,
}

impl LockLayer for ObservedLocks {
    async fn acquire<T: Acquired>(
        &self,
        kind: LockKind,
        challenge: &ChallengeId,
        acquisition: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let span = info_span!(
            "lock.acquire",
            lock.kind = kind.name(),
            lock.backend = self.backend,
            challenge.id = %challenge,
            lock.contended = Empty,
            lock.queue_depth = Empty,
            lock.token = Empty,
            outcome = Empty,
            error.type = Empty,
        );
        let waiting = self.instruments.lock.start_wait(kind.name());
        let started = Instant::now();
        let result = acquisition.instrument(span.clone()).await;
        drop(waiting);
        let outcome = match &result {
            Ok(_) => "acquired",
            Err(error) => error.code(),
        };
        self.instruments.lock.record_attempt(kind.name(), outcome, started.elapsed());
        span.record("outcome", outcome);
        match result {
            Ok(acquired) => {
                // Links the end of an instance, or its recovery, to its creation.
                if let Some(traceparent) = acquired.instance().and_then(|instance| instance.traceparent.as_ref()) {
                    context::link_span(&span, traceparent);
                }
                Ok(acquired.map_guard(|guard| self.observe(&span, guard)))
            }
            Err(error) => {
                if let Error::Busy { ahead, .. } = &error {
                    span.record("lock.contended", true).record("lock.queue_depth", *ahead);
                }
                if error.is_fault() && error != Error::Conflict {
                    span.record("error.type", error.code());
                    span.in_scope(|| context::fail_span(error.to_string()));
                }
                Err(error)
            }
        }
    }
}

impl ObservedLocks {
    fn observe(&self, acquire: &Span, guard: LockGuard) -> LockGuard {
        acquire.record("lock.contended", guard.waited.contended);
        acquire.record("lock.queue_depth", guard.waited.queue_depth);
        acquire.record("lock.token", guard.token);
        if let Some(holder) = &guard.waited.holder {
            context::link_span(acquire, holder);
        }
        let span = info_span!(
            "lock.hold",
            lock.kind = guard.kind.name(),
            lock.backend = self.backend,
            lock.token = guard.token,
            error.type = Empty,
        );
        let hold = Hold {
            kind: guard.kind,
            since: Instant::now(),
            instruments: self.instruments.clone(),
            span,
            lost: Mutex::new(guard.lost()),
        };
        guard.wrap(|inner| Box::new(ObservedOwnership { inner, hold }))
    }
}

/// Measures how long a lock is held, its commit included.
struct ObservedOwnership {
    inner: Box<dyn Ownership>,
    hold: Hold,
}

#[async_trait]
impl Ownership for ObservedOwnership {
    fn lost(&self) -> BoxFuture<'static, ()> {
        self.inner.lost()
    }

    async fn commit(self: Box<Self>, change: Change) -> Result<()> {
        let Self { inner, hold } = *self;
        let result = inner.commit(change).await;
        drop(hold);
        result
    }
}

/// Records the hold when it is dropped.
struct Hold {
    kind: LockKind,
    since: Instant,
    instruments: Instruments,
    span: Span,
    /// In a mutex only because the future is not `Sync`.
    lost: Mutex<BoxFuture<'static, ()>>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.instruments.lock.record_release(self.kind.name(), self.since.elapsed());
        let lost = self.lost.get_mut().unwrap_or_else(PoisonError::into_inner);
        if lost.now_or_never().is_some() {
            self.instruments.lock.record_loss(self.kind.name());
            self.span.record("error.type", "FENCED");
            self.span.in_scope(|| context::fail_span("the lease expired while the lock was held"));
        }
    }
}
