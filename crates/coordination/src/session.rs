//! The replica's lease: kept alive, and given up for lost as soon as it may have run out.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::kv::{Kv, KvError, LeaseId};

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
    current: watch::Receiver<Option<Lease>>,
}

impl Session {
    /// The session, and the task that keeps it until `stop`.
    pub(crate) fn start<K: Kv>(
        kv: Arc<K>,
        ttl: Duration,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (publish, current) = watch::channel(None);
        (Self { current }, keep(kv, ttl, publish, stop))
    }

    /// The current lease; waits for one no longer than `patience`.
    pub(crate) async fn lease(&self, patience: Duration) -> Option<Lease> {
        let mut current = self.current.clone();
        let live = current.wait_for(|lease| lease.as_ref().is_some_and(|lease| !lease.is_lost()));
        timeout(patience, live).await.ok()?.ok()?.clone()
    }
}

async fn keep<K: Kv>(kv: Arc<K>, ttl: Duration, publish: watch::Sender<Option<Lease>>, stop: CancellationToken) {
    let mut delay = RETRY_FIRST;
    while !stop.is_cancelled() {
        // From the time of sending: the store may have counted from then.
        let sent = Instant::now();
        match kv.grant(ttl).await {
            Ok((id, ttl)) => {
                delay = RETRY_FIRST;
                let ttl = ttl - ttl / MARGIN;
                let lease = Lease::new(id, sent + ttl);
                publish.send_replace(Some(lease.clone()));
                keep_one(kv.as_ref(), &lease, ttl, &stop).await;
                lease.lose();
                publish.send_replace(None);
                // So that others need not wait for it to run out.
                if let Err(error) = kv.revoke(lease.id).await {
                    tracing::warn!(%error, "the lease could not be revoked, it runs out by itself");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "no lease was granted, trying again");
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = sleep(delay) => delay = (delay * 2).min(RETRY_LONGEST),
                }
            }
        }
    }
}

/// Returns when the lease is lost or is not wanted any more.
async fn keep_one<K: Kv>(kv: &K, lease: &Lease, ttl: Duration, stop: &CancellationToken) {
    let mut next = ttl / 3;
    let mut delay = RETRY_FIRST;
    loop {
        tokio::select! {
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
