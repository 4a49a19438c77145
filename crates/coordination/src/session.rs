//! The replica's lease: kept alive, and given up for lost as soon as it may have run out.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::kv::{Kv, KvError, KvResult, LeaseId};

/// How much of its time to live a lease is given less than the store gives it: clocks of two machines do not run at one speed.
const MARGIN: u32 = 10;

/// The delay before the first try again after a failed call.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// The longest delay between two tries.
const RETRY_LONGEST: Duration = Duration::from_secs(2);

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
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let published = Arc::new(Published { state: Mutex::new(State::Asked), changed: Notify::new() });
        (Self { published: published.clone() }, keep(kv, ttl, published, stop))
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

async fn keep<K: Kv>(kv: Arc<K>, ttl: Duration, publish: Arc<Published>, stop: CancellationToken) {
    let mut delay = RETRY_FIRST;
    while !stop.is_cancelled() {
        // From the time of sending: the store may have counted from then.
        let sent = Instant::now();
        match kv.grant(ttl).await {
            Ok((id, ttl)) => {
                delay = RETRY_FIRST;
                let ttl = ttl - ttl / MARGIN;
                let lease = Lease::new(id, sent + ttl);
                publish.replace(State::Granted(lease.clone()));
                keep_one(kv.as_ref(), &lease, ttl, &stop).await;
                lease.lose();
                publish.replace(State::Asked);
                // So that others need not wait for it to run out.
                if let Err(error) = kv.revoke(lease.id).await {
                    tracing::warn!(%error, "the lease could not be revoked, it runs out by itself");
                }
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
                    () = sleep(delay) => delay = (delay * 2).min(RETRY_LONGEST),
                }
            }
        }
    }
    publish.replace(State::Stopped);
}

/// Returns when the lease is lost or is not wanted any more.
async fn keep_one<K: Kv>(kv: &K, lease: &Lease, ttl: Duration, stop: &CancellationToken) {
    let mut next = ttl / 3;
    let mut delay = RETRY_FIRST;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = lease.lost() => return,
            () = tokio::time::sleep_until(lease.good_until()) => {
                tracing::error!(lease = lease.id, "the lease may have run out: all work under it is given up");
                return;
            }
            () = sleep(next) => {}
        }
        let sent = Instant::now();
        let answer = tokio::select! {
            biased;
            answer = kv.keep_alive(lease.id) => answer,
            () = tokio::time::sleep_until(lease.good_until()) => continue,
        };
        match answer {
            // An answer that comes too late finds the lease given up.
            Ok(()) if !lease.is_lost() => {
                lease.extend(sent + ttl);
                (next, delay) = (ttl / 3, RETRY_FIRST);
            }
            Ok(()) => {}
            Err(KvError::LeaseGone) => {
                tracing::error!(lease = lease.id, "the lease has run out: all work under it is given up");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "the lease was not kept alive, trying again");
                (next, delay) = (delay, (delay * 2).min(RETRY_LONGEST));
            }
        }
    }
}
