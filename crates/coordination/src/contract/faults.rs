//! Lost leases, lost responses, late requests, crashes and shutdown.

use super::*;
use crate::kv::KvError;

fn failed(retry_at: Timestamp) -> Phase {
    Phase::Failed(Failure {
        during: Operation::Update,
        reason: "no \"such\" port".to_owned(),
        since: timestamp(20),
        attempts: 3,
        retry_at,
    })
}

pub(super) async fn lost_lease_rejects_commits(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = store.add_challenge("web").await;
    let ready = store.add_ready_instance(&web, source_key("web", "alice")).await;
    let key = ready.value.key.clone();
    let (guard, begun) = store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap();
    let lock = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    store.revoke_lease().await;
    let committed = guard.commit(Outcome::Put(Box::new(ready.value.clone()))).await;
    assert!(matches!(committed, Err(Error::Fenced(_))), "{committed:?}");
    let updated = lock.update_challenge(&Challenge { revision: 5, ..web.value.clone() }).await;
    assert!(matches!(updated, Err(Error::Fenced(_))), "{updated:?}");
    assert_eq!(other.stored_challenge("web").await, web);
    assert_eq!(other.stored_instance(&key).await.value, begun, "the commit wrote nothing");
    // Another replica takes over, and the loser cannot interfere.
    let (guard, _) = other.begin(&key, Intent::Recover, &long_timeout()).await.unwrap();
    let lock = other.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
    lock.remove_challenge().await.unwrap_err();
    guard.commit(Outcome::Put(Box::new(ready.value))).await.unwrap();
    other.check_invariants().await;
}

pub(super) async fn lost_lease_is_noticed_and_replaced(fixture: &impl Fixture) {
    let store = fixture.replica_with("a", Duration::from_secs(2));
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let token = guard.token;
    store.revoke_lease().await;
    let guarded = tokio::time::timeout(Duration::from_secs(30), guard.run(std::future::pending::<Result<(), Error>>()));
    assert!(matches!(guarded.await, Ok(Err(Error::Fenced(_)))));
    guard.release().await.unwrap();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(guard.token > token);
    guard.release().await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn acquire_under_a_lost_lease_retries_under_the_next(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = store.add_challenge("web").await;
    store.revoke_lease().await;
    let lock = store.lock(LockKind::Rollout, &challenge_id("web"), &no_timeout()).await.unwrap();
    lock.release().await.unwrap();
    store.revoke_lease().await;
    let alice = store.add_ready_instance(&web, source_key("web", "alice")).await;
    // The same while another replica holds the lock: one call already waits when another one notices the lost lease.
    let theirs = other.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
    store.revoke_lease().await;
    let waits = async {
        eventually("the create waits", || async { store.waits(2).0 == 1 }).await;
        let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
        guard.release().await
    };
    let create = async {
        let bob = instance(source_key("web", "bob"), Phase::Provisioning);
        let guard = store.begin_create(&web, &bob, None, &long_timeout()).await.unwrap();
        guard.commit(Outcome::Remove).await
    };
    let hand_over = async {
        eventually("both wait", || async { store.waits(2).0 == 2 }).await;
        theirs.release().await
    };
    let (waited, created, handed_over) = futures::join!(waits, create, hand_over);
    waited.and(created).and(handed_over).unwrap();
    store.revoke_lease().await;
    let (guard, _) = store.begin(&alice.value.key, Intent::Delete, &no_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn unfinished_work_of_a_crash_is_found(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = store.add_challenge("web").await;
    let creating = instance(source_key("web", "alice"), Phase::Provisioning);
    let deleting = store.add_ready_instance(&web, source_key("web", "bob")).await.value.key;
    store.add_ready_instance(&web, source_key("web", "carol")).await;
    let one = store.begin_create(&web, &creating, None, &long_timeout()).await.unwrap();
    let (two, _) = store.begin(&deleting, Intent::Delete, &long_timeout()).await.unwrap();
    assert!(other.unfinished(timestamp(0)).await.unwrap().is_empty(), "the work has an owner");
    store.revoke_lease().await;
    let expected = [&creating.key, &deleting].map(|key| Unfinished::Instance(key.clone()));
    eventually("both instances are unfinished", || async { other.unfinished(timestamp(0)).await.unwrap() == expected })
        .await;
    let (guard, left) = other.begin(&creating.key, Intent::Recover, &no_timeout()).await.unwrap();
    assert_eq!(left, creating);
    assert_eq!(other.unfinished(timestamp(0)).await.unwrap(), expected[1..]);
    assert_eq!(store.begin(&creating.key, Intent::Recover, &no_timeout()).await.unwrap_err(), Error::Conflict);
    guard.commit(Outcome::Remove).await.unwrap();
    let (guard, left) = other.begin(&deleting, Intent::Recover, &no_timeout()).await.unwrap();
    assert_eq!(left.phase, Phase::Deleting);
    guard.commit(Outcome::Remove).await.unwrap();
    assert!(other.unfinished(timestamp(0)).await.unwrap().is_empty());
    drop((one, two));
    other.check_invariants().await;
}

pub(super) async fn failed_instance_is_unfinished_once_its_retry_is_due(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = store.add_ready_instance(&web, source_key("web", "alice")).await.value.key;
    let (guard, begun) = store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap();
    let down = Instance { phase: failed(timestamp(100)), ..begun };
    guard.commit(Outcome::Put(Box::new(down.clone()))).await.unwrap();
    assert_eq!(store.stored_instance(&key).await.value, down);
    assert!(store.unfinished(timestamp(99)).await.unwrap().is_empty());
    assert_eq!(store.unfinished(timestamp(100)).await.unwrap(), vec![Unfinished::Instance(key.clone())]);
    let (guard, again) = store.begin(&key, Intent::Recover, &no_timeout()).await.unwrap();
    assert_eq!(again, down, "recovery keeps the phase");
    assert!(store.unfinished(timestamp(100)).await.unwrap().is_empty());
    let down = Instance { phase: failed(timestamp(200)), ..down };
    guard.commit(Outcome::Put(Box::new(down))).await.unwrap();
    assert!(store.unfinished(timestamp(199)).await.unwrap().is_empty());
    store.check_invariants().await;
    // A failed instance can be deleted; its target is kept.
    let (guard, begun) = store.begin(&key, Intent::Delete, &no_timeout()).await.unwrap();
    assert_eq!(begun.target, Some(target(9)));
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn unfinished_rollout_is_found(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    store.add_challenge("idle").await;
    let web = store.add_challenge("web").await.value;
    let rollout = store.lock(LockKind::Rollout, &challenge_id("web"), &long_timeout()).await.unwrap();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let started =
        Challenge { rollout: Some(Rollout { strategy: Strategy::BlueGreen, traceparent: None }), ..web.clone() };
    guard.update_challenge(&started).await.unwrap();
    assert_eq!(store.stored_challenge("web").await.value, started);
    assert!(store.unfinished(timestamp(0)).await.unwrap().is_empty(), "the work has an owner");
    drop(rollout);
    let found = [Unfinished::Challenge(challenge_id("web"))];
    eventually("the work is found", || async { store.unfinished(timestamp(0)).await.unwrap() == found }).await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.update_challenge(&Challenge { deleting: true, ..web.clone() }).await.unwrap();
    assert_eq!(store.unfinished(timestamp(0)).await.unwrap(), found);
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.update_challenge(&web).await.unwrap();
    assert!(store.unfinished(timestamp(0)).await.unwrap().is_empty());
    store.check_invariants().await;
}

pub(super) async fn ambiguous_commit_is_resolved(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    for (name, fault) in [("answer", Fault::LostResponse), ("request", Fault::LostRequest)] {
        let web = store.add_challenge(name).await;
        let key = source_key(name, "alice");
        let intent = instance(key.clone(), Phase::Provisioning);
        let guard = store.begin_create(&web, &intent, None, &long_timeout()).await.unwrap();
        store.core.kv.inject(fault);
        let ready = instance(key.clone(), Phase::Ready);
        guard.commit(Outcome::Put(Box::new(ready.clone()))).await.unwrap();
        assert_eq!(store.stored_instance(&key).await.value, ready);
        let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
        store.core.kv.inject(fault);
        guard.commit(Outcome::Remove).await.unwrap();
        assert_eq!(store.instance(&key).await.unwrap(), None);
        let lock = || async { store.lock(LockKind::Challenge, &challenge_id(name), &no_timeout()).await.unwrap() };
        let guard = lock().await;
        store.core.kv.inject(fault);
        let changed = Challenge { revision: 2, ..web.value.clone() };
        guard.update_challenge(&changed).await.unwrap();
        assert_eq!(store.stored_challenge(name).await.value, changed);
        let guard = lock().await;
        store.core.kv.inject(fault);
        guard.release().await.unwrap();
        let guard = lock().await;
        store.core.kv.inject(fault);
        guard.remove_challenge().await.unwrap();
        assert_eq!(store.challenge(&challenge_id(name)).await.unwrap(), None);
        store.check_invariants().await;
    }
}

pub(super) async fn commit_that_stays_ambiguous_is_left_to_recovery(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = source_key("web", "alice");
    let intent = instance(key.clone(), Phase::Provisioning);
    let guard = store.begin_create(&web, &intent, None, &long_timeout()).await.unwrap();
    store.core.kv.inject(Fault::LostRequest);
    store.core.kv.inject(Fault::LostRequest);
    let result = guard.commit(Outcome::Remove).await;
    assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
    eventually("the work is found", || async {
        store.unfinished(timestamp(0)).await.unwrap() == [Unfinished::Instance(key.clone())]
    })
    .await;
    let (guard, _) = store.begin(&key, Intent::Recover, &no_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn ambiguous_acquisition_is_released(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    // Waits for the removal, too, which is sent even if the key was never put: it must not take a fault meant for the next call.
    let key_removed = || async {
        store.live_keys().await.is_empty() && store.core.kv.calls().get("txn").is_some_and(|calls| *calls >= 2)
    };
    for fault in [Fault::LostResponse, Fault::LostRequest] {
        store.core.kv.reset();
        store.core.kv.inject(fault);
        let result = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        eventually("the acquisition is released", key_removed).await;
        let key = source_key("web", "alice");
        store.core.kv.reset();
        store.core.kv.inject(fault);
        let intent = instance(key.clone(), Phase::Provisioning);
        let result = store.begin_create(&web, &intent, None, &long_timeout()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        eventually("the acquisition is released", key_removed).await;
        if store.instance(&key).await.unwrap().is_some() {
            let (guard, _) = store.begin(&key, Intent::Recover, &no_timeout()).await.unwrap();
            guard.commit(Outcome::Remove).await.unwrap();
        }
    }
    store.check_invariants().await;
}

pub(super) async fn guard_commits_only_what_it_locks(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let bob = store.add_ready_instance(&web, source_key("web", "bob")).await;
    let alice = instance(source_key("web", "alice"), Phase::Ready);
    let (guard, _) = store.begin(&bob.value.key, Intent::Delete, &long_timeout()).await.unwrap();
    assert!(matches!(guard.commit(Outcome::Put(Box::new(alice))).await, Err(Error::Internal(_))));
    eventually("released", || async { store.live_keys().await.is_empty() }).await;
    let (guard, _) = store.begin(&bob.value.key, Intent::Recover, &long_timeout()).await.unwrap();
    assert!(matches!(guard.remove_challenge().await, Err(Error::Internal(_))));
    let lock = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(lock.commit(Outcome::Remove).await, Err(Error::Internal(_))));
    assert_eq!(store.stored_challenge("web").await, web, "the commit wrote nothing");
    assert_eq!(store.stored_instance(&bob.value.key).await.value.phase, Phase::Deleting);
}

pub(super) async fn shutdown_releases_ownerships(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let _guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    store.shutdown().await;
    assert!(other.live_keys().await.is_empty());
    other.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap().release().await.unwrap();
}

pub(super) async fn dropped_store_releases_ownerships(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    drop(store);
    other.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap().release().await.unwrap();
    drop(guard);
    other.check_invariants().await;
}

pub(super) async fn late_acquisition_is_released(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let (web, key) = (store.add_challenge("web").await, source_key("web", "alice"));
    store.add_ready_instance(&web, key.clone()).await;
    store.core.kv.set_deadline(Duration::from_millis(50));
    store.core.kv.reset();
    store.core.kv.inject(Fault::LateRequest);
    let result = store.begin(&key, Intent::Delete, &long_timeout()).await;
    assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
    // A partitioned network delivers the request long after the caller has stopped waiting.
    let checked = || store.core.kv.calls().get("txn").is_some_and(|calls| *calls > 2);
    eventually("the reaper has checked for it again", || async { checked() }).await;
    store.core.kv.deliver_late_requests().await;
    assert_eq!(other.stored_instance(&key).await.value.phase, Phase::Deleting, "the late request was applied");
    eventually("the ownership is released", || async { other.live_keys().await.is_empty() }).await;
    let (guard, _) = other.begin(&key, Intent::Recover, &no_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    other.check_invariants().await;
}

pub(super) async fn lease_without_keepalive_expires(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let (kv, layout) = (&store.core.kv, &store.core.layout);
    let [alice, bob] = ["alice", "bob"].map(|who| layout.owner(&source_key("web", who)));
    let put = |key: &str, lease| Txn {
        success: vec![Op::Put { key: key.to_owned(), value: Vec::new(), lease: Some(lease) }],
        ..Txn::default()
    };
    let mut watch = kv.list_and_watch(layout.live()).await.unwrap();
    let (forgotten, _) = kv.grant(Duration::from_secs(1)).await.unwrap();
    let (kept, ttl) = kv.grant(Duration::from_secs(6)).await.unwrap();
    assert!(ttl >= Duration::from_secs(6));
    kv.txn(put(&alice, forgotten)).await.unwrap();
    kv.txn(put(&bob, kept)).await.unwrap();
    eventually("the key of the expired lease is deleted", || async {
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
            watch.events.next().await.unwrap().into_iter().map(|event| (event.key, event.create_revision.is_some())),
        );
    }
    assert_eq!(seen, [(alice.clone(), true), (bob, true), (alice, false)]);
    kv.revoke(forgotten).await.unwrap();
    kv.revoke(kept).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn keys_of_a_lost_lease_expire_although_revoking_fails(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica_with("a", Duration::from_secs(2)), fixture.replica("b"));
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    store.core.kv.fail_revoke();
    store.core.kv.hang_keep_alive();
    other.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap().release().await.unwrap();
    let lost = tokio::time::timeout(Duration::from_secs(30), guard.run(std::future::pending::<Result<(), Error>>()));
    assert!(matches!(lost.await, Ok(Err(Error::Fenced(_)))), "the holder is notified");
}

pub(super) async fn lost_lease_is_replaced_before_its_revocation_returns(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let lease = store.core.lease().await.unwrap();
    store.core.kv.set_deadline(Duration::from_secs(10));
    store.core.kv.hang_revoke();
    lease.give_up();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &no_timeout()).await.unwrap();
    guard.release().await.unwrap();
}

pub(super) async fn shutdown_does_not_wait_for_a_hung_keepalive(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica_with("a", Duration::from_secs(9)), fixture.replica("b"));
    store.core.kv.hang_keep_alive();
    let _guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    eventually("a keepalive is sent", || async { store.core.kv.keep_alive_calls() > 0 }).await;
    store.shutdown().await;
    assert!(other.live_keys().await.is_empty());
}

pub(super) async fn shutdown_waits_for_writes_in_progress(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let (web, key) = (store.add_challenge("web").await, source_key("web", "alice"));
    let guard =
        store.begin_create(&web, &instance(key.clone(), Phase::Provisioning), None, &long_timeout()).await.unwrap();
    store.core.kv.inject(Fault::Blocked);
    let ready = instance(key.clone(), Phase::Ready);
    let commit = guard.commit(Outcome::Put(Box::new(ready.clone())));
    let late = async {
        // Enough time for the shutdown to revoke the lease, which it must not do yet.
        for _ in 0..20 {
            if other.live_keys().await.is_empty() {
                break;
            }
        }
        store.core.kv.release_blocked();
    };
    let (committed, (), ()) = tokio::join!(commit, store.shutdown(), late);
    committed.unwrap();
    assert_eq!(other.stored_instance(&key).await.value, ready);
    other.check_invariants().await;
}

pub(super) async fn late_deletion_spares_a_newer_instance(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let (web, key) = (store.add_challenge("web").await, source_key("web", "alice"));
    let intents = [Intent::Delete, Intent::Update(target(9))];
    for intent in intents {
        store.add_ready_instance(&web, key.clone()).await;
        store.core.kv.inject(Fault::LateRequest);
        let result = store.begin(&key, intent.clone(), &long_timeout()).await;
        assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
        // Meanwhile the instance is deleted and its source gets a new one.
        let (guard, _) = other.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
        guard.commit(Outcome::Remove).await.unwrap();
        let newer = other.add_ready_instance(&web, key.clone()).await;
        store.core.kv.deliver_late_requests().await;
        assert_eq!(other.stored_instance(&key).await, newer, "{intent:?}");
        eventually("the ownership is released", || async { other.live_keys().await.is_empty() }).await;
        // A later deletion applies to the new instance.
        let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
        guard.commit(Outcome::Remove).await.unwrap();
    }
    store.check_invariants().await;
}
