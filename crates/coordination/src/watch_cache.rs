//! A watch on all live keys that serves every waiter of this replica: for one key's deletion, or for a turn in a lock's queue. It wakes only
//! the waiters that can proceed. Without waiters there is no watch, so an uncontended lock costs nothing here.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, interval_at, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::{Backoff, Jitter},
    kv::{Event, EventStream, KeyRange, Kv, KvError},
};

/// The watch is closed after it has had no waiter for this long, or for twice that at most.
const IDLE: Duration = Duration::from_secs(30);

/// The live keys as of the last event of the watch.
#[derive(Debug, Default)]
pub(crate) struct WatchCache {
    state: Mutex<State>,
    waiter_added: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The revision that the watch has reached; 0 without a watch.
    revision: u64,
    /// The live keys and their create revisions.
    keys: BTreeMap<String, u64>,
    /// The create revisions of keys that their owners are deleting and no longer depend on.
    releasing: BTreeSet<u64>,
    /// Whether a waiter was added since the last idle check.
    active: bool,
    /// Waiters for the deletion of a key. All maps here are ordered, so that a simulation can be replayed.
    waiters: BTreeMap<String, Vec<Waiter>>,
    /// Waiters for a turn, by the start of the queue's range.
    queues: BTreeMap<String, Queue>,
}

#[derive(Debug)]
struct Queue {
    range: KeyRange,
    /// By the create revision of the waiter's key.
    waiters: BTreeMap<u64, oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Waiter {
    /// The create revision of the key.
    create_revision: u64,
    wake: oneshot::Sender<()>,
}

/// The keys that must be deleted before a call can proceed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Predecessors {
    /// All keys of this range that were created before this revision.
    pub(crate) queue: Option<(KeyRange, u64)>,
    /// The key that was created at this revision.
    pub(crate) owner: Option<(String, u64)>,
}

impl WatchCache {
    /// Resolves once the key that was created at `create_revision` is deleted.
    pub(crate) async fn wait_deleted(&self, key: &str, create_revision: u64) {
        let woken = {
            let mut state = self.lock();
            match state.keys.get(key) {
                Some(&current) if current > create_revision => return,
                None if create_revision <= state.revision => return,
                // The key exists, or the watch has not reached its creation yet.
                _ => {
                    let (wake, woken) = oneshot::channel();
                    let waiters = state.waiters.entry(key.to_owned()).or_default();
                    waiters.retain(|waiter| !waiter.wake.is_closed());
                    waiters.push(Waiter { create_revision, wake });
                    self.request_watch(&mut state);
                    woken
                }
            }
        };
        // The sender is dropped only after a wake-up, because `self` is borrowed here.
        let _ = woken.await;
    }

    /// Resolves once the watch has reached `create_revision`, where the caller's key was created, and the queue holds no key created before it.
    pub(crate) async fn wait_turn(&self, queue: KeyRange, create_revision: u64) {
        let woken = {
            let mut state = self.lock();
            if state.is_turn(&queue, create_revision) {
                return;
            }
            let (wake, woken) = oneshot::channel();
            let start = queue.start.clone();
            let queue = state.queues.entry(start).or_insert_with(|| Queue { range: queue, waiters: BTreeMap::new() });
            queue.waiters.insert(create_revision, wake);
            self.request_watch(&mut state);
            woken
        };
        // As in `wait_deleted`.
        let _ = woken.await;
    }

    /// The number of predecessors that are left, as far as the watch has come.
    pub(crate) fn count(&self, predecessors: &Predecessors) -> usize {
        let state = self.lock();
        let queued =
            predecessors.queue.as_ref().map_or(0, |(range, revision)| state.created_before(range, *revision).count());
        let owned = predecessors.owner.as_ref().is_some_and(|(key, revision)| state.keys.get(key) == Some(revision));
        queued + usize::from(owned)
    }

    /// Whether the key that was created at `create_revision` exists, as far as the watch has come.
    pub(crate) fn contains(&self, key: &str, create_revision: u64) -> bool {
        self.lock().keys.get(key) == Some(&create_revision)
    }

    /// Hands a lock over to the next waiter of this replica while the holder's key is still being deleted. Call only if no write that depends
    /// on the key can be in flight. A waiter of another replica that comes first still goes first.
    pub(crate) fn mark_releasing(&self, key: &str, create_revision: u64) {
        let mut state = self.lock();
        if state.keys.get(key) == Some(&create_revision)
            && let Some(queue) = queue_of(key)
        {
            state.releasing.insert(create_revision);
            state.wake_queue(queue);
        }
    }

    /// Applies a deletion by this replica, so that its waiters need not wait for the watch.
    pub(crate) fn mark_deleted(&self, key: &str, create_revision: u64) {
        let mut state = self.lock();
        if state.keys.get(key) == Some(&create_revision) {
            state.keys.remove(key);
            state.releasing.remove(&create_revision);
        }
        if let Some(waiters) = state.waiters.get_mut(key)
            && !wake_waiters(waiters, |awaited| awaited <= create_revision)
        {
            state.waiters.remove(key);
        }
        if let Some(queue) = queue_of(key) {
            state.wake_queue(queue);
        }
    }

    /// Watches a range until `stop`, whenever there are waiters. Lists it again when the watch breaks.
    pub(crate) async fn run<K: Kv>(
        self: Arc<Self>,
        kv: Arc<K>,
        range: KeyRange,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) {
        let mut backoff = Backoff::new(&jitter);
        let run = async {
            loop {
                while !self.lock().has_waiters() {
                    self.waiter_added.notified().await;
                }
                let error = match kv.list_and_watch(range.clone()).await {
                    Err(error) => error,
                    Ok(mut watch) => {
                        backoff.reset();
                        self.lock().replace(watch.revision, watch.keys);
                        match self.apply_events(watch.events.as_mut(), IDLE).await {
                            Err(error) => error,
                            Ok(()) => continue,
                        }
                    }
                };
                tracing::warn!(%error, "the watch on live keys failed, listing them again");
                sleep(backoff.pause()).await;
            }
        };
        tokio::select! { biased; () = stop.cancelled() => {}, () = run => {} }
    }

    /// Applies events until the watch breaks, or until it has been idle.
    async fn apply_events(&self, events: &mut dyn EventStream, idle: Duration) -> Result<(), KvError> {
        let mut idle_check = interval_at(Instant::now() + idle, idle);
        loop {
            tokio::select! {
                biased;
                next = events.next() => self.lock().apply(next?),
                _ = idle_check.tick() => {
                    let mut state = self.lock();
                    if !state.has_waiters() && !mem::take(&mut state.active) {
                        state.clear();
                        return Ok(());
                    }
                }
            }
        }
    }

    fn request_watch(&self, state: &mut State) {
        state.active = true;
        self.waiter_added.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether any waiter is left, after dropping the cancelled ones.
    fn has_waiters(&mut self) -> bool {
        self.waiters.retain(|_, waiters| waiters.iter().any(|waiter| !waiter.wake.is_closed()));
        self.queues.retain(|_, queue| queue.waiters.values().any(|wake| !wake.is_closed()));
        !self.waiters.is_empty() || !self.queues.is_empty()
    }

    fn clear(&mut self) {
        self.revision = 0;
        self.keys.clear();
        self.releasing.clear();
    }

    /// Replaces all keys by a new list.
    fn replace(&mut self, revision: u64, keys: BTreeMap<String, u64>) {
        self.releasing.retain(|releasing| keys.values().any(|current| current == releasing));
        (self.revision, self.keys) = (revision, keys);
        let keys = &self.keys;
        self.waiters.retain(|key, waiters| {
            wake_waiters(waiters, |awaited| keys.get(key).map_or(awaited <= revision, |&current| current > awaited))
        });
        let queues: Vec<String> = self.queues.keys().cloned().collect();
        queues.iter().for_each(|queue| self.wake_queue(queue));
    }

    /// The create revisions below `revision` in a range, without keys that are being released.
    fn created_before(&self, range: &KeyRange, revision: u64) -> impl Iterator<Item = u64> {
        let end = range.end.as_ref().map_or(Bound::Included(&range.start), Bound::Excluded);
        self.keys
            .range::<String, _>((Bound::Included(&range.start), end))
            .map(|(_, &create_revision)| create_revision)
            .filter(move |create_revision| *create_revision < revision && !self.releasing.contains(create_revision))
    }

    fn is_turn(&self, queue: &KeyRange, create_revision: u64) -> bool {
        self.revision >= create_revision && self.created_before(queue, create_revision).next().is_none()
    }

    /// Wakes waiters at the head of the queue, in order; stops at the first that must keep waiting.
    fn wake_queue(&mut self, queue: &str) {
        let Some(Queue { range, mut waiters }) = self.queues.remove(queue) else { return };
        waiters.retain(|_, wake| !wake.is_closed());
        while let Some(first) = waiters.first_entry()
            && self.is_turn(&range, *first.key())
        {
            // Fails if the waiter was cancelled meanwhile.
            let _ = first.remove().send(());
        }
        if !waiters.is_empty() {
            self.queues.insert(queue.to_owned(), Queue { range, waiters });
        }
    }

    fn apply(&mut self, events: Vec<Event>) {
        let mut changed_queues = BTreeSet::new();
        for Event { key, revision, create_revision } in events {
            if let Some(queue) = queue_of(&key)
                && self.queues.contains_key(queue)
            {
                changed_queues.insert(queue.to_owned());
            }
            self.revision = self.revision.max(revision);
            let deleted_before = match create_revision {
                Some(create_revision) => {
                    self.keys.insert(key.clone(), create_revision);
                    create_revision
                }
                None => {
                    if let Some(create_revision) = self.keys.remove(&key) {
                        self.releasing.remove(&create_revision);
                    }
                    revision
                }
            };
            if let Some(waiters) = self.waiters.get_mut(&key)
                && !wake_waiters(waiters, |awaited| awaited < deleted_before)
            {
                self.waiters.remove(&key);
            }
        }
        changed_queues.iter().for_each(|queue| self.wake_queue(queue));
    }
}

/// The start of the queue that a key belongs to: the key without its last word.
fn queue_of(key: &str) -> Option<&str> {
    let (queue, _) = key.rsplit_once(' ')?;
    key.get(..=queue.len())
}

/// Wakes the waiters whose key is deleted. Returns whether any waiter is left.
fn wake_waiters(waiters: &mut Vec<Waiter>, deleted: impl Fn(u64) -> bool) -> bool {
    for at in (0..waiters.len()).rev() {
        if waiters.get(at).is_some_and(|waiter| deleted(waiter.create_revision) || waiter.wake.is_closed()) {
            // Fails if the waiter was cancelled.
            let _ = waiters.swap_remove(at).wake.send(());
        }
    }
    !waiters.is_empty()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use futures::FutureExt as _;

    use super::*;

    fn put(key: &str, revision: u64) -> Event {
        Event { key: key.to_owned(), revision, create_revision: Some(revision) }
    }

    fn delete(key: &str, revision: u64) -> Event {
        Event { key: key.to_owned(), revision, create_revision: None }
    }

    #[test]
    fn deletion_wakes_waiter() {
        let cache = WatchCache::default();
        cache.lock().replace(5, BTreeMap::from([("a".to_owned(), 3)]));
        let mut waiting = std::pin::pin!(cache.wait_deleted("a", 3));
        assert!(waiting.as_mut().now_or_never().is_none());
        cache.lock().apply(vec![delete("b", 6)]);
        assert!(waiting.as_mut().now_or_never().is_none());
        cache.lock().apply(vec![delete("a", 7)]);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn deleted_key_needs_no_wait() {
        let cache = WatchCache::default();
        cache.lock().replace(5, BTreeMap::from([("a".to_owned(), 4)]));
        assert!(cache.wait_deleted("b", 5).now_or_never().is_some(), "not listed at 5");
        assert!(cache.wait_deleted("a", 3).now_or_never().is_some(), "the key was created again since");
    }

    #[test]
    fn key_beyond_watched_revision_waits() {
        let cache = WatchCache::default();
        cache.lock().replace(5, BTreeMap::new());
        let mut waiting = std::pin::pin!(cache.wait_deleted("a", 8));
        assert!(waiting.as_mut().now_or_never().is_none());
        cache.lock().apply(vec![put("a", 8)]);
        assert!(waiting.as_mut().now_or_never().is_none());
        cache.lock().apply(vec![delete("a", 9), put("a", 10)]);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn new_list_wakes_waiters_of_missed_deletions() {
        let cache = WatchCache::default();
        cache.lock().replace(5, BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 4)]));
        let mut a = std::pin::pin!(cache.wait_deleted("a", 3));
        let mut b = std::pin::pin!(cache.wait_deleted("b", 4));
        assert!(a.as_mut().now_or_never().is_none() && b.as_mut().now_or_never().is_none());
        cache.lock().replace(9, BTreeMap::from([("b".to_owned(), 4)]));
        assert!(a.now_or_never().is_some());
        assert!(b.as_mut().now_or_never().is_none());
        cache.lock().replace(12, BTreeMap::from([("b".to_owned(), 11)]));
        assert!(b.now_or_never().is_some());
    }

    #[test]
    fn queue_wakes_waiters_in_order() {
        let cache = WatchCache::default();
        let all = KeyRange::between("q ", "q!");
        cache.lock().replace(10, BTreeMap::from([("q 1".to_owned(), 3)]));
        let mut turns = [11, 12, 13].map(|created| Box::pin(cache.wait_turn(all.clone(), created)));
        let mut resolved = || turns.iter_mut().filter_map(|turn| turn.as_mut().now_or_never()).count();
        assert_eq!(resolved(), 0);
        cache.lock().apply(vec![put("q 2", 11), put("q 3", 12), put("q 4", 13)]);
        assert_eq!(cache.count(&Predecessors { queue: Some((all.clone(), 13)), owner: None }), 3);
        assert_eq!(resolved(), 0);
        cache.lock().apply(vec![delete("q 1", 14)]);
        let [first, second, third] = &mut turns;
        assert!(first.as_mut().now_or_never().is_some());
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        // The watch missed these deletions.
        cache.lock().replace(20, BTreeMap::from([("q 4".to_owned(), 13)]));
        assert!(second.now_or_never().is_some() && third.now_or_never().is_some());
        assert!(cache.lock().queues.is_empty());
    }

    #[test]
    fn releasing_key_hands_over_within_the_replica() {
        let cache = WatchCache::default();
        let all = KeyRange::between("q ", "q!");
        // The first and the third key are of this replica, the second is of another.
        cache
            .lock()
            .replace(12, ["1", "2", "3", "4"].map(|n| (format!("q {n}"), 8 + n.parse::<u64>().unwrap())).into());
        let mut third = std::pin::pin!(cache.wait_turn(all.clone(), 11));
        let mut fourth = std::pin::pin!(cache.wait_turn(all.clone(), 12));
        assert!(third.as_mut().now_or_never().is_none() && fourth.as_mut().now_or_never().is_none());
        cache.mark_releasing("q 1", 9);
        assert!(third.as_mut().now_or_never().is_none(), "another replica's turn comes first");
        cache.lock().apply(vec![delete("q 1", 13), delete("q 2", 14)]);
        assert!(third.as_mut().now_or_never().is_some());
        assert!(fourth.as_mut().now_or_never().is_none());
        cache.mark_releasing("q 3", 3);
        assert!(fourth.as_mut().now_or_never().is_none(), "an earlier key of that name");
        cache.mark_releasing("q 3", 11);
        assert!(fourth.as_mut().now_or_never().is_some());
        assert!(cache.contains("q 3", 11), "the key exists until it is deleted");
        cache.lock().replace(20, BTreeMap::new());
        assert!(cache.lock().releasing.is_empty());
    }

    /// A watch without events.
    struct Quiet;

    impl EventStream for Quiet {
        fn next(&mut self) -> futures::future::BoxFuture<'_, Result<Vec<Event>, KvError>> {
            std::future::pending().boxed()
        }
    }

    #[tokio::test]
    async fn idle_watch_is_closed() {
        let cache = WatchCache::default();
        let all = KeyRange::between("q ", "q!");
        cache.lock().replace(9, BTreeMap::from([("q 1".to_owned(), 8)]));
        let mut wait = Box::pin(cache.wait_turn(all.clone(), 9));
        assert!(wait.as_mut().now_or_never().is_none());
        let mut quiet = Quiet;
        let mut watch = Box::pin(cache.apply_events(&mut quiet, Duration::from_millis(1)));
        for _ in 0..10 {
            tokio::select! {
                biased;
                ended = &mut watch => panic!("closed while a call waits: {ended:?}"),
                () = sleep(Duration::from_millis(1)) => {}
            }
        }
        drop(wait);
        watch.await.unwrap();
        let state = cache.lock();
        assert!(state.revision == 0 && state.keys.is_empty());
    }

    #[test]
    fn place_beyond_watched_revision_waits() {
        let cache = WatchCache::default();
        let all = KeyRange::between("q ", "q!");
        cache.lock().replace(10, BTreeMap::new());
        let mut place = std::pin::pin!(cache.wait_turn(all.clone(), 12));
        assert!(place.as_mut().now_or_never().is_none(), "an earlier key may not have been watched yet either");
        cache.lock().apply(vec![put("q 1", 11), put("q 2", 12)]);
        assert!(place.as_mut().now_or_never().is_none());
        cache.lock().apply(vec![delete("q 1", 13)]);
        assert!(place.now_or_never().is_some());
    }

    #[test]
    fn cancelled_waiters_are_dropped() {
        let cache = WatchCache::default();
        cache.lock().replace(5, BTreeMap::from([("a".to_owned(), 3)]));
        for _ in 0..100 {
            assert!(cache.wait_deleted("a", 3).now_or_never().is_none());
        }
        assert_eq!(cache.lock().waiters.get("a").unwrap().len(), 1);
    }
}
