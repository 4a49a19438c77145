//! Lost leases, lost answers, crashes.

use super::*;
use crate::kv::KvError;

fn failed(retry_at: Timestamp) -> Phase {
    Phase::Failed(Failure {
        during: Operation::Update,
        reason: "no \"such\" port".to_owned(),
        since: at(20),
        attempts: 3,
        retry_at,
    })
}

pub(super) async fn a_lost_lease_cannot_commit(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = store.with("web").await;
    let ready = store.ready(&web, instance_key("web", "alice")).await;
    let key = ready.value.key.clone();
    let (held, begun) = store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap();
    let lock = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    store.revoke().await;
    let committed = held.commit(Outcome::Put(Box::new(ready.value.clone()))).await;
    assert!(matches!(committed, Err(Error::Fenced(_))), "{committed:?}");
    let updated = lock.update_challenge(&Challenge { revision: 5, ..web.value.clone() }).await;
    assert!(matches!(updated, Err(Error::Fenced(_))), "{updated:?}");
    assert_eq!(other.stored("web").await, web);
    assert_eq!(other.at(&key).await.value, begun, "nothing was written");
    // Somebody else carries on, and the loser does not disturb it.
    let (held, _) = other.begin(&key, Intent::Recover, &patient()).await.unwrap();
    let lock = other.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
    lock.remove_challenge().await.unwrap_err();
    held.commit(Outcome::Put(Box::new(ready.value))).await.unwrap();
    other.check().await;
}

pub(super) async fn a_lost_lease_is_noticed_and_replaced(rig: &impl Rig) {
    let store = rig.replica_with("a", Duration::from_secs(2));
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let token = held.token;
    store.revoke().await;
    let guarded = tokio::time::timeout(Duration::from_secs(30), held.run(std::future::pending::<Result<(), Error>>()));
    assert!(matches!(guarded.await, Ok(Err(Error::Fenced(_)))));
    held.release().await.unwrap();
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(held.token > token);
    held.release().await.unwrap();
    store.check().await;
}

pub(super) async fn the_first_to_meet_a_lost_lease_goes_on_under_the_next(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = store.with("web").await;
    store.revoke().await;
    let lock = store.lock(LockKind::Rollout, &id("web"), &at_once()).await.unwrap();
    lock.release().await.unwrap();
    store.revoke().await;
    let alice = store.ready(&web, instance_key("web", "alice")).await;
    // Somebody is ahead, too, and one waits already when another learns that the lease is gone.
    let theirs = other.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
    store.revoke().await;
    let waits = async {
        eventually("the create waits", || async { store.waits(2).0 == 1 }).await;
        let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
        held.release().await
    };
    let create = async {
        let bob = instance(instance_key("web", "bob"), Phase::Provisioning);
        let held = store.begin_create(&web, &bob, None, &patient()).await.unwrap();
        held.commit(Outcome::Remove).await
    };
    let hands_on = async {
        eventually("both wait", || async { store.waits(2).0 == 2 }).await;
        theirs.release().await
    };
    let (waited, created, handed_on) = futures::join!(waits, create, hands_on);
    waited.and(created).and(handed_on).unwrap();
    store.revoke().await;
    let (held, _) = store.begin(&alice.value.key, Intent::Delete, &at_once()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn a_crash_leaves_work_that_is_found(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = store.with("web").await;
    let creating = instance(instance_key("web", "alice"), Phase::Provisioning);
    let deleting = store.ready(&web, instance_key("web", "bob")).await.value.key;
    store.ready(&web, instance_key("web", "carol")).await;
    let one = store.begin_create(&web, &creating, None, &patient()).await.unwrap();
    let (two, _) = store.begin(&deleting, Intent::Delete, &patient()).await.unwrap();
    assert!(other.unfinished(at(0)).await.unwrap().is_empty(), "somebody is at it");
    store.revoke().await;
    let expected = [&creating.key, &deleting].map(|key| Unfinished::Instance(key.clone()));
    eventually("all is unfinished", || async { other.unfinished(at(0)).await.unwrap() == expected }).await;
    let (held, left) = other.begin(&creating.key, Intent::Recover, &at_once()).await.unwrap();
    assert_eq!(left, creating);
    assert_eq!(other.unfinished(at(0)).await.unwrap(), expected[1..]);
    assert_eq!(store.begin(&creating.key, Intent::Recover, &at_once()).await.unwrap_err(), Error::Conflict);
    held.commit(Outcome::Remove).await.unwrap();
    let (held, left) = other.begin(&deleting, Intent::Recover, &at_once()).await.unwrap();
    assert_eq!(left.phase, Phase::Deleting);
    held.commit(Outcome::Remove).await.unwrap();
    assert!(other.unfinished(at(0)).await.unwrap().is_empty());
    drop((one, two));
    other.check().await;
}

pub(super) async fn a_failure_is_found_when_it_is_due(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = store.ready(&web, instance_key("web", "alice")).await.value.key;
    let (held, begun) = store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap();
    let down = Instance { phase: failed(at(100)), ..begun };
    held.commit(Outcome::Put(Box::new(down.clone()))).await.unwrap();
    assert_eq!(store.at(&key).await.value, down);
    assert!(store.unfinished(at(99)).await.unwrap().is_empty());
    assert_eq!(store.unfinished(at(100)).await.unwrap(), vec![Unfinished::Instance(key.clone())]);
    let (held, again) = store.begin(&key, Intent::Recover, &at_once()).await.unwrap();
    assert_eq!(again, down, "its phase stays");
    assert!(store.unfinished(at(100)).await.unwrap().is_empty());
    let down = Instance { phase: failed(at(200)), ..down };
    held.commit(Outcome::Put(Box::new(down))).await.unwrap();
    assert!(store.unfinished(at(199)).await.unwrap().is_empty());
    store.check().await;
    // A failed one can be deleted; its target is not forgotten.
    let (held, begun) = store.begin(&key, Intent::Delete, &at_once()).await.unwrap();
    assert_eq!(begun.target, Some(target(9)));
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn an_unfinished_rollout_is_found(rig: &impl Rig) {
    let store = rig.replica("a");
    store.with("idle").await;
    let web = store.with("web").await.value;
    let rollout = store.lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap();
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let started =
        Challenge { rollout: Some(Rollout { strategy: Strategy::BlueGreen, traceparent: None }), ..web.clone() };
    held.update_challenge(&started).await.unwrap();
    assert_eq!(store.stored("web").await.value, started);
    assert!(store.unfinished(at(0)).await.unwrap().is_empty(), "somebody is at it");
    drop(rollout);
    let found = [Unfinished::Challenge(id("web"))];
    eventually("found", || async { store.unfinished(at(0)).await.unwrap() == found }).await;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.update_challenge(&Challenge { deleting: true, ..web.clone() }).await.unwrap();
    assert_eq!(store.unfinished(at(0)).await.unwrap(), found);
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.update_challenge(&web).await.unwrap();
    assert!(store.unfinished(at(0)).await.unwrap().is_empty());
    store.check().await;
}

pub(super) async fn an_unknown_commit_is_resolved(rig: &impl Rig) {
    let store = rig.replica("a");
    for (name, fault) in [("answer", Fault::LostAnswer), ("request", Fault::LostRequest)] {
        let web = store.with(name).await;
        let key = instance_key(name, "alice");
        let intent = instance(key.clone(), Phase::Provisioning);
        let held = store.begin_create(&web, &intent, None, &patient()).await.unwrap();
        store.core.kv.fail_next(fault);
        let ready = instance(key.clone(), Phase::Ready);
        held.commit(Outcome::Put(Box::new(ready.clone()))).await.unwrap();
        assert_eq!(store.at(&key).await.value, ready);
        let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
        store.core.kv.fail_next(fault);
        held.commit(Outcome::Remove).await.unwrap();
        assert_eq!(store.instance(&key).await.unwrap(), None);
        let lock = || async { store.lock(LockKind::Challenge, &id(name), &at_once()).await.unwrap() };
        let held = lock().await;
        store.core.kv.fail_next(fault);
        let changed = Challenge { revision: 2, ..web.value.clone() };
        held.update_challenge(&changed).await.unwrap();
        assert_eq!(store.stored(name).await.value, changed);
        let held = lock().await;
        store.core.kv.fail_next(fault);
        held.release().await.unwrap();
        let held = lock().await;
        store.core.kv.fail_next(fault);
        held.remove_challenge().await.unwrap();
        assert_eq!(store.challenge(&id(name)).await.unwrap(), None);
        store.check().await;
    }
}

pub(super) async fn a_commit_that_stays_unknown_is_left_to_recovery(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = instance_key("web", "alice");
    let intent = instance(key.clone(), Phase::Provisioning);
    let held = store.begin_create(&web, &intent, None, &patient()).await.unwrap();
    store.core.kv.fail_next(Fault::LostRequest);
    store.core.kv.fail_next(Fault::LostRequest);
    let result = held.commit(Outcome::Remove).await;
    assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
    eventually("found", || async { store.unfinished(at(0)).await.unwrap() == [Unfinished::Instance(key.clone())] })
        .await;
    let (held, _) = store.begin(&key, Intent::Recover, &at_once()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn an_unknown_acquisition_is_given_up(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    // The acquisition and its removal: one that never came to be is removed, too, and takes no fault that is meant for another.
    let given_up = || async {
        store.live_keys().await.is_empty() && store.core.kv.calls().get("txn").is_some_and(|calls| *calls >= 2)
    };
    for fault in [Fault::LostAnswer, Fault::LostRequest] {
        store.core.kv.reset();
        store.core.kv.fail_next(fault);
        let result = store.lock(LockKind::Challenge, &id("web"), &patient()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        eventually("given up", given_up).await;
        let key = instance_key("web", "alice");
        store.core.kv.reset();
        store.core.kv.fail_next(fault);
        let intent = instance(key.clone(), Phase::Provisioning);
        let result = store.begin_create(&web, &intent, None, &patient()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        eventually("given up", given_up).await;
        if store.instance(&key).await.unwrap().is_some() {
            let (held, _) = store.begin(&key, Intent::Recover, &at_once()).await.unwrap();
            held.commit(Outcome::Remove).await.unwrap();
        }
    }
    store.check().await;
}

pub(super) async fn a_guard_commits_only_what_it_locks(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let bob = store.ready(&web, instance_key("web", "bob")).await;
    let alice = instance(instance_key("web", "alice"), Phase::Ready);
    let (held, _) = store.begin(&bob.value.key, Intent::Delete, &patient()).await.unwrap();
    assert!(matches!(held.commit(Outcome::Put(Box::new(alice))).await, Err(Error::Internal(_))));
    eventually("released", || async { store.live_keys().await.is_empty() }).await;
    let (held, _) = store.begin(&bob.value.key, Intent::Recover, &patient()).await.unwrap();
    assert!(matches!(held.remove_challenge().await, Err(Error::Internal(_))));
    let lock = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(matches!(lock.commit(Outcome::Remove).await, Err(Error::Internal(_))));
    assert_eq!(store.stored("web").await, web, "nothing was written");
    assert_eq!(store.at(&bob.value.key).await.value.phase, Phase::Deleting);
}

pub(super) async fn shutdown_gives_up_what_is_owned(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let _held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    store.shutdown().await;
    assert!(other.live_keys().await.is_empty());
    other.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap().release().await.unwrap();
}

pub(super) async fn a_dropped_store_gives_up_what_it_owned(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    drop(store);
    other.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap().release().await.unwrap();
    drop(held);
    other.check().await;
}

pub(super) async fn an_acquisition_that_comes_to_be_late_is_given_up(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let (web, key) = (store.with("web").await, instance_key("web", "alice"));
    store.ready(&web, key.clone()).await;
    store.core.kv.hurry(Duration::from_millis(50));
    store.core.kv.reset();
    store.core.kv.fail_next(Fault::LateRequest);
    let result = store.begin(&key, Intent::Delete, &patient()).await;
    assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
    // A network that was cut delivers what it held back, long after it was given up.
    let looked = || store.core.kv.calls().get("txn").is_some_and(|calls| *calls > 2);
    eventually("it was looked for again", || async { looked() }).await;
    store.core.kv.deliver().await;
    assert_eq!(other.at(&key).await.value.phase, Phase::Deleting, "it has come to be");
    eventually("nobody owns it", || async { other.live_keys().await.is_empty() }).await;
    let (held, _) = other.begin(&key, Intent::Recover, &at_once()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    other.check().await;
}

pub(super) async fn a_lease_that_is_not_kept_alive_runs_out(rig: &impl Rig) {
    let store = rig.replica("a");
    let (kv, layout) = (&store.core.kv, &store.core.layout);
    let [alice, bob] = ["alice", "bob"].map(|who| layout.owner(&instance_key("web", who)));
    let put = |key: &str, lease| Txn {
        success: vec![Op::Put { key: key.to_owned(), value: Vec::new(), lease: Some(lease) }],
        ..Txn::default()
    };
    let mut followed = kv.list_and_watch(layout.live()).await.unwrap();
    let (forgotten, _) = kv.grant(Duration::from_secs(1)).await.unwrap();
    let (kept, ttl) = kv.grant(Duration::from_secs(6)).await.unwrap();
    assert!(ttl >= Duration::from_secs(6));
    kv.txn(put(&alice, forgotten)).await.unwrap();
    kv.txn(put(&bob, kept)).await.unwrap();
    eventually("the key of the one goes", || async {
        kv.keep_alive(kept).await.unwrap();
        store.live_keys().await == [bob.clone()]
    })
    .await;
    assert_eq!(kv.keep_alive(forgotten).await, Err(KvError::LeaseNotFound));
    assert_eq!(kv.txn(put(&alice, forgotten)).await, Err(KvError::LeaseNotFound));
    kv.keep_alive(kept).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(
            followed.events.next().await.unwrap().into_iter().map(|event| (event.key, event.create_revision.is_some())),
        );
    }
    assert_eq!(seen, [(alice.clone(), true), (bob, true), (alice, false)]);
    kv.revoke(forgotten).await.unwrap();
    kv.revoke(kept).await.unwrap();
    store.check().await;
}

pub(super) async fn what_a_lost_lease_holds_goes_though_no_revoke_succeeds(rig: &impl Rig) {
    let (store, other) = (rig.replica_with("a", Duration::from_secs(2)), rig.replica("b"));
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    store.core.kv.fail_revoke();
    store.core.kv.hang_keep_alive();
    other.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap().release().await.unwrap();
    let lost = tokio::time::timeout(Duration::from_secs(30), held.run(std::future::pending::<Result<(), Error>>()));
    assert!(matches!(lost.await, Ok(Err(Error::Fenced(_)))), "and its holder is told");
}

pub(super) async fn a_lost_lease_is_replaced_while_it_is_revoked(rig: &impl Rig) {
    let store = rig.replica("a");
    let lease = store.core.lease().await.unwrap();
    store.core.kv.hurry(Duration::from_secs(10));
    store.core.kv.hang_revoke();
    lease.give_up();
    let held = store.lock(LockKind::Challenge, &id("web"), &at_once()).await.unwrap();
    held.release().await.unwrap();
}

pub(super) async fn shutdown_does_not_wait_for_a_hung_keep_alive(rig: &impl Rig) {
    let (store, other) = (rig.replica_with("a", Duration::from_secs(9)), rig.replica("b"));
    store.core.kv.hang_keep_alive();
    let _held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    eventually("it is to be kept alive", || async { store.core.kv.kept_alive() > 0 }).await;
    store.shutdown().await;
    assert!(other.live_keys().await.is_empty());
}

pub(super) async fn shutdown_waits_for_writes_under_way(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let (web, key) = (store.with("web").await, instance_key("web", "alice"));
    let held = store.begin_create(&web, &instance(key.clone(), Phase::Provisioning), None, &patient()).await.unwrap();
    store.core.kv.fail_next(Fault::Held);
    let ready = instance(key.clone(), Phase::Ready);
    let commit = held.commit(Outcome::Put(Box::new(ready.clone())));
    let late = async {
        // Time enough to revoke a lease, if it were to be revoked.
        for _ in 0..20 {
            if other.live_keys().await.is_empty() {
                break;
            }
        }
        store.core.kv.let_go();
    };
    let (committed, (), ()) = tokio::join!(commit, store.shutdown(), late);
    committed.unwrap();
    assert_eq!(other.at(&key).await.value, ready);
    other.check().await;
}

pub(super) async fn a_late_deletion_leaves_what_was_created_since(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let (web, key) = (store.with("web").await, instance_key("web", "alice"));
    let doings = [Intent::Delete, Intent::Update(target(9))];
    for doing in doings {
        store.ready(&web, key.clone()).await;
        store.core.kv.fail_next(Fault::LateRequest);
        let result = store.begin(&key, doing.clone(), &patient()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        // Meanwhile it is deleted, and its source has another.
        let (held, _) = other.begin(&key, Intent::Delete, &patient()).await.unwrap();
        held.commit(Outcome::Remove).await.unwrap();
        let anew = other.ready(&web, key.clone()).await;
        store.core.kv.deliver().await;
        assert_eq!(other.at(&key).await, anew, "{doing:?}");
        eventually("nobody owns it", || async { other.live_keys().await.is_empty() }).await;
        // One that is asked for since is for that one.
        let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
        held.commit(Outcome::Remove).await.unwrap();
    }
    store.check().await;
}
