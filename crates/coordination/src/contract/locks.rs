//! Locks.

use futures::FutureExt as _;

use super::*;

pub(super) async fn a_free_lock_is_taken_at_once(rig: &impl Rig) {
    let store = rig.replica("a");
    let held = store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
    assert_eq!(held.waited, gauntlet_domain::WaitStats::default());
    assert_eq!(held.kind, LockKind::Challenge);
    assert_eq!(store.live_keys().await.len(), 1);
    held.release().await.unwrap();
    assert!(store.live_keys().await.is_empty());
}

pub(super) async fn a_lock_is_handed_on_in_order_of_asking(rig: &impl Rig) {
    let stores = ["a", "b", "c"].map(|name| rig.replica(name));
    let first = stores[0].lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap();
    let order = std::sync::Mutex::new(Vec::new());
    let mut waiting = Vec::new();
    for n in 0..8 {
        let mut one = Box::pin({
            // Two of each replica in a row, and each replica more than once.
            let (store, order) = (&stores[n as usize / 2 % stores.len()], &order);
            async move {
                let held = store.lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap();
                assert!(held.waited.contended);
                assert_eq!(held.waited.queue_depth, n + 1);
                order.lock().unwrap().push((n, held.token));
                held.release().await.unwrap();
            }
        });
        // Queued before the next one asks.
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
    stores[0].check().await;
}

pub(super) async fn a_lock_never_reenters(rig: &impl Rig) {
    let store = rig.replica("a");
    let _held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(matches!(store.lock(LockKind::Challenge, &id("web"), &short()).await, Err(Error::Busy { ahead: 1, .. })));
}

pub(super) async fn locks_of_different_challenges_and_kinds_do_not_meet(rig: &impl Rig) {
    let store = rig.replica("a");
    let mut held = Vec::new();
    for name in ["web", "web 2", "we", "web!"] {
        for kind in [LockKind::Challenge, LockKind::Rollout] {
            held.push(store.lock(kind, &id(name), &at_once()).await.unwrap());
        }
    }
    assert_eq!(store.live_keys().await.len(), 8);
}

pub(super) async fn who_waits_learns_who_held(rig: &impl Rig) {
    let (one, two) = (rig.replica("a"), rig.replica("b"));
    let by = LockOptions { traceparent: Some("00-aa-bb-01".to_owned()), ..patient() };
    let held = one.lock(LockKind::Challenge, &id("web"), &by).await.unwrap();
    let (web, patient) = (id("web"), patient());
    let waiting = two.lock(LockKind::Challenge, &web, &patient);
    let release = async {
        eventually("queued", || async { one.live_keys().await.len() == 2 }).await;
        held.release().await.unwrap();
    };
    let (held, ()) = tokio::join!(waiting, release);
    let held = held.unwrap();
    assert_eq!(held.waited.holder.as_deref(), Some("00-aa-bb-01"));
    assert!(held.waited.contended);
    assert_eq!(held.waited.queue_depth, 1);
    held.release().await.unwrap();
}

pub(super) async fn who_waits_can_be_asked(rig: &impl Rig) {
    let (one, two) = (rig.replica("a"), rig.replica("b"));
    let (web, patient) = (id("web"), patient());
    let held = one.lock(LockKind::Challenge, &web, &patient).await.unwrap();
    assert_eq!(two.waits(10), (0, Vec::new()));
    let mut waiting = Vec::new();
    for n in 0..20usize {
        let mut one = Box::pin(two.lock(LockKind::Challenge, &web, &patient));
        eventually("it waits", || {
            assert!(one.as_mut().now_or_never().is_none());
            async { two.waits(0).0 == n + 1 }
        })
        .await;
        waiting.push(one);
    }
    eventually("the watch has come that far", || async { two.waits(100).1.last().unwrap().position == 20 }).await;
    let (count, waits) = two.waits(3);
    assert_eq!((count, waits.len()), (20, 3));
    assert_eq!((waits[2].kind, waits[2].challenge.as_str(), waits[2].position), ("challenge", "web", 3));
    assert_eq!(waits[0].holder.as_ref().unwrap().replica, "a");
    let queue = one.queue(LockKind::Challenge, &web).await.unwrap();
    assert_eq!(queue.iter().map(|place| place.replica.as_str()).collect::<String>(), format!("a{}", "b".repeat(20)));
    held.release().await.unwrap();
    let first = waiting.remove(0).await.unwrap();
    assert_eq!((first.waited.queue_depth, first.waited.holder), (1, patient.traceparent.clone()));
    eventually("they move up", || async { two.waits(100).1.last().unwrap().position == 19 }).await;
    drop(waiting);
    eventually("nobody waits", || async { two.waits(10).0 == 0 }).await;
}

pub(super) async fn patience_ends_with_busy_and_leaves_no_key(rig: &impl Rig) {
    let store = rig.replica("a");
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let waited = store.lock(LockKind::Challenge, &id("web"), &short()).await;
    let Err(Error::Busy { what, waited_ms, ahead }) = waited else { panic!("{waited:?}") };
    let held_by = "the challenge lock of \"web\" (held by a since ";
    assert!(what.starts_with(held_by) && ahead == 1, "{what} {ahead}");
    assert!(waited_ms >= 50);
    assert_eq!(store.live_keys().await.len(), 1, "at the time of the answer");
    held.release().await.unwrap();
    store.check().await;
}

pub(super) async fn without_patience_nothing_queues(rig: &impl Rig) {
    let store = rig.replica("a");
    let _held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    store.core.kv.reset();
    assert!(matches!(store.lock(LockKind::Challenge, &id("web"), &at_once()).await, Err(Error::Busy { ahead: 1, .. })));
    assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 1)]));
}

pub(super) async fn a_cancelled_acquire_leaves_nothing(rig: &impl Rig) {
    let store = rig.replica("a");
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    for name in ["web", "free"] {
        for polls in 0..12 {
            let name = id(name);
            let by = patient();
            let mut acquire = Box::pin(store.lock(LockKind::Challenge, &name, &by));
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
    held.release().await.unwrap();
    let free = store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
    free.release().await.unwrap();
    store.check().await;
}

pub(super) async fn a_dropped_lock_is_given_up(rig: &impl Rig) {
    let store = rig.replica("a");
    drop(store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap());
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.release().await.unwrap();
    store.check().await;
}

pub(super) async fn a_lock_is_shared_by_replicas(rig: &impl Rig) {
    let (one, two) = (rig.replica("a"), rig.replica("b"));
    let held = one.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(matches!(two.lock(LockKind::Challenge, &id("web"), &at_once()).await, Err(Error::Busy { .. })));
    held.release().await.unwrap();
    two.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap().release().await.unwrap();
}

pub(super) async fn fences_grow(rig: &impl Rig) {
    let (one, two) = (rig.replica("a"), rig.replica("b"));
    let mut last = 0;
    for n in 0..6 {
        let store = if n % 2 == 0 { &one } else { &two };
        let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
        assert!(held.token > last);
        last = held.token;
        held.release().await.unwrap();
    }
}

pub(super) async fn who_holds_a_contended_lock_is_alone(rig: &impl Rig) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let stores = [rig.replica("a"), rig.replica("b")];
    let (inside, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let workers = (0..16).map(|n| {
        let (store, inside, done) = (&stores[n % 2], &inside, &done);
        async move {
            for _ in 0..4 {
                let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                held.release().await.unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    futures::future::join_all(workers).await;
    assert_eq!(done.into_inner(), 64);
    stores[0].check().await;
}

pub(super) async fn names_are_used_again(rig: &impl Rig) {
    let store = rig.replica("a");
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        let one = store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
        seen.extend(store.live_keys().await);
        one.release().await.unwrap();
        // One that was given up by patience, and one that was dropped.
        let one = store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
        store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap_err();
        drop(one);
        eventually("it is removed", || async { store.live_keys().await.is_empty() }).await;
    }
    assert!(seen.len() <= 2, "what a range must walk over does not grow: {seen:?}");
}

pub(super) async fn a_lock_goes_on_here_while_its_key_is_removed(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let (web, by) = (id("web"), patient());
    let held = store.lock(LockKind::Challenge, &web, &by).await.unwrap();
    let mut here = Box::pin(store.lock(LockKind::Challenge, &web, &by));
    eventually("one queues here", || {
        assert!(here.as_mut().now_or_never().is_none());
        async { store.waits(1).1.first().is_some_and(|wait| wait.position == 1) }
    })
    .await;
    let mut there = Box::pin(other.lock(LockKind::Challenge, &web, &by));
    eventually("one queues elsewhere", || {
        assert!(there.as_mut().now_or_never().is_none());
        async { other.waits(1).1.first().is_some_and(|wait| wait.position == 2) }
    })
    .await;
    // The removal is lost, and lost again.
    store.core.kv.fail_next(Fault::LostRequest);
    store.core.kv.fail_next(Fault::LostRequest);
    let mut release = Box::pin(held.release());
    assert!(release.as_mut().now_or_never().is_none_or(|released| released.is_err()));
    let held = here.await.unwrap();
    assert!(there.as_mut().now_or_never().is_none(), "it is held");
    drop(release);
    held.release().await.unwrap();
    there.await.unwrap().release().await.unwrap();
    store.check().await;
}
