//! Challenge locks, first come, first served, and waiting for whatever blocks a call.
//!
//! To acquire a lock, a call puts a key of its own into the lock's queue. The key's create revision is its place: the call holds the lock once
//! no key with a lower create revision is left. A free lock is taken in one transaction. Between consecutive calls of one replica the lock is
//! handed over in memory, while the key of the first is still being deleted.

use std::sync::Arc;
use std::time::Duration;

use gauntlet_domain::{ChallengeId, Error, LockGuard, LockKind, LockOptions, Result, WaitStats};
use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};

use crate::{
    commit::guard,
    core::Core,
    kv::{Compare, Get, KeyRange, KeyValue, Kv, Op, Txn},
    owned_key::{OwnedKey, Subject},
    records::Owner,
    session::Lease,
    waits::{Holder, KeyOwner, WaitEntry, WaitHandle},
    watch_cache::Predecessors,
};

/// The number of keys that are read from a queue, so that the cost of a waiter doesn't grow with the queue.
const QUEUE_READ_LIMIT: usize = 16;

impl<K: Kv> Core<K> {
    /// Acquires a lock. Without a timeout it never enters the queue.
    pub(crate) async fn lock(
        self: &Arc<Self>,
        kind: LockKind,
        id: &ChallengeId,
        options: &LockOptions,
    ) -> Result<LockGuard> {
        let mut wait = LockWait::new(options, kind, id, || format!("the {} lock of {id:?}", kind.name()));
        let lease = self.lease().await?;
        let queue = self.layout.queue(kind, id);
        let slot = self.key_slots.acquire(&queue.start, lease.id);
        let key = self.layout.lock(kind, id, &slot.name());
        let live = self.live_key(lease, options, key, Some(slot));
        let enqueue = !options.timeout.is_zero();
        let read_queue = Op::Get(Get { range: queue.clone(), limit: QUEUE_READ_LIMIT, keys_only: false });
        let txn = Txn {
            compare: vec![Compare::absent(queue.clone())],
            success: vec![live.put()],
            failure: enqueue.then(|| live.put()).into_iter().chain([read_queue]).collect(),
        };
        let own_key = live.key.clone();
        let (owned, mut response) = self.put_live(live, Subject::Lock(kind, id.clone()), txn, enqueue).await?;
        let mut ahead = response.next_read();
        // Before this call's own key is taken out: the read may have included it.
        let truncated = ahead.len() == QUEUE_READ_LIMIT;
        ahead.retain(|kv| kv.key != own_key);
        let Some(owned) = owned else {
            let all = Predecessors { queue: Some((queue, u64::MAX)), owner: None };
            let depth = ahead.len().max(if truncated { self.watch_cache.count(&all) } else { 0 });
            let holder = owners(self, ahead).first().map(|first| (&first.owner).into());
            return Err(wait.busy(depth, holder.as_ref()));
        };
        if response.succeeded {
            return self.lock_guard(kind, owned, wait);
        }
        let predecessors = Predecessors { queue: Some((queue.clone(), owned.token)), owner: None };
        let depth = ahead.len().max(if truncated { self.watch_cache.count(&predecessors) } else { 0 });
        let handle = wait.register(self, depth, ahead, predecessors.clone());
        let turn = self.watch_cache.wait_turn(queue, owned.token);
        let Some(result) = wait.wait_until(self, &owned.live.lease, turn).await else {
            // If the watch has not reached this key yet, report the depth at the start.
            let watched = self.watch_cache.contains(&owned.live.key, owned.token);
            let ahead = if watched { self.watch_cache.count(&predecessors).max(1) } else { depth };
            let busy = wait.busy(ahead, handle.holder(&self.watch_cache).as_ref());
            // Deleted before this returns, so that no caller sees a place that was given up.
            let core = self.clone();
            self.detached(async move {
                if core.kv.txn(owned.deletion()).await.is_ok() {
                    core.mark_deleted(&owned);
                }
                Ok(())
            })
            .await?;
            return Err(busy);
        };
        result?;
        drop(handle);
        self.lock_guard(kind, owned, wait)
    }

    /// A guard of an acquired lock; fails if its lease may have expired meanwhile, for example while the process was paused.
    fn lock_guard(self: &Arc<Self>, kind: LockKind, owned: OwnedKey, wait: LockWait) -> Result<LockGuard> {
        if owned.live.lease.is_lost() {
            return Err(lease_lost(self.kv.name()));
        }
        Ok(guard(self, kind, owned, wait.stats()))
    }
}

fn lease_lost(what: &'static str) -> Error {
    Error::Unavailable { what, detail: "the lease was lost while waiting".to_owned() }
}

/// The owners of live keys, in order of creation. Logs and leaves out those that cannot be read.
pub(crate) fn owners<K: Kv>(core: &Core<K>, mut keys: Vec<KeyValue>) -> Vec<KeyOwner> {
    keys.sort_by_key(|kv| kv.create_revision);
    let read = |kv: KeyValue| match Owner::read(&kv.value) {
        Ok(owner) => Some(KeyOwner { key: kv.key, create_revision: kv.create_revision, owner }),
        Err(problem) => {
            core.log_unreadable(&kv.key, kv.mod_revision, &problem);
            None
        }
    };
    keys.into_iter().filter_map(read).collect()
}

/// The live keys that block a call, as a refused transaction read them.
#[derive(Debug, Default)]
pub(crate) struct Blockers {
    /// The instance's owner key, if any.
    owner: Vec<KeyValue>,
    /// The first keys of the queue.
    first: Vec<KeyValue>,
    /// The number of keys in the queue.
    count: usize,
    /// The queue, and the revision before which its keys were created.
    queue: Option<(KeyRange, u64)>,
}

impl Blockers {
    /// The owner of an instance.
    pub(crate) fn owner(owner: Vec<KeyValue>) -> Self {
        Self { owner, ..Self::default() }
    }

    /// Adds a queue that was read by [`oldest_in_queue`] at `revision`.
    pub(crate) fn and_queue(self, queue: KeyRange, (first, count): (Vec<KeyValue>, usize), revision: u64) -> Self {
        Self { first, count, queue: Some((queue, revision + 1)), ..self }
    }
}

/// Reads the first keys of a queue and counts all of them.
pub(crate) fn oldest_in_queue(queue: &KeyRange) -> Op {
    Op::Oldest { range: queue.clone(), limit: QUEUE_READ_LIMIT }
}

/// One call's waiting for locks: its deadline, and what it has waited for.
pub(crate) struct LockWait {
    started: Instant,
    deadline: Instant,
    kind: LockKind,
    challenge: ChallengeId,
    /// What is waited for, for [`Error::Busy`].
    what: String,
    stats: WaitStats,
}

impl LockWait {
    pub(crate) fn new(
        options: &LockOptions,
        kind: LockKind,
        challenge: &ChallengeId,
        what: impl FnOnce() -> String,
    ) -> Self {
        let started = Instant::now();
        // A timeout beyond the range of the clock counts as a day.
        let deadline = started.checked_add(options.timeout).unwrap_or(started + Duration::from_secs(86_400));
        Self { started, deadline, kind, challenge: challenge.clone(), what: what(), stats: WaitStats::default() }
    }

    pub(crate) fn stats(self) -> WaitStats {
        self.stats
    }

    /// Waits until every one of the blocking keys is deleted. [`Error::Busy`] at the deadline.
    pub(crate) async fn wait_for<K: Kv>(&mut self, core: &Core<K>, blockers: Blockers) -> Result<()> {
        let Blockers { owner, first, count, queue } = blockers;
        let depth = count + owner.len();
        let mut keys = owner;
        let predecessors = Predecessors {
            owner: keys.first().map(|kv| (kv.key.clone(), kv.create_revision)),
            queue: queue.filter(|_| !first.is_empty()),
        };
        keys.extend(first);
        if keys.is_empty() {
            return Ok(());
        }
        let mut lease = core.lease().await?;
        keys.sort_by_key(|kv| kv.create_revision);
        let blocking: Vec<_> = keys.iter().map(|kv| (kv.key.clone(), kv.create_revision)).collect();
        let handle = self.register(core, depth, keys, predecessors);
        for (deleted, (key, create_revision)) in blocking.iter().enumerate() {
            loop {
                match self.wait_until(core, &lease, core.watch_cache.wait_deleted(key, *create_revision)).await {
                    Some(Ok(())) => break,
                    // This call owns nothing under the lease yet, so it waits on under the next one.
                    Some(Err(_)) => lease = core.lease().await?,
                    None => {
                        let ahead = depth.saturating_sub(deleted);
                        return Err(self.busy(ahead, handle.holder(&core.watch_cache).as_ref()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Records what is waited for, and lists the wait until the handle is dropped.
    fn register<K: Kv>(
        &mut self,
        core: &Core<K>,
        depth: usize,
        ahead: Vec<KeyValue>,
        predecessors: Predecessors,
    ) -> WaitHandle {
        let known = owners(core, ahead);
        if !self.stats.contended {
            self.stats.contended = true;
            self.stats.queue_depth = depth as u64;
        }
        self.stats.holder = known.last().and_then(|last| last.owner.origin.clone());
        let (kind, challenge) = (self.kind, self.challenge.clone());
        core.waits.register(WaitEntry { kind, challenge, since: Timestamp::now(), predecessors, first: known })
    }

    /// Waits for `turn`, and fails if the lease is lost first. `None` at the deadline.
    async fn wait_until<K: Kv>(
        &self,
        core: &Core<K>,
        lease: &Lease,
        turn: impl Future<Output = ()>,
    ) -> Option<Result<()>> {
        let turn = async {
            tokio::select! {
                biased;
                () = turn => Ok(()),
                () = lease.lost() => Err(lease_lost(core.kv.name())),
            }
        };
        timeout_at(self.deadline, turn).await.ok()
    }

    fn busy(&self, ahead: usize, holder: Option<&Holder>) -> Error {
        let waited_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let held_by =
            holder.map_or(String::new(), |Holder { replica, since, .. }| format!(" (held by {replica} since {since})"));
        Error::Busy { what: format!("{}{held_by}", self.what), waited_ms, ahead: ahead as u64 }
    }
}
