//! The replica's lease: kept alive, and given up for lost as soon as it may have run out.

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

/// How much of its time to live a lease is given less than the store gives it: clocks of two machines do not run at one speed.
const MARGIN: u32 = 10;

/// A lease that lived when it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) id: LeaseId,
    lost: CancellationToken,
    good_until: Arc<Mutex<Instant>>,
}

impl Lease {
    fn new(id: LeaseId, good_until: Instant) -> Self {
        Self { id, lost: CancellationToken::new(), good_until: Arc::new(Mutex::new(good_until)) }
    }

    /// Resolves when it may have run out.
    pub(crate) fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        self.lost.clone().cancelled_owned()
    }

    /// Whether it may have run out. By the clock too: a paused process has not been told yet.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.is_cancelled() || Instant::now() >= self.good_until()
    }

    /// Gives it up: whatever is under it counts as lost from now on, and is removed.
    pub(crate) fn lose(&self) {
        self.lost.cancel();
    }

    fn good_until(&self) -> Instant {
        *self.good_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extend(&self, until: Instant) {
        *self.good_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// Where the current lease is found.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    published: Arc<Published>,
}

/// Wakes in the order of waiting, which a watch channel does not.
#[derive(Debug)]
struct Published {
    state: Mutex<State>,
    changed: Notify,
}

impl Published {
    fn replace(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_waiters();
    }
}

#[derive(Debug, Clone)]
enum State {
    /// Being granted.
    Asked,
    Granted(Lease),
    /// Refused or unanswered; asked for again after a while.
    Failed(KvError),
    Stopped,
}

impl Session {
    /// The session, and the task that keeps it until `stop`.
    pub(crate) fn start<K: Kv>(
        kv: Arc<K>,
        ttl: Duration,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let published = Arc::new(Published { state: Mutex::new(State::Asked), changed: Notify::new() });
        (Self { published: published.clone() }, keep(kv, ttl, published, jitter, stop))
    }

    /// The current lease. Waits while one is being granted, and fails as soon as that has failed.
    pub(crate) async fn lease(&self) -> KvResult<Lease> {
        loop {
            // Before the look, so that no change is missed after it.
            let changed = self.published.changed.notified();
            match &*self.published.state.lock().unwrap_or_else(PoisonError::into_inner) {
                State::Granted(lease) if !lease.is_lost() => return Ok(lease.clone()),
                State::Asked | State::Granted(_) => {}
                State::Failed(error) => return Err(error.clone()),
                State::Stopped => return Err(KvError::Unavailable("the store is shut down".to_owned())),
            }
            changed.await;
        }
    }
}

async fn keep<K: Kv>(kv: Arc<K>, ttl: Duration, publish: Arc<Published>, jitter: Arc<Jitter>, stop: CancellationToken) {
    let mut backoff = Backoff::new(&jitter);
    // The leases before this one: nobody waits for them to be revoked.
    let mut revoking = FuturesUnordered::new();
    while !stop.is_cancelled() {
        // From the time of sending: the store may have counted from then.
        let sent = Instant::now();
        let granted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            granted = beside(&mut revoking, kv.grant(ttl)) => granted,
        };
        match granted {
            Ok((id, ttl)) => {
                backoff.reset();
                let good = ttl - ttl / MARGIN;
                let lease = Lease::new(id, sent + good);
                publish.replace(State::Granted(lease.clone()));
                beside(&mut revoking, keep_one(kv.as_ref(), &lease, good, &jitter, &stop)).await;
                lease.lose();
                publish.replace(State::Asked);
                // So that others need not wait for it to run out.
                revoking.push(revoke(kv.clone(), id, ttl, Backoff::new(&jitter)).boxed());
            }
            Err(error) => {
                tracing::warn!(%error, "no lease was granted, trying again");
                // Whether or not one was granted, nobody knows it: nothing can be under it.
                publish.replace(State::Failed(match error {
                    KvError::Ambiguous(detail) => KvError::Unavailable(detail),
                    error => error,
                }));
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = beside(&mut revoking, sleep(backoff.pause())) => {}
                }
            }
        }
    }
    publish.replace(State::Stopped);
    while revoking.next().await.is_some() {}
}

/// Runs one future to its end, and others with it meanwhile.
async fn beside<T>(others: &mut FuturesUnordered<BoxFuture<'static, ()>>, one: impl Future<Output = T>) -> T {
    let mut one = std::pin::pin!(one);
    loop {
        tokio::select! {
            biased;
            done = &mut one => return done,
            Some(()) = others.next() => {}
        }
    }
}

/// Revokes a lease; gives up when it has run out by itself.
async fn revoke<K: Kv>(kv: Arc<K>, lease: LeaseId, ttl: Duration, mut backoff: Backoff) {
    let ends = Instant::now() + ttl;
    while let Err(error) = kv.revoke(lease).await {
        let again = Instant::now() + backoff.pause();
        if again >= ends {
            tracing::warn!(%error, lease, "the lease could not be revoked, it has run out by itself");
            return;
        }
        tracing::debug!(%error, lease, "the lease could not be revoked, trying again");
        sleep_until(again).await;
    }
}

/// Returns when the lease is lost or is not wanted any more.
async fn keep_one<K: Kv>(kv: &K, lease: &Lease, good: Duration, jitter: &Arc<Jitter>, stop: &CancellationToken) {
    let mut next = good / 3;
    let mut backoff = Backoff::new(jitter);
    let given_up = async {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = lease.lost() => {}
            () = until_run_out(lease) => {
                tracing::error!(lease = lease.id, "the lease may have run out: all work under it is given up");
            }
        }
    };
    let kept_alive = async {
        loop {
            sleep(next).await;
            let sent = Instant::now();
            match kv.keep_alive(lease.id).await {
                // An answer that comes too late finds the lease given up.
                Ok(()) if !lease.is_lost() => {
                    lease.extend(sent + good);
                    next = good / 3;
                    backoff.reset();
                }
                Ok(()) => {}
                Err(KvError::LeaseNotFound) => {
                    tracing::error!(lease = lease.id, "the lease has run out: all work under it is given up");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the lease was not kept alive, trying again");
                    next = backoff.pause();
                }
            }
        }
    };
    // Whatever a call takes, it does not hold up that the lease is given up.
    tokio::select! { biased; () = given_up => {}, () = kept_alive => {} }
}

/// Returns when a lease may have run out, which is put off whenever it is kept alive.
async fn until_run_out(lease: &Lease) {
    loop {
        let until = lease.good_until();
        if Instant::now() >= until {
            return;
        }
        sleep_until(until).await;
    }
}
