//! One watch on everything that is owned, awaited by everybody who waits: for one key to go, or for its turn in a queue. Only those wake who
//! can go on. While nobody waits there is no watch: what is done uncontended costs nothing here.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{Arc, Mutex, PoisonError},
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
    waits::Behind,
};

/// How long the watch is kept after the last one who waited, at least; at most it is twice that.
const IDLE: Duration = Duration::from_secs(30);

/// The owned keys, as far as the watch has come.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    state: Mutex<State>,
    wanted: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// How far the watch has come; nowhere while there is none.
    revision: u64,
    keys: BTreeMap<String, u64>,
    /// Of these keys, those whose owners are done with them and that are being removed, by the revision at which they came to be.
    leaving: BTreeSet<u64>,
    /// Somebody has begun to wait since this was last looked at.
    asked: bool,
    /// In order, as every choice here that nobody makes: so that a simulation does the same twice.
    waiters: BTreeMap<String, Vec<Waiter>>,
    /// By where they begin.
    queues: BTreeMap<String, Queue>,
}

#[derive(Debug)]
struct Queue {
    range: KeyRange,
    /// By the revision at which a place came to be: who waits for its turn.
    places: BTreeMap<u64, oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Waiter {
    created: u64,
    wake: oneshot::Sender<()>,
}

impl Mirror {
    /// Resolves when the key that came to be at that revision is gone.
    pub(crate) async fn gone(&self, key: &str, created: u64) {
        let waiting = {
            let mut state = self.lock();
            match state.keys.get(key) {
                Some(&there) if there > created => return,
                None if created <= state.revision => return,
                // It is there, or the watch has not come to its creation yet.
                _ => {
                    let (wake, waiting) = oneshot::channel();
                    let waiters = state.waiters.entry(key.to_owned()).or_default();
                    waiters.retain(|waiter| !waiter.wake.is_closed());
                    waiters.push(Waiter { created, wake });
                    self.want(&mut state);
                    waiting
                }
            }
        };
        // An error would mean that the mirror is gone, and it is borrowed here.
        let _ = waiting.await;
    }

    /// Resolves when nothing that came to be before that revision is left in the queue; the place in it came to be at that revision.
    pub(crate) async fn turn(&self, queue: KeyRange, created: u64) {
        let waiting = {
            let mut state = self.lock();
            if state.free(&queue, created) {
                return;
            }
            let (wake, waiting) = oneshot::channel();
            let from = queue.start.clone();
            let queue = state.queues.entry(from).or_insert_with(|| Queue { range: queue, places: BTreeMap::new() });
            queue.places.insert(created, wake);
            self.want(&mut state);
            waiting
        };
        // As above.
        let _ = waiting.await;
    }

    /// How many are ahead, as far as the watch has come.
    pub(crate) fn ahead(&self, behind: &Behind) -> usize {
        let state = self.lock();
        let queue = behind.queue.as_ref().map_or(0, |(range, created)| state.before(range, *created).count());
        let owned = behind.owner.as_ref().is_some_and(|(key, created)| state.keys.get(key) == Some(created));
        queue + usize::from(owned)
    }

    /// Whether the key that came to be at that revision is there, as far as the watch has come.
    pub(crate) fn holds(&self, key: &str, created: u64) -> bool {
        self.lock().keys.get(key) == Some(&created)
    }

    /// Whoever put the key that came to be at that revision is done with it, and nothing that was asked for in its name can come yet; it is
    /// being removed. Who is next in its queue here goes on at once: nobody else can come in between.
    pub(crate) fn leaving(&self, key: &str, created: u64) {
        let mut state = self.lock();
        if state.keys.get(key) == Some(&created)
            && let Some(queue) = queue_of(key)
        {
            state.leaving.insert(created);
            state.advance(queue);
        }
    }

    /// A key that came to be at that revision was removed here: whoever waits for it need not wait for the watch to tell.
    pub(crate) fn removed(&self, key: &str, created: u64) {
        let mut state = self.lock();
        if state.keys.get(key) == Some(&created) {
            state.keys.remove(key);
            state.leaving.remove(&created);
        }
        if let Some(waiters) = state.waiters.get_mut(key)
            && !wake(waiters, |there| there <= created)
        {
            state.waiters.remove(key);
        }
        if let Some(queue) = queue_of(key) {
            state.advance(queue);
        }
    }

    /// Follows the keys until `stop`, while anybody waits; lists again whenever the watch breaks.
    pub(crate) async fn follow<K: Kv>(
        self: Arc<Self>,
        kv: Arc<K>,
        keys: KeyRange,
        jitter: Arc<Jitter>,
        stop: CancellationToken,
    ) {
        let mut backoff = Backoff::new(&jitter);
        let run = async {
            loop {
                while !self.lock().wanted() {
                    self.wanted.notified().await;
                }
                let error = match kv.list_and_watch(keys.clone()).await {
                    Err(error) => error,
                    Ok(mut followed) => {
                        backoff.reset();
                        self.lock().list(followed.revision, followed.keys);
                        match self.keep_up(followed.events.as_mut(), IDLE).await {
                            Err(error) => error,
                            Ok(()) => continue,
                        }
                    }
                };
                tracing::warn!(%error, "the watch on owned keys broke, listing them again");
                sleep(backoff.pause()).await;
            }
        };
        tokio::select! { biased; () = stop.cancelled() => {}, () = run => {} }
    }

    /// Takes in what the watch tells until it breaks, or until nobody has waited for a while.
    async fn keep_up(&self, events: &mut dyn EventStream, idle: Duration) -> Result<(), KvError> {
        let mut look = interval_at(Instant::now() + idle, idle);
        loop {
            tokio::select! {
                biased;
                next = events.next() => self.lock().apply(next?),
                _ = look.tick() => {
                    let mut state = self.lock();
                    if !state.wanted() && !std::mem::take(&mut state.asked) {
                        state.forget();
                        return Ok(());
                    }
                }
            }
        }
    }

    fn want(&self, state: &mut State) {
        state.asked = true;
        self.wanted.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether anybody waits.
    fn wanted(&mut self) -> bool {
        self.waiters.retain(|_, waiters| waiters.iter().any(|waiter| !waiter.wake.is_closed()));
        self.queues.retain(|_, queue| queue.places.values().any(|wake| !wake.is_closed()));
        !self.waiters.is_empty() || !self.queues.is_empty()
    }

    fn forget(&mut self) {
        self.revision = 0;
        self.keys.clear();
        self.leaving.clear();
    }

    fn list(&mut self, revision: u64, keys: BTreeMap<String, u64>) {
        self.leaving.retain(|created| keys.values().any(|there| there == created));
        (self.revision, self.keys) = (revision, keys);
        let keys = &self.keys;
        self.waiters.retain(|key, waiters| {
            wake(waiters, |created| keys.get(key).map_or(created <= revision, |&there| there > created))
        });
        let queues: Vec<String> = self.queues.keys().cloned().collect();
        queues.iter().for_each(|queue| self.advance(queue));
    }

    /// Those of a range who were there before that revision.
    fn before(&self, range: &KeyRange, created: u64) -> impl Iterator<Item = u64> {
        let to = range.end.as_ref().map_or(Bound::Included(&range.start), Bound::Excluded);
        self.keys
            .range::<String, _>((Bound::Included(&range.start), to))
            .map(|(_, &there)| there)
            .filter(move |there| *there < created && !self.leaving.contains(there))
    }

    fn free(&self, queue: &KeyRange, created: u64) -> bool {
        self.revision >= created && self.before(queue, created).next().is_none()
    }

    /// Wakes those of a queue whose turn it is. Whoever comes after one who must wait must wait too.
    fn advance(&mut self, queue: &str) {
        let Some(Queue { range, mut places }) = self.queues.remove(queue) else { return };
        places.retain(|_, wake| !wake.is_closed());
        while let Some(first) = places.first_entry()
            && self.free(&range, *first.key())
        {
            // One that has stopped waiting needs no waking.
            let _ = first.remove().send(());
        }
        if !places.is_empty() {
            self.queues.insert(queue.to_owned(), Queue { range, places });
        }
    }

    fn apply(&mut self, events: Vec<Event>) {
        let mut touched = BTreeSet::new();
        for Event { key, revision, create_revision: created } in events {
            if let Some(queue) = queue_of(&key)
                && self.queues.contains_key(queue)
            {
                touched.insert(queue.to_owned());
            }
            self.revision = self.revision.max(revision);
            let gone_before = match created {
                Some(created) => {
                    self.keys.insert(key.clone(), created);
                    created
                }
                None => {
                    if let Some(created) = self.keys.remove(&key) {
                        self.leaving.remove(&created);
                    }
                    revision
                }
            };
            if let Some(waiters) = self.waiters.get_mut(&key)
                && !wake(waiters, |created| created < gone_before)
            {
                self.waiters.remove(&key);
            }
        }
        touched.iter().for_each(|queue| self.advance(queue));
    }
}

/// Where the queue begins that a key would have a place in: all but its last word.
fn queue_of(key: &str) -> Option<&str> {
    let (queue, _) = key.rsplit_once(' ')?;
    key.get(..=queue.len())
}

/// Wakes those whose key is gone; answers whether any are left.
fn wake(waiters: &mut Vec<Waiter>, gone: impl Fn(u64) -> bool) -> bool {
    for at in (0..waiters.len()).rev() {
        if waiters.get(at).is_some_and(|waiter| gone(waiter.created) || waiter.wake.is_closed()) {
            // One that has stopped waiting needs no waking.
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
    fn wakes_when_the_key_goes() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::from([("a".to_owned(), 3)]));
        let mut waiting = std::pin::pin!(mirror.gone("a", 3));
        assert!(waiting.as_mut().now_or_never().is_none());
        mirror.lock().apply(vec![delete("b", 6)]);
        assert!(waiting.as_mut().now_or_never().is_none());
        mirror.lock().apply(vec![delete("a", 7)]);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn knows_what_is_gone_already() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::from([("a".to_owned(), 4)]));
        assert!(mirror.gone("b", 5).now_or_never().is_some(), "not listed at 5");
        assert!(mirror.gone("a", 3).now_or_never().is_some(), "another one is there since");
    }

    #[test]
    fn waits_for_what_it_has_not_seen_yet() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::new());
        let mut waiting = std::pin::pin!(mirror.gone("a", 8));
        assert!(waiting.as_mut().now_or_never().is_none());
        mirror.lock().apply(vec![put("a", 8)]);
        assert!(waiting.as_mut().now_or_never().is_none());
        mirror.lock().apply(vec![delete("a", 9), put("a", 10)]);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn a_new_list_wakes_whose_key_went_unseen() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 4)]));
        let mut a = std::pin::pin!(mirror.gone("a", 3));
        let mut b = std::pin::pin!(mirror.gone("b", 4));
        assert!(a.as_mut().now_or_never().is_none() && b.as_mut().now_or_never().is_none());
        mirror.lock().list(9, BTreeMap::from([("b".to_owned(), 4)]));
        assert!(a.now_or_never().is_some());
        assert!(b.as_mut().now_or_never().is_none());
        mirror.lock().list(12, BTreeMap::from([("b".to_owned(), 11)]));
        assert!(b.now_or_never().is_some());
    }

    #[test]
    fn a_queue_goes_on_in_order() {
        let mirror = Mirror::default();
        let all = KeyRange::between("q ", "q!");
        mirror.lock().list(10, BTreeMap::from([("q 1".to_owned(), 3)]));
        let mut turns = [11, 12, 13].map(|created| Box::pin(mirror.turn(all.clone(), created)));
        let mut resolved = || turns.iter_mut().filter_map(|turn| turn.as_mut().now_or_never()).count();
        assert_eq!(resolved(), 0);
        mirror.lock().apply(vec![put("q 2", 11), put("q 3", 12), put("q 4", 13)]);
        assert_eq!(mirror.ahead(&Behind { queue: Some((all.clone(), 13)), owner: None }), 3);
        assert_eq!(resolved(), 0);
        mirror.lock().apply(vec![delete("q 1", 14)]);
        let [first, second, third] = &mut turns;
        assert!(first.as_mut().now_or_never().is_some());
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        // Seen by a new list only.
        mirror.lock().list(20, BTreeMap::from([("q 4".to_owned(), 13)]));
        assert!(second.now_or_never().is_some() && third.now_or_never().is_some());
        assert!(mirror.lock().queues.is_empty());
    }

    #[test]
    fn who_is_next_here_need_not_wait_for_the_key_to_go() {
        let mirror = Mirror::default();
        let all = KeyRange::between("q ", "q!");
        // The first and the third are of this replica, the second is another's.
        mirror.lock().list(12, ["1", "2", "3", "4"].map(|n| (format!("q {n}"), 8 + n.parse::<u64>().unwrap())).into());
        let mut third = std::pin::pin!(mirror.turn(all.clone(), 11));
        let mut fourth = std::pin::pin!(mirror.turn(all.clone(), 12));
        assert!(third.as_mut().now_or_never().is_none() && fourth.as_mut().now_or_never().is_none());
        mirror.leaving("q 1", 9);
        assert!(third.as_mut().now_or_never().is_none(), "another's turn comes first");
        mirror.lock().apply(vec![delete("q 1", 13), delete("q 2", 14)]);
        assert!(third.as_mut().now_or_never().is_some());
        assert!(fourth.as_mut().now_or_never().is_none());
        mirror.leaving("q 3", 3);
        assert!(fourth.as_mut().now_or_never().is_none(), "an older one of that name");
        mirror.leaving("q 3", 11);
        assert!(fourth.as_mut().now_or_never().is_some());
        assert!(mirror.holds("q 3", 11), "it is there until it goes");
        mirror.lock().list(20, BTreeMap::new());
        assert!(mirror.lock().leaving.is_empty());
    }

    /// A watch that tells nothing.
    struct Quiet;

    impl EventStream for Quiet {
        fn next(&mut self) -> futures::future::BoxFuture<'_, Result<Vec<Event>, KvError>> {
            std::future::pending().boxed()
        }
    }

    #[tokio::test]
    async fn the_watch_ends_when_nobody_has_waited_for_a_while() {
        let mirror = Mirror::default();
        let all = KeyRange::between("q ", "q!");
        mirror.lock().list(9, BTreeMap::from([("q 1".to_owned(), 8)]));
        let mut wait = Box::pin(mirror.turn(all.clone(), 9));
        assert!(wait.as_mut().now_or_never().is_none());
        let mut quiet = Quiet;
        let mut watch = Box::pin(mirror.keep_up(&mut quiet, Duration::from_millis(1)));
        for _ in 0..10 {
            tokio::select! {
                biased;
                ended = &mut watch => panic!("while somebody waits: {ended:?}"),
                () = sleep(Duration::from_millis(1)) => {}
            }
        }
        drop(wait);
        watch.await.unwrap();
        let state = mirror.lock();
        assert!(state.revision == 0 && state.keys.is_empty());
    }

    #[test]
    fn a_place_that_is_not_seen_yet_waits() {
        let mirror = Mirror::default();
        let all = KeyRange::between("q ", "q!");
        mirror.lock().list(10, BTreeMap::new());
        let mut place = std::pin::pin!(mirror.turn(all.clone(), 12));
        assert!(place.as_mut().now_or_never().is_none(), "one before it may not have been seen either");
        mirror.lock().apply(vec![put("q 1", 11), put("q 2", 12)]);
        assert!(place.as_mut().now_or_never().is_none());
        mirror.lock().apply(vec![delete("q 1", 13)]);
        assert!(place.now_or_never().is_some());
    }

    #[test]
    fn who_stops_waiting_is_forgotten() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::from([("a".to_owned(), 3)]));
        for _ in 0..100 {
            assert!(mirror.gone("a", 3).now_or_never().is_none());
        }
        assert_eq!(mirror.lock().waiters.get("a").unwrap().len(), 1);
    }
}
