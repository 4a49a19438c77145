//! The replica's lease: kept alive in the background, treated as lost as soon as it may have expired, and replaced by the next one.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::{Backoff, Jitter},
    kv::{Kv, KvError, KvResult, LeaseId},
};

/// A lease counts as expired this fraction (one tenth) of its time to live early, because the clocks of two machines differ in speed.
const MARGIN: u32 = 10;

/// A lease that was granted to this replica.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) id: LeaseId,
    lost: CancellationToken,
    valid_until: Arc<Mutex<Instant>>,
}

impl Lease {
    fn new(id: LeaseId, valid_until: Instant) -> Self {
        Self { id, lost: CancellationToken::new(), valid_until: Arc::new(Mutex::new(valid_until)) }
    }

    /// Resolves once the lease may have expired.
    pub(crate) fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        self.lost.clone().cancelled_owned()
    }

    /// Whether the lease may have expired. Reads the clock too: a process that was paused has not been notified yet.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.is_cancelled() || Instant::now() >= self.valid_until()
    }

    /// Gives the lease up: every key under it counts as lost from now on, and is deleted.
    pub(crate) fn give_up(&self) {
        self.lost.cancel();
    }

    fn valid_until(&self) -> Instant {
        *self.valid_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extend(&self, until: Instant) {
        *self.valid_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// A handle to the current lease.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    shared: Arc<Shared>,
}

/// Wakes waiters in the order in which they began to wait, unlike a watch channel.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_waiters();
    }
}

#[derive(Debug, Clone)]
enum State {
    /// A lease was requested.
    Requested,
    Granted(Lease),
    /// The request failed and is repeated after a pause.
    Failed(KvError),
    Stopped,
}

impl Session {
    /// Returns the session, and the task that maintains its lease until `stop`.
    pub(crate) fn start<K: Kv>(
        kv: Arc<K>,
        ttl: Duration,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let shared = Arc::new(Shared { state: Mutex::new(State::Requested), changed: Notify::new() });
        (Self { shared: shared.clone() }, maintain(kv, ttl, shared, jitter, stop))
    }

    /// Returns the current lease. Waits while one is requested, and fails as soon as the request does.
    pub(crate) async fn lease(&self) -> KvResult<Lease> {
        loop {
            // Created before the state is read, so that no later change is missed.
            let changed = self.shared.changed.notified();
            match &*self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) {
                State::Granted(lease) if !lease.is_lost() => return Ok(lease.clone()),
                State::Requested | State::Granted(_) => {}
                State::Failed(error) => return Err(error.clone()),
                State::Stopped => return Err(KvError::Unavailable("the store is shut down".to_owned())),
            }
            changed.await;
        }
    }
}

async fn maintain<K: Kv>(kv: Arc<K>, ttl: Duration, shared: Arc<Shared>, jitter: Arc<Jitter>, stop: CancellationToken) {
    let mut backoff = Backoff::new(&jitter);
    // Revocations of earlier leases, which nothing waits for until shutdown.
    let mut revocations = FuturesUnordered::new();
    while !stop.is_cancelled() {
        // The store may have started the time to live when the request was sent.
        let sent = Instant::now();
        let granted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            granted = alongside(&mut revocations, kv.grant(ttl)) => granted,
        };
        match granted {
            Ok((id, ttl)) => {
                backoff.reset();
                let valid_for = ttl - ttl / MARGIN;
                let lease = Lease::new(id, sent + valid_for);
                shared.set(State::Granted(lease.clone()));
                alongside(&mut revocations, keep_alive(kv.as_ref(), &lease, valid_for, &jitter, &stop)).await;
                lease.give_up();
                shared.set(State::Requested);
                // So that other replicas need not wait until it expires.
                revocations.push(revoke(kv.clone(), id, ttl, Backoff::new(&jitter)).boxed());
            }
            Err(error) => {
                tracing::warn!(%error, "cannot get a lease, retrying");
                // If one was granted after all, its id is unknown and no key can be under it.
                shared.set(State::Failed(match error {
                    KvError::Ambiguous(detail) => KvError::Unavailable(detail),
                    error => error,
                }));
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = alongside(&mut revocations, sleep(backoff.pause())) => {}
                }
            }
        }
    }
    shared.set(State::Stopped);
    while revocations.next().await.is_some() {}
}

/// Runs `future` to its end, and polls `others` meanwhile.
async fn alongside<T>(others: &mut FuturesUnordered<BoxFuture<'static, ()>>, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        tokio::select! {
            biased;
            output = &mut future => return output,
            Some(()) = others.next() => {}
        }
    }
}

/// Revokes a lease, retrying until it has expired.
async fn revoke<K: Kv>(kv: Arc<K>, lease: LeaseId, ttl: Duration, mut backoff: Backoff) {
    let expires = Instant::now() + ttl;
    while let Err(error) = kv.revoke(lease).await {
        let retry_at = Instant::now() + backoff.pause();
        if retry_at >= expires {
            tracing::warn!(%error, lease, "cannot revoke a lease; it has expired by now");
            return;
        }
        tracing::debug!(%error, lease, "cannot revoke a lease, retrying");
        sleep_until(retry_at).await;
    }
}

/// Renews the lease until it is lost or `stop` is set.
async fn keep_alive<K: Kv>(kv: &K, lease: &Lease, valid_for: Duration, jitter: &Arc<Jitter>, stop: &CancellationToken) {
    let mut pause = valid_for / 3;
    let mut backoff = Backoff::new(jitter);
    let lost = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = lease.lost() => {}
            () = wait_expired(lease) => {
                tracing::error!(lease = lease.id, "the lease may have expired: all work under it is stopped");
            }
        }
    };
    let renew = async {
        loop {
            sleep(pause).await;
            let sent = Instant::now();
            match kv.keep_alive(lease.id).await {
                // A response that comes too late does not revive the lease.
                Ok(()) if !lease.is_lost() => {
                    lease.extend(sent + valid_for);
                    pause = valid_for / 3;
                    backoff.reset();
                }
                Ok(()) => {}
                Err(KvError::LeaseNotFound) => {
                    tracing::error!(lease = lease.id, "the lease has expired: all work under it is stopped");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot renew the lease, retrying");
                    pause = backoff.pause();
                }
            }
        }
    };
    // The loss is noticed in time, however long a renewal takes.
    tokio::select! { biased; () = lost => {}, () = renew => {} }
}

/// Returns once a lease may have expired. Each renewal postpones that.
async fn wait_expired(lease: &Lease) {
    loop {
        let until = lease.valid_until();
        if Instant::now() >= until {
            return;
        }
        sleep_until(until).await;
    }
}
