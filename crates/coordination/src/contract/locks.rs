//! Locks: order, timeouts, cancellation and fencing tokens.

use futures::FutureExt as _;

use super::*;

pub(super) async fn free_lock_is_acquired_without_waiting(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
    assert_eq!(guard.waited, gauntlet_domain::WaitStats::default());
    assert_eq!(guard.kind, LockKind::Challenge);
    assert_eq!(store.live_keys().await.len(), 1);
    guard.release().await.unwrap();
    assert!(store.live_keys().await.is_empty());
}

pub(super) async fn lock_is_granted_in_request_order(fixture: &impl Fixture) {
    let stores = ["a", "b", "c"].map(|name| fixture.replica(name));
    let first = stores[0].lock(LockKind::Rollout, &challenge_id("web"), &long_timeout()).await.unwrap();
    let order = std::sync::Mutex::new(Vec::new());
    let mut waiting = Vec::new();
    for n in 0..8 {
        let mut one = Box::pin({
            // Two neighbours of one replica in a row, and several turns per replica.
            let (store, order) = (&stores[n as usize / 2 % stores.len()], &order);
            async move {
                let guard = store.lock(LockKind::Rollout, &challenge_id("web"), &long_timeout()).await.unwrap();
                assert!(guard.waited.contended);
                assert_eq!(guard.waited.queue_depth, n + 1);
                order.lock().unwrap().push((n, guard.token));
                guard.release().await.unwrap();
            }
        });
        // The next one must request the lock after this one has queued.
        eventually("queued", || {
            assert!(one.as_mut().now_or_never().is_none());
            async { stores[0].live_keys().await.len() as u64 == n + 2 }
        })
        .await;
        waiting.push(one);
    }
    first.release().await.unwrap();
    futures::future::join_all(waiting).await;
    let order = order.into_inner().unwrap();
    assert_eq!(order.iter().map(|(n, _)| *n).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    assert!(order.is_sorted_by_key(|(_, token)| *token));
    stores[0].check_invariants().await;
}

pub(super) async fn lock_is_not_reentrant(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let _guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(
        store.lock(LockKind::Challenge, &challenge_id("web"), &short_timeout()).await,
        Err(Error::Busy { ahead: 1, .. })
    ));
}

pub(super) async fn locks_of_other_challenges_and_kinds_are_independent(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let mut guards = Vec::new();
    for name in ["web", "web 2", "we", "web!"] {
        for kind in [LockKind::Challenge, LockKind::Rollout] {
            guards.push(store.lock(kind, &challenge_id(name), &no_timeout()).await.unwrap());
        }
    }
    assert_eq!(store.live_keys().await.len(), 8);
}

pub(super) async fn waiter_learns_the_previous_holder(fixture: &impl Fixture) {
    let (one, two) = (fixture.replica("a"), fixture.replica("b"));
    let options = LockOptions { traceparent: Some("00-aa-bb-01".to_owned()), ..long_timeout() };
    let guard = one.lock(LockKind::Challenge, &challenge_id("web"), &options).await.unwrap();
    let (web, options) = (challenge_id("web"), long_timeout());
    let waiting = two.lock(LockKind::Challenge, &web, &options);
    let release = async {
        eventually("queued", || async { one.live_keys().await.len() == 2 }).await;
        guard.release().await.unwrap();
    };
    let (guard, ()) = tokio::join!(waiting, release);
    let guard = guard.unwrap();
    assert_eq!(guard.waited.holder.as_deref(), Some("00-aa-bb-01"));
    assert!(guard.waited.contended);
    assert_eq!(guard.waited.queue_depth, 1);
    guard.release().await.unwrap();
}

pub(super) async fn waits_and_queue_list_the_waiters(fixture: &impl Fixture) {
    let (one, two) = (fixture.replica("a"), fixture.replica("b"));
    let (web, options) = (challenge_id("web"), long_timeout());
    let guard = one.lock(LockKind::Challenge, &web, &options).await.unwrap();
    assert_eq!(two.waits(10), (0, Vec::new()));
    let mut waiting = Vec::new();
    for n in 0..20usize {
        let mut one = Box::pin(two.lock(LockKind::Challenge, &web, &options));
        eventually("the call waits", || {
            assert!(one.as_mut().now_or_never().is_none());
            async { two.waits(0).0 == n + 1 }
        })
        .await;
        waiting.push(one);
    }
    eventually("the watch has seen every waiter", || async { two.waits(100).1.last().unwrap().position == 20 }).await;
    let (count, waits) = two.waits(3);
    assert_eq!((count, waits.len()), (20, 3));
    assert_eq!((waits[2].kind, waits[2].challenge.as_str(), waits[2].position), ("challenge", "web", 3));
    assert_eq!(waits[0].holder.as_ref().unwrap().replica, "a");
    let queue = one.queue(LockKind::Challenge, &web).await.unwrap();
    assert_eq!(queue.iter().map(|place| place.replica.as_str()).collect::<String>(), format!("a{}", "b".repeat(20)));
    guard.release().await.unwrap();
    let first = waiting.remove(0).await.unwrap();
    assert_eq!((first.waited.queue_depth, first.waited.holder), (1, options.traceparent.clone()));
    eventually("the waiters move up", || async { two.waits(100).1.last().unwrap().position == 19 }).await;
    drop(waiting);
    eventually("nobody waits", || async { two.waits(10).0 == 0 }).await;
}

pub(super) async fn lock_timeout_returns_busy_and_leaves_no_key(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let waited = store.lock(LockKind::Challenge, &challenge_id("web"), &short_timeout()).await;
    let Err(Error::Busy { what, waited_ms, ahead }) = waited else { panic!("{waited:?}") };
    let held_by = "the challenge lock of \"web\" (held by a since ";
    assert!(what.starts_with(held_by) && ahead == 1, "{what} {ahead}");
    assert!(waited_ms >= 50);
    assert_eq!(store.live_keys().await.len(), 1, "the key is removed before the call returns");
    guard.release().await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn zero_lock_timeout_does_not_queue(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let _guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    store.core.kv.reset();
    assert!(matches!(
        store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await,
        Err(Error::Busy { ahead: 1, .. })
    ));
    assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 1)]));
}

pub(super) async fn cancelled_acquire_leaves_no_key(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    for name in ["web", "free"] {
        for polls in 0..12 {
            let name = challenge_id(name);
            let options = long_timeout();
            let mut acquire = Box::pin(store.lock(LockKind::Challenge, &name, &options));
            for _ in 0..polls {
                if acquire.as_mut().now_or_never().is_some() {
                    break;
                }
                tokio::task::yield_now().await;
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
        }
    }
    eventually("only the holder is left", || async { store.live_keys().await.len() == 1 }).await;
    guard.release().await.unwrap();
    let free = store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
    free.release().await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn dropped_lock_is_released(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    drop(store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap());
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.release().await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn lock_excludes_other_replicas(fixture: &impl Fixture) {
    let (one, two) = (fixture.replica("a"), fixture.replica("b"));
    let guard = one.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(
        two.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await,
        Err(Error::Busy { .. })
    ));
    guard.release().await.unwrap();
    two.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap().release().await.unwrap();
}

pub(super) async fn fencing_tokens_increase(fixture: &impl Fixture) {
    let (one, two) = (fixture.replica("a"), fixture.replica("b"));
    let mut last = 0;
    for n in 0..6 {
        let store = if n % 2 == 0 { &one } else { &two };
        let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
        assert!(guard.token > last);
        last = guard.token;
        guard.release().await.unwrap();
    }
}

pub(super) async fn contended_lock_has_one_holder(fixture: &impl Fixture) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let stores = [fixture.replica("a"), fixture.replica("b")];
    let (inside, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let workers = (0..16).map(|n| {
        let (store, inside, done) = (&stores[n % 2], &inside, &done);
        async move {
            for _ in 0..4 {
                let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                guard.release().await.unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    futures::future::join_all(workers).await;
    assert_eq!(done.into_inner(), 64);
    stores[0].check_invariants().await;
}

pub(super) async fn key_slots_are_reused(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        let one = store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
        seen.extend(store.live_keys().await);
        one.release().await.unwrap();
        // A lock attempt that times out, and a guard that is dropped.
        let one = store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
        store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap_err();
        drop(one);
        eventually("the key is removed", || async { store.live_keys().await.is_empty() }).await;
    }
    assert!(seen.len() <= 2, "the number of distinct keys grows: {seen:?}");
}

pub(super) async fn local_waiter_gets_the_lock_before_its_key_is_removed(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let (web, options) = (challenge_id("web"), long_timeout());
    let guard = store.lock(LockKind::Challenge, &web, &options).await.unwrap();
    let mut local = Box::pin(store.lock(LockKind::Challenge, &web, &options));
    eventually("a waiter queues on this replica", || {
        assert!(local.as_mut().now_or_never().is_none());
        async { store.waits(1).1.first().is_some_and(|wait| wait.position == 1) }
    })
    .await;
    let mut remote = Box::pin(other.lock(LockKind::Challenge, &web, &options));
    eventually("a waiter queues on the other replica", || {
        assert!(remote.as_mut().now_or_never().is_none());
        async { other.waits(1).1.first().is_some_and(|wait| wait.position == 2) }
    })
    .await;
    // The removal is lost twice.
    store.core.kv.inject(Fault::LostRequest);
    store.core.kv.inject(Fault::LostRequest);
    let mut release = Box::pin(guard.release());
    assert!(release.as_mut().now_or_never().is_none_or(|released| released.is_err()));
    let guard = local.await.unwrap();
    assert!(remote.as_mut().now_or_never().is_none(), "the lock is held");
    drop(release);
    guard.release().await.unwrap();
    remote.await.unwrap().release().await.unwrap();
    store.check_invariants().await;
}
