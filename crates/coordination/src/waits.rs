//! The calls of this replica that wait, listed without a request to the store.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use gauntlet_domain::{ChallengeId, LockKind};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    records::Owner,
    watch_cache::{Predecessors, WatchCache},
};

/// A holder of a lock or an instance, or a waiter in a lock's queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The replica's name.
    pub replica: String,
    /// When it began to hold or to wait, by its own clock.
    pub since: Timestamp,
    /// The trace of its call, in W3C traceparent form.
    pub origin: Option<String>,
}

impl From<&Owner> for Holder {
    fn from(owner: &Owner) -> Self {
        Self { replica: owner.replica.clone(), since: owner.since, origin: owner.origin.clone() }
    }
}

/// A call of this replica that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// What it waits for: `challenge`, `rollout` or `instance`.
    pub kind: &'static str,
    /// The challenge.
    pub challenge: String,
    /// The number of holders and waiters ahead.
    pub position: usize,
    /// When the wait began.
    pub since: Timestamp,
    /// The current holder, if it was among the first in the queue when the wait began.
    pub holder: Option<Holder>,
}

/// All current waits of this replica.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    next: AtomicU64,
    entries: Mutex<BTreeMap<u64, WaitEntry>>,
}

#[derive(Debug)]
pub(crate) struct WaitEntry {
    pub(crate) kind: LockKind,
    pub(crate) challenge: ChallengeId,
    pub(crate) since: Timestamp,
    pub(crate) predecessors: Predecessors,
    /// The first predecessors, in order of creation.
    pub(crate) first: Vec<KeyOwner>,
}

/// A live key and its owner.
#[derive(Debug)]
pub(crate) struct KeyOwner {
    pub(crate) key: String,
    pub(crate) create_revision: u64,
    pub(crate) owner: Owner,
}

impl Waits {
    /// Lists a wait until the handle is dropped.
    pub(crate) fn register(self: &Arc<Self>, entry: WaitEntry) -> WaitHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, entry);
        WaitHandle { waits: self.clone(), number }
    }

    /// The number of waits, and the `limit` oldest of them.
    pub(crate) fn list(&self, watch_cache: &WatchCache, limit: usize) -> (usize, Vec<Wait>) {
        let entries = self.lock();
        let listed = entries.values().take(limit).map(|entry| Wait {
            kind: entry.kind.name(),
            challenge: entry.challenge.as_str().to_owned(),
            position: watch_cache.count(&entry.predecessors),
            since: entry.since,
            holder: current_holder(watch_cache, &entry.first),
        });
        (entries.len(), listed.collect())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, WaitEntry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first of the predecessors whose key still exists.
fn current_holder(watch_cache: &WatchCache, first: &[KeyOwner]) -> Option<Holder> {
    first
        .iter()
        .find(|ahead| watch_cache.contains(&ahead.key, ahead.create_revision))
        .map(|ahead| (&ahead.owner).into())
}

/// Keeps a wait listed.
#[derive(Debug)]
pub(crate) struct WaitHandle {
    waits: Arc<Waits>,
    number: u64,
}

impl WaitHandle {
    /// The current holder of what is waited for.
    pub(crate) fn holder(&self, watch_cache: &WatchCache) -> Option<Holder> {
        let entries = self.waits.lock();
        let first = &entries.get(&self.number)?.first;
        // If the watch has not reached these keys yet, the first predecessor is the best guess.
        current_holder(watch_cache, first).or_else(|| first.first().map(|ahead| (&ahead.owner).into()))
    }
}

impl Drop for WaitHandle {
    fn drop(&mut self) {
        self.waits.lock().remove(&self.number);
    }
}
