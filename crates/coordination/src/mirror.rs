//! One watch on everything that is owned, awaited by everybody who waits: each waits for one key to go, and only its waiters wake.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::kv::{Event, Keys, Kv};

const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// The owned keys, as far as the watch has come.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    keys: BTreeMap<String, u64>,
    /// In order, as every choice here that nobody makes: so that a simulation does the same twice.
    waiters: BTreeMap<String, Vec<Waiter>>,
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
                    waiting
                }
            }
        };
        // An error would mean that the mirror is gone, and it is borrowed here.
        let _ = waiting.await;
    }

    /// Follows the keys until `stop`; lists again whenever the watch breaks.
    pub(crate) async fn follow<K: Kv>(self: Arc<Self>, kv: Arc<K>, keys: Keys, stop: CancellationToken) {
        let mut delay = RETRY_FIRST;
        let run = async {
            loop {
                let error = match kv.follow(keys.clone()).await {
                    Err(error) => error,
                    Ok(mut followed) => {
                        delay = RETRY_FIRST;
                        self.lock().list(followed.revision, followed.keys);
                        loop {
                            match followed.events.next().await {
                                Ok(events) => self.lock().apply(events),
                                Err(error) => break error,
                            }
                        }
                    }
                };
                tracing::warn!(%error, "the watch on owned keys broke, listing them again");
                sleep(delay).await;
                delay = (delay * 2).min(RETRY_LONGEST);
            }
        };
        tokio::select! { biased; () = stop.cancelled() => {}, () = run => {} }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn list(&mut self, revision: u64, keys: BTreeMap<String, u64>) {
        (self.revision, self.keys) = (revision, keys);
        let keys = &self.keys;
        self.waiters.retain(|key, waiters| {
            wake(waiters, |created| keys.get(key).map_or(created <= revision, |&there| there > created))
        });
    }

    fn apply(&mut self, events: Vec<Event>) {
        for Event { key, revision, created } in events {
            self.revision = self.revision.max(revision);
            let gone_before = match created {
                Some(created) => {
                    self.keys.insert(key.clone(), created);
                    created
                }
                None => {
                    self.keys.remove(&key);
                    revision
                }
            };
            if let Some(waiters) = self.waiters.get_mut(&key)
                && !wake(waiters, |created| created < gone_before)
            {
                self.waiters.remove(&key);
            }
        }
    }
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
        Event { key: key.to_owned(), revision, created: Some(revision) }
    }

    fn delete(key: &str, revision: u64) -> Event {
        Event { key: key.to_owned(), revision, created: None }
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
    fn who_stops_waiting_is_forgotten() {
        let mirror = Mirror::default();
        mirror.lock().list(5, BTreeMap::from([("a".to_owned(), 3)]));
        for _ in 0..100 {
            assert!(mirror.gone("a", 3).now_or_never().is_none());
        }
        assert_eq!(mirror.lock().waiters.get("a").unwrap().len(), 1);
    }
}
