//! The adapter's side of an ownership, and the task that removes what was given up by dropping it.

use std::{
    any::Any,
    collections::BTreeMap,
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
    backoff::{Backoff, Jitter},
    kv::{Compare, Kv, LeaseId, Op, Txn},
    names::Name,
    session::Lease,
};

/// Keys that may wait for their removal. Beyond that the whole lease is given up, which removes them too.
const QUEUE: usize = 4096;
/// The longest pause between two looks for what may yet come to be.
const LOOK_LONGEST: Duration = Duration::from_secs(30);
/// What was sent before a network was cut is delivered when it is whole again. After so long the kernel has given up sending.
const LATEST: Duration = Duration::from_secs(1200);

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
            compare: vec![Compare::value(&self.key, self.value.clone())],
            success: vec![Op::delete(&self.key)],
            failure: Vec::new(),
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
    pub(crate) token: u64,
    pub(crate) of: Of,
    reaper: Reaper,
    spent: AtomicBool,
    /// Something was asked for that is good only while it stands.
    used: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(live: LiveKey, token: u64, of: Of, reaper: Reaper) -> Self {
        Self { live, token, of, reaper, spent: AtomicBool::new(false), used: AtomicBool::new(false) }
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
        Compare::create_revision(&self.live.key, self.token)
    }

    /// Whether the store was never asked for anything in its name.
    pub(crate) fn unused(&self) -> bool {
        !self.used.load(Ordering::Acquire)
    }

    /// Gives it up.
    pub(crate) fn removal(&self) -> Txn {
        let stands = Compare::create_revision(&self.live.key, self.token);
        Txn { compare: vec![stands], success: vec![Op::delete(&self.live.key)], failure: Vec::new() }
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
    pub(crate) fn start<K: Kv>(
        kv: Arc<K>,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, given) = mpsc::channel(QUEUE);
        (Self { queue }, async move {
            tokio::select! { biased; () = stop.cancelled() => {}, () = reap(kv, jitter, given) => {} }
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

/// A key that may yet come to be.
struct Suspect {
    live: LiveKey,
    /// Since it was handed in.
    since: Instant,
    /// From one look to the next.
    pause: Duration,
}

async fn reap<K: Kv>(kv: Arc<K>, jitter: Arc<Jitter>, mut given: mpsc::Receiver<Given>) {
    // By the time of the next look; the number tells those of one time apart.
    let mut suspects: BTreeMap<(Instant, u64), Suspect> = BTreeMap::new();
    let mut number = 0;
    loop {
        let due = suspects.first_key_value().map(|((due, _), _)| *due);
        let suspect = tokio::select! {
            biased;
            () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                suspects.pop_first().map(|(_, suspect)| suspect)
            }
            next = given.recv() => match next {
                None => return,
                Some(Given { live, unsure: false }) => {
                    if remove(kv.as_ref(), &live, Backoff::new(&jitter)).await {
                        live.absent();
                    }
                    None
                }
                Some(Given { live, unsure: true }) => {
                    Some(Suspect { live, since: Instant::now(), pause: kv.deadline() })
                }
            },
        };
        let Some(mut suspect) = suspect else { continue };
        remove(kv.as_ref(), &suspect.live, Backoff::new(&jitter)).await;
        suspect.pause = (suspect.pause * 2).min(LOOK_LONGEST);
        let due = Instant::now() + suspect.pause;
        if suspects.len() >= QUEUE {
            tracing::error!(QUEUE, "too many acquisitions may yet come to be: the lease is given up");
            suspect.live.lease.lose();
        }
        if !suspect.live.lease.is_lost() && due < suspect.since + LATEST {
            number += 1;
            suspects.insert((due, number), suspect);
        }
    }
}

/// Answers whether it is gone, and not only its lease.
async fn remove<K: Kv>(kv: &K, live: &LiveKey, mut backoff: Backoff) -> bool {
    while !live.lease.is_lost() {
        match kv.txn(live.removal()).await {
            Ok(_) => return true,
            Err(error) => {
                tracing::warn!(%error, key = live.key, "an ownership that was given up could not be removed, trying again");
                tokio::select! { biased; () = sleep(backoff.pause()) => {}, () = live.lease.lost() => {} }
            }
        }
    }
    false
}
