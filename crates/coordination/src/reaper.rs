//! The background task that deletes keys of dropped guards and of acquisitions with an unknown outcome.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::{Backoff, Jitter},
    kv::Kv,
    live_key::LiveKey,
};

/// The maximum number of keys that wait for deletion. Beyond it the whole lease is given up, which deletes them too.
const QUEUE: usize = 4096;
/// The longest pause between two deletions of a pending acquisition.
const MAX_RECHECK_INTERVAL: Duration = Duration::from_secs(30);
/// A request that was sent before a network partition may be delivered once the partition heals. After this time the kernel has given up
/// retransmitting it.
const MAX_DELIVERY_DELAY: Duration = Duration::from_secs(1200);

/// Sends keys to the reaper task.
#[derive(Debug, Clone)]
pub(crate) struct Reaper {
    queue: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Request {
    live: LiveKey,
    /// Whether the put of the key may still be in flight, so that it must be deleted more than once.
    pending: bool,
}

impl Reaper {
    /// Returns the reaper, and the task that runs its deletions until `stop`.
    pub(crate) fn start<K: Kv>(
        kv: Arc<K>,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, requests) = mpsc::channel(QUEUE);
        (Self { queue }, async move {
            tokio::select! { biased; () = stop.cancelled() => {}, () = reap(kv, jitter, requests) => {} }
        })
    }

    /// Deletes a key in the background, unless its lease is lost first.
    pub(crate) fn delete(&self, live: LiveKey) {
        self.send(Request { live, pending: false });
    }

    /// Deletes the key of an acquisition with an unknown outcome, again and again until its put can no longer be delivered.
    pub(crate) fn delete_pending(&self, live: LiveKey) {
        self.send(Request { live, pending: true });
    }

    fn send(&self, request: Request) {
        if let Err(TrySendError::Full(request)) = self.queue.try_send(request) {
            tracing::error!(QUEUE, "too many locks were dropped at once: giving up the lease");
            request.live.lease.give_up();
        }
    }
}

/// An acquisition whose put may still be in flight.
struct Pending {
    live: LiveKey,
    since: Instant,
    /// The pause between two deletions.
    interval: Duration,
}

async fn reap<K: Kv>(kv: Arc<K>, jitter: Arc<Jitter>, mut requests: mpsc::Receiver<Request>) {
    // By the time of the next deletion; the number separates entries that are due at the same time.
    let mut pending: BTreeMap<(Instant, u64), Pending> = BTreeMap::new();
    let mut number = 0;
    loop {
        let due = pending.first_key_value().map(|((due, _), _)| *due);
        let next = tokio::select! {
            biased;
            () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                pending.pop_first().map(|(_, acquisition)| acquisition)
            }
            request = requests.recv() => match request {
                None => return,
                Some(Request { live, pending: false }) => {
                    if delete(kv.as_ref(), &live, Backoff::new(&jitter)).await {
                        live.release_slot();
                    }
                    None
                }
                Some(Request { live, pending: true }) => {
                    Some(Pending { live, since: Instant::now(), interval: kv.deadline() })
                }
            },
        };
        let Some(mut acquisition) = next else { continue };
        delete(kv.as_ref(), &acquisition.live, Backoff::new(&jitter)).await;
        acquisition.interval = (acquisition.interval * 2).min(MAX_RECHECK_INTERVAL);
        let due = Instant::now() + acquisition.interval;
        if pending.len() >= QUEUE {
            tracing::error!(QUEUE, "too many acquisitions have an unknown outcome: giving up the lease");
            acquisition.live.lease.give_up();
        }
        if !acquisition.live.lease.is_lost() && due < acquisition.since + MAX_DELIVERY_DELAY {
            number += 1;
            pending.insert((due, number), acquisition);
        }
    }
}

/// Deletes a key, retrying until its lease is lost. Returns whether the key is known to be absent.
async fn delete<K: Kv>(kv: &K, live: &LiveKey, mut backoff: Backoff) -> bool {
    while !live.lease.is_lost() {
        match kv.txn(live.deletion()).await {
            Ok(_) => return true,
            Err(error) => {
                tracing::warn!(%error, key = live.key, "cannot delete the key of a dropped lock, retrying");
                tokio::select! { biased; () = sleep(backoff.pause()) => {}, () = live.lease.lost() => {} }
            }
        }
    }
    false
}
