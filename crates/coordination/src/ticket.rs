//! The adapter's side of an ownership, and the task that removes what was given up by dropping it.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::{ChallengeId, Grant, Instance, LockKind};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    kv::{Compare, Kv, LeaseId, Op, Txn},
    names::Name,
    session::Lease,
};

/// Keys that may wait for their removal. Beyond that the whole lease is given up, which removes them too.
const QUEUE: usize = 4096;
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// A key of ours under a lease; its value is told apart from every other acquisition's.
#[derive(Debug, Clone)]
pub(crate) struct LiveKey {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
    pub(crate) lease: Lease,
    /// What in the key may be used again.
    pub(crate) name: Option<Name>,
}

impl LiveKey {
    pub(crate) fn put(&self) -> Op {
        let lease: LeaseId = self.lease.id;
        Op::Put { key: self.key.clone(), value: self.value.clone(), lease: Some(lease) }
    }

    /// To be called once it is known to be gone, or never to have been.
    pub(crate) fn absent(&self) {
        if let Some(name) = &self.name {
            name.free();
        }
    }

    /// Removes it, and no other that has come to its place.
    pub(crate) fn removal(&self) -> Txn {
        Txn {
            when: vec![Compare::value(&self.key, self.value.clone())],
            then: vec![Op::delete(&self.key)],
            or: Vec::new(),
        }
    }
}

/// What is owned.
#[derive(Debug, Clone)]
pub(crate) enum Of {
    /// A lock, or a place in its queue.
    Lock(LockKind, ChallengeId),
    /// An instance, and how it stood when it was taken (its index keys follow from it).
    Instance(Box<Instance>),
}

/// An ownership. Dropping it hands its key to the reaper.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) live: LiveKey,
    /// The revision at which the key came to be.
    pub(crate) fence: u64,
    pub(crate) of: Of,
    reaper: Reaper,
    spent: AtomicBool,
    /// Something was asked for that is good only while it stands.
    used: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(live: LiveKey, fence: u64, of: Of, reaper: Reaper) -> Self {
        Self { live, fence, of, reaper, spent: AtomicBool::new(false), used: AtomicBool::new(false) }
    }

    /// Its key is gone, or somebody else's: nothing is left to remove.
    pub(crate) fn spend(&self) {
        if !self.spent.swap(true, Ordering::AcqRel) {
            self.live.absent();
        }
    }

    /// Holds in the store as long as the ownership does. What asks for it may yet be under way when its answer is given up.
    pub(crate) fn stands(&self) -> Compare {
        self.used.store(true, Ordering::Release);
        Compare::created(&self.live.key, self.fence)
    }

    /// Whether the store was never asked for anything in its name.
    pub(crate) fn unused(&self) -> bool {
        !self.used.load(Ordering::Acquire)
    }

    /// Gives it up.
    pub(crate) fn removal(&self) -> Txn {
        let stands = Compare::created(&self.live.key, self.fence);
        Txn { when: vec![stands], then: vec![Op::delete(&self.live.key)], or: Vec::new() }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.spent.load(Ordering::Acquire) {
            self.reaper.give(self.live.clone(), false);
        }
    }
}

impl Grant for Ticket {
    fn lost(&self) -> BoxFuture<'static, ()> {
        self.live.lease.lost().boxed()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Where keys to remove are handed in.
#[derive(Debug, Clone)]
pub(crate) struct Reaper {
    queue: mpsc::Sender<Given>,
}

#[derive(Debug)]
struct Given {
    live: LiveKey,
    /// It may yet come to be: look again later.
    unsure: bool,
}

impl Reaper {
    /// The reaper, and the task that works for it until `stop`.
    pub(crate) fn start<K: Kv>(kv: Arc<K>, stop: CancellationToken) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, given) = mpsc::channel(QUEUE);
        (Self { queue }, async move {
            tokio::select! { biased; () = stop.cancelled() => {}, () = reap(kv, given) => {} }
        })
    }

    /// Removes a key in the background, unless its lease goes first.
    pub(crate) fn give(&self, live: LiveKey, unsure: bool) {
        if let Err(TrySendError::Full(given)) = self.queue.try_send(Given { live, unsure }) {
            tracing::error!(QUEUE, "too many ownerships were dropped at once: the lease is given up");
            given.live.lease.lose();
        }
    }
}

async fn reap<K: Kv>(kv: Arc<K>, mut given: mpsc::Receiver<Given>) {
    // In order of time: each is due the same while after it was handed in.
    let mut again: std::collections::VecDeque<(Instant, LiveKey)> = std::collections::VecDeque::new();
    loop {
        let due = again.front().map(|(due, _)| *due);
        let live = tokio::select! {
            biased;
            () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                again.pop_front().map(|(_, live)| (live, true))
            }
            next = given.recv() => match next {
                None => return,
                Some(Given { live, unsure }) => {
                    if unsure {
                        again.push_back((Instant::now() + kv.deadline() * 2, live.clone()));
                    }
                    Some((live, unsure))
                }
            },
        };
        if let Some((live, unsure)) = live
            && remove(kv.as_ref(), &live).await
            && !unsure
        {
            live.absent();
        }
    }
}

/// Answers whether it is gone, and not only its lease.
async fn remove<K: Kv>(kv: &K, live: &LiveKey) -> bool {
    let mut delay = RETRY_FIRST;
    while !live.lease.is_lost() {
        match kv.txn(live.removal()).await {
            Ok(_) => return true,
            Err(error) => {
                tracing::warn!(%error, key = live.key, "an ownership that was given up could not be removed, trying again");
                tokio::select! { biased; () = sleep(delay) => {}, () = live.lease.lost() => {} }
                delay = (delay * 2).min(RETRY_LONGEST);
            }
        }
    }
    false
}
