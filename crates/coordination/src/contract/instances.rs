//! Ownership of instances: create, claim, begin, commit and rewrite.

use futures::FutureExt as _;

use super::*;

pub(super) async fn instance_key_is_created_once(fixture: &impl Fixture) {
    let stores = [fixture.replica("a"), fixture.replica("b")];
    let web = stores[0].add_challenge("web").await;
    let key = source_key("web", "alice");
    let tries = (0..16).map(|n| {
        let (store, web, key) = (&stores[n % 2], &web, &key);
        async move {
            let intent = instance(key.clone(), Phase::Provisioning);
            store.begin_create(web, &intent, None, &long_timeout()).await
        }
    });
    let (mut taken, mut conflicts) = (Vec::new(), 0);
    for result in futures::future::join_all(tries).await {
        match result {
            Ok(guard) => taken.push(guard),
            Err(Error::Conflict) => conflicts += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((taken.len(), conflicts), (1, 15));
    let guard = taken.remove(0);
    assert_eq!(guard.kind, LockKind::Instance);
    assert_eq!(stores[1].stored_instance(&key).await.value.phase, Phase::Provisioning);
    guard.commit(Outcome::Remove).await.unwrap();
    stores[0].check_invariants().await;
    stores[0].add_ready_instance(&web, key).await;
    stores[0].check_invariants().await;
}

pub(super) async fn create_with_a_stale_challenge_conflicts(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let old = store.add_challenge("web").await;
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.update_challenge(&Challenge { revision: 2, ..old.value.clone() }).await.unwrap();
    let intent = instance(source_key("web", "alice"), Phase::Provisioning);
    assert_eq!(store.begin_create(&old, &intent, None, &long_timeout()).await.unwrap_err(), Error::Conflict);
    assert_eq!(store.instance(&intent.key).await.unwrap(), None);
    let gone = Stored { value: challenge("gone"), ..old };
    let intent = instance(source_key("gone", "alice"), Phase::Provisioning);
    assert_eq!(store.begin_create(&gone, &intent, None, &long_timeout()).await.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn create_waits_for_the_challenge_lock(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = store.add_challenge("web").await;
    let intent = instance(source_key("web", "alice"), Phase::Provisioning);
    let lock = other.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(
        store.begin_create(&web, &intent, None, &short_timeout()).await,
        Err(Error::Busy { ahead: 1, .. })
    ));
    assert!(matches!(store.begin_create(&web, &intent, None, &no_timeout()).await, Err(Error::Busy { .. })));
    assert_eq!(store.instance(&intent.key).await.unwrap(), None);
    let options = long_timeout();
    let mut waiting = Box::pin(store.begin_create(&web, &intent, None, &options));
    for _ in 0..20 {
        assert!(waiting.as_mut().now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    lock.release().await.unwrap();
    let guard = waiting.await.unwrap();
    assert!(guard.waited.contended);
    assert_eq!(guard.waited.holder, long_timeout().traceparent);
    guard.commit(Outcome::Remove).await.unwrap();
    // The rollout lock does not delay a create.
    let rollout = other.lock(LockKind::Rollout, &challenge_id("web"), &long_timeout()).await.unwrap();
    let guard = store.begin_create(&web, &intent, None, &no_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    rollout.release().await.unwrap();
    store.check_invariants().await;
}

/// Stores a challenge with pool bounds.
async fn bounded<T: TestKv>(store: &Coordination<T>, name: &str, min: i64, max: i64) -> Stored<Challenge> {
    let bounds = PoolBounds::new(min, max).unwrap();
    store.insert_challenge(&Challenge { bounds, ..challenge(name) }).await.unwrap();
    store.stored_challenge(name).await
}

pub(super) async fn refill_with_a_stale_count_conflicts(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = bounded(&store, "web", 2, 3).await;
    let pooled = |bits| Instance { until: None, ..instance(pool_key("web", bits), Phase::Provisioning) };
    let counted = store.pool(&challenge_id("web"), 3, 9).await.unwrap();
    let first = store.begin_create(&web, &pooled(1), Some(counted.version), &no_timeout()).await.unwrap();
    // A count from before that create is stale.
    let again = other.begin_create(&web, &pooled(2), Some(counted.version), &no_timeout()).await;
    assert_eq!(again.unwrap_err(), Error::Conflict);
    let next = other.pool(&challenge_id("web"), 3, 9).await.unwrap();
    assert_eq!(next.version, Version(first.token));
    assert_eq!(next.pooled, [(pool_key("web", 1), PhaseName::Provisioning)]);
    // A create by a source makes the count stale, too.
    let alice = source_key("web", "alice");
    let taken =
        store.begin_create(&web, &instance(alice.clone(), Phase::Provisioning), None, &no_timeout()).await.unwrap();
    let beside = other.begin_create(&web, &pooled(2), Some(next.version), &no_timeout()).await;
    assert_eq!(beside.unwrap_err(), Error::Conflict);
    // A commit and a claim add no instance: the count stays valid.
    let counted = other.pool(&challenge_id("web"), 3, 9).await.unwrap();
    assert_eq!((counted.claimed, counted.pooled.len()), (1, 1));
    let ready = Instance { phase: Phase::Ready, ..pooled(1) };
    first.commit(Outcome::Put(Box::new(ready.clone()))).await.unwrap();
    taken.commit(Outcome::Put(Box::new(instance(alice.clone(), Phase::Ready)))).await.unwrap();
    let stored = store.stored_instance(&ready.key).await;
    store.claim(&web, &stored, &instance(source_key("web", "bob"), Phase::Ready), &no_timeout()).await.unwrap();
    let second = other.begin_create(&web, &pooled(2), Some(counted.version), &no_timeout()).await.unwrap();
    second.commit(Outcome::Remove).await.unwrap();
    // A changed challenge conflicts by its own version.
    let lock = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    lock.update_challenge(&Challenge { revision: 2, ..web.value.clone() }).await.unwrap();
    let version = other.pool(&challenge_id("web"), 3, 9).await.unwrap().version;
    let late = other.begin_create(&web, &pooled(3), Some(version), &no_timeout()).await;
    assert_eq!(late.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn create_beside_an_unbounded_pool_keeps_its_version(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = bounded(&store, "web", 2, 0).await;
    let counted = store.pool(&challenge_id("web"), 0, 9).await.unwrap();
    store.add_ready_instance(&web, source_key("web", "alice")).await;
    let pooled = Instance { until: None, ..instance(pool_key("web", 1), Phase::Provisioning) };
    let guard = store.begin_create(&web, &pooled, Some(counted.version), &no_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    // A challenge without a pool has no pool version.
    let none = store.add_challenge("none").await;
    store.add_ready_instance(&none, source_key("none", "alice")).await;
    let counted = store.pool(&challenge_id("none"), 0, 9).await.unwrap();
    let pooled = Instance { until: None, ..instance(pool_key("none", 1), Phase::Provisioning) };
    let refused = store.begin_create(&none, &pooled, Some(counted.version), &no_timeout()).await;
    assert_eq!(refused.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn deletion_and_create_never_miss_each_other(fixture: &impl Fixture) {
    let stores = [fixture.replica("a"), fixture.replica("b")];
    for round in 0..8 {
        let name = format!("web-{round}");
        let read = stores[0].add_challenge(&name).await;
        let create = async {
            let intent = instance(source_key(&name, "alice"), Phase::Provisioning);
            stores[0].begin_create(&read, &intent, None, &long_timeout()).await
        };
        let close = async {
            let guard = stores[1].lock(LockKind::Challenge, &challenge_id(&name), &long_timeout()).await.unwrap();
            let closed = Challenge { deleting: true, ..read.value.clone() };
            guard.update_challenge(&closed).await.unwrap();
            // An instance begun earlier is listed, and none begins later.
            let all: Vec<_> = stores[1].instances_of(&challenge_id(&name)).try_collect().await.unwrap();
            all.len()
        };
        let (created, seen) = tokio::join!(create, close);
        match created {
            Ok(guard) => {
                assert_eq!(seen, 1);
                guard.commit(Outcome::Remove).await.unwrap();
            }
            Err(Error::Conflict) => assert_eq!(seen, 0),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(stores[0].instance(&source_key(&name, "alice")).await.unwrap(), None);
    }
    stores[0].check_invariants().await;
}

pub(super) async fn pooled_instance_is_claimed_once(fixture: &impl Fixture) {
    let stores = [fixture.replica("a"), fixture.replica("b")];
    stores[0].add_challenge("web").await;
    let pool: Vec<Instance> =
        (1..=4).map(|bits| Instance { until: None, ..instance(pool_key("web", bits), Phase::Ready) }).collect();
    stores[0].put_instances(&pool).await;
    let claimers = (0..16).map(|n| {
        let store = &stores[n % 2];
        async move {
            let who = source_id(&format!("team-{n}"));
            loop {
                let snapshot = store.snapshot(&challenge_id("web"), &who).await.unwrap();
                let (Some(web), Some(pooled)) =
                    (snapshot.challenge, snapshot.pooled.get(n % snapshot.pooled.len().max(1)))
                else {
                    return None;
                };
                let key = InstanceKey { challenge: challenge_id("web"), assignment: Assignment::Source(who.clone()) };
                let claimed = Instance { identity: pooled.value.identity.clone(), ..instance(key, Phase::Ready) };
                match store.claim(&web, pooled, &claimed, &long_timeout()).await {
                    Ok(None) => return Some(claimed.identity),
                    Ok(Some(guard)) => panic!("owned: {guard:?}"),
                    Err(Error::Conflict) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
    let hits: Vec<Identity> = futures::future::join_all(claimers).await.into_iter().flatten().collect();
    assert_eq!(hits.len(), 4);
    assert_eq!(hits.iter().collect::<BTreeSet<_>>().len(), 4);
    let all: Vec<_> = stores[1].instances_of(&challenge_id("web")).try_collect().await.unwrap();
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|stored| !stored.value.key.assignment.is_pooled()));
    stores[0].check_invariants().await;
}

pub(super) async fn claim_with_an_update_is_owned(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    store.put_instances(&[Instance { until: None, ..instance(pool_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.stored_instance(&pool_key("web", 1)).await;
    let key = source_key("web", "alice");
    let claimed = Instance { target: Some(target(1)), ..instance(key.clone(), Phase::Updating) };
    let guard = store.claim(&web, &pooled, &claimed, &long_timeout()).await.unwrap().unwrap();
    assert_eq!(store.stored_instance(&key).await.value, claimed);
    assert_eq!(store.instance(&pooled.value.key).await.unwrap(), None);
    let ready = instance(key.clone(), Phase::Ready);
    guard.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn claim_of_a_changed_instance_conflicts(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    store.put_instances(&[Instance { until: None, ..instance(pool_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.stored_instance(&pool_key("web", 1)).await;
    let claimed = instance(source_key("web", "alice"), Phase::Ready);
    // The pooled instance is being deleted.
    let (guard, _) = store.begin(&pooled.value.key, Intent::Delete, &long_timeout()).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &long_timeout()).await.unwrap_err(), Error::Conflict);
    guard.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &long_timeout()).await.unwrap_err(), Error::Conflict);
    // The source has an instance.
    store.put_instances(&[Instance { until: None, ..instance(pool_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.stored_instance(&pool_key("web", 1)).await;
    store.add_ready_instance(&web, source_key("web", "alice")).await;
    assert_eq!(store.claim(&web, &pooled, &claimed, &long_timeout()).await.unwrap_err(), Error::Conflict);
    // The challenge is being changed.
    let claimed = instance(source_key("web", "bob"), Phase::Ready);
    let lock = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert!(matches!(store.claim(&web, &pooled, &claimed, &short_timeout()).await, Err(Error::Busy { .. })));
    lock.update_challenge(&Challenge { revision: 2, ..web.value.clone() }).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &long_timeout()).await.unwrap_err(), Error::Conflict);
    assert_eq!(store.stored_instance(&pooled.value.key).await, pooled);
    store.check_invariants().await;
}

pub(super) async fn delete_returns_the_current_instance(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let ready = store.add_ready_instance(&web, source_key("web", "alice")).await;
    let key = ready.value.key.clone();
    let (guard, begun) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    assert_eq!(begun, Instance { phase: Phase::Deleting, ..ready.value.clone() });
    let now = store.stored_instance(&key).await;
    assert_eq!(now.value, begun);
    assert!(now.version.0 > ready.version.0);
    let listed: Vec<_> = store.instances_of(&challenge_id("web")).try_collect().await.unwrap();
    assert_eq!(listed, vec![now]);
    guard.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.instance(&key).await.unwrap(), None);
    store.check_invariants().await;
    assert_eq!(store.all_keys().await.len(), 1, "only the challenge remains");
}

pub(super) async fn update_sets_the_target(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let ready = store.add_ready_instance(&web, source_key("web", "alice")).await.value;
    let key = ready.key.clone();
    let (guard, begun) = store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap();
    assert_eq!(begun, Instance { phase: Phase::Updating, target: Some(target(9)), ..ready.clone() });
    assert_eq!(store.stored_instance(&key).await.value, begun);
    let done = Instance { until: Some(timestamp(500)), identity: Identity::from_bits(9), ..ready };
    guard.commit(Outcome::Put(Box::new(done.clone()))).await.unwrap();
    assert_eq!(store.stored_instance(&key).await.value, done);
    store.check_invariants().await;
}

pub(super) async fn begin_waits_for_the_owner(fixture: &impl Fixture) {
    let (store, other) = (fixture.replica("a"), fixture.replica("b"));
    let web = store.add_challenge("web").await;
    let ready = store.add_ready_instance(&web, source_key("web", "alice")).await.value;
    let key = ready.key.clone();
    let (guard, _) = store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap();
    assert!(matches!(other.begin(&key, Intent::Delete, &short_timeout()).await, Err(Error::Busy { ahead: 1, .. })));
    assert_eq!(other.begin(&key, Intent::Recover, &long_timeout()).await.unwrap_err(), Error::Conflict);
    let options = long_timeout();
    let mut waiting = Box::pin(other.begin(&key, Intent::Delete, &options));
    for _ in 0..20 {
        assert!(waiting.as_mut().now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    guard.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    let (guard, begun) = waiting.await.unwrap();
    assert!(guard.waited.contended);
    assert_eq!(guard.waited.holder, long_timeout().traceparent);
    assert_eq!(begun.phase, Phase::Deleting);
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn next_owner_keeps_the_abandoned_intent(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = store.add_ready_instance(&web, source_key("web", "alice")).await.value.key;
    drop(store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap());
    let (guard, begun) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    assert_eq!(begun.phase, Phase::Deleting);
    assert_eq!(begun.target, Some(target(9)), "the target's resources must be deleted, too");
    drop(guard);
    eventually("the ownership is released", || async { store.live_keys().await.is_empty() }).await;
    let (guard, recovered) = store.begin(&key, Intent::Recover, &long_timeout()).await.unwrap();
    assert_eq!(recovered, begun);
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
    assert_eq!(store.all_keys().await.len(), 1);
}

pub(super) async fn instance_being_deleted_rejects_updates(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = store.add_ready_instance(&web, source_key("web", "alice")).await.value.key;
    // The first deletion is stored as an intent, the second in the record.
    for _ in 0..2 {
        drop(store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap());
        assert_eq!(store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap_err(), Error::Conflict);
        let left = store.stored_instance(&key).await.value;
        assert_eq!((left.phase, left.target), (Phase::Deleting, None));
        assert_eq!(store.unfinished(timestamp(0)).await.unwrap(), [Unfinished::Instance(key.clone())]);
    }
    let (guard, _) = store.begin(&key, Intent::Recover, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
    assert_eq!(store.all_keys().await.len(), 1);
}

pub(super) async fn rewrite_with_a_stale_version_conflicts(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let read = store.add_ready_instance(&web, source_key("web", "alice")).await;
    let renewed = Instance { until: Some(timestamp(900)), ..read.value.clone() };
    store.rewrite(&read, &renewed, &long_timeout()).await.unwrap();
    assert_eq!(store.stored_instance(&read.value.key).await.value, renewed);
    assert_eq!(store.rewrite(&read, &renewed, &long_timeout()).await.unwrap_err(), Error::Conflict);
    // A rewrite includes the abandoned intent that was read.
    let key = read.value.key.clone();
    drop(store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap());
    eventually("the ownership is released", || async { store.live_keys().await.is_empty() }).await;
    let left = store.stored_instance(&key).await;
    let renewed = Instance { until: Some(timestamp(1000)), ..left.value.clone() };
    store.rewrite(&left, &renewed, &long_timeout()).await.unwrap();
    assert_eq!(store.stored_instance(&key).await.value, renewed);
    store.check_invariants().await;
    let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    let left = store.stored_instance(&key).await;
    guard.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.rewrite(&left, &left.value, &long_timeout()).await.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn rewrite_waits_for_the_owner(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let read = store.add_ready_instance(&web, source_key("web", "alice")).await;
    let key = read.value.key.clone();
    let (guard, _) = store.begin(&key, Intent::Update(target(9)), &long_timeout()).await.unwrap();
    assert!(matches!(store.rewrite(&read, &read.value, &short_timeout()).await, Err(Error::Busy { .. })));
    let options = long_timeout();
    let waiting = store.rewrite(&read, &read.value, &options);
    let commit = guard.commit(Outcome::Put(Box::new(read.value.clone())));
    let (rewritten, committed) = tokio::join!(waiting, commit);
    committed.unwrap();
    assert_eq!(rewritten.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn begin_without_an_instance_conflicts(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    for begin in [Intent::Delete, Intent::Update(target(9)), Intent::Recover] {
        let result = store.begin(&source_key("web", "alice"), begin, &long_timeout()).await;
        assert_eq!(result.unwrap_err(), Error::Conflict);
    }
    let ready = store.add_ready_instance(&web, source_key("web", "alice")).await;
    assert_eq!(store.begin(&ready.value.key, Intent::Recover, &long_timeout()).await.unwrap_err(), Error::Conflict);
    store.check_invariants().await;
}

pub(super) async fn dropped_ownership_is_released(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    let key = source_key("web", "alice");
    drop(store.begin_create(&web, &instance(key.clone(), Phase::Provisioning), None, &long_timeout()).await.unwrap());
    eventually("the ownership is released", || async { store.live_keys().await.is_empty() }).await;
    assert_eq!(store.unfinished(timestamp(0)).await.unwrap(), vec![Unfinished::Instance(key.clone())]);
    let (guard, left) = store.begin(&key, Intent::Recover, &no_timeout()).await.unwrap();
    assert_eq!(left.phase, Phase::Provisioning);
    assert!(store.unfinished(timestamp(0)).await.unwrap().is_empty());
    guard.commit(Outcome::Remove).await.unwrap();
    store.check_invariants().await;
}

pub(super) async fn cancelled_begin_leaves_no_owner(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let web = store.add_challenge("web").await;
    for polls in 0..12 {
        let key = source_key("web", &format!("team-{polls}"));
        let intent = instance(key.clone(), Phase::Provisioning);
        let options = long_timeout();
        let mut begin = Box::pin(store.begin_create(&web, &intent, None, &options));
        for _ in 0..polls {
            if begin.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }
    eventually("nothing is owned", || async { store.live_keys().await.is_empty() }).await;
    let stored: Vec<_> = store.instances_of(&challenge_id("web")).try_collect().await.unwrap();
    let unfinished = store.unfinished(timestamp(0)).await.unwrap();
    let expected: Vec<_> = keys_of(&stored).into_iter().map(Unfinished::Instance).collect();
    assert_eq!(unfinished, expected, "every recorded instance is unfinished work");
    store.check_invariants().await;
}

pub(super) async fn waiting_create_reads_a_bounded_part_of_the_queue(fixture: &impl Fixture) {
    const QUEUED: usize = 60;
    let (store, queued, holder) = (fixture.replica("a"), fixture.replica("b"), fixture.replica("c"));
    let (web, options) = (store.add_challenge("web").await, long_timeout());
    store.put_instances(&[instance(pool_key("web", 1), Phase::Ready)]).await;
    let pooled = store.stored_instance(&pool_key("web", 1)).await;
    // The waiters' keys sort before the holder's: its lease is granted later.
    queued.core.lease().await.unwrap();
    let guard = holder.lock(LockKind::Challenge, &challenge_id("web"), &options).await.unwrap();
    let web_id = challenge_id("web");
    let mut waiting: Vec<_> =
        (0..QUEUED).map(|_| Box::pin(queued.lock(LockKind::Challenge, &web_id, &options))).collect();
    eventually("all waiters are queued", || {
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        async { store.live_keys().await.len() == QUEUED + 1 }
    })
    .await;
    store.core.kv.reset();
    let new = instance(source_key("web", "alice"), Phase::Provisioning);
    let busy = store.begin_create(&web, &new, None, &short_timeout()).await.unwrap_err();
    let Error::Busy { what, ahead, .. } = &busy else { panic!("{busy:?}") };
    assert!(what.contains("(held by c since ") && *ahead == QUEUED as u64 + 1, "{busy}");
    let claimed = Instance { key: source_key("web", "bob"), ..pooled.value.clone() };
    let busy = store.claim(&web, &pooled, &claimed, &short_timeout()).await.unwrap_err();
    assert!(matches!(&busy, Error::Busy { ahead, .. } if *ahead == QUEUED as u64 + 1), "{busy}");
    assert!(store.core.kv.largest_read() <= 20, "{} keys read at once", store.core.kv.largest_read());
    let mut create = Box::pin(store.begin_create(&web, &new, None, &options));
    eventually("the create waits behind all of them", || {
        assert!(create.as_mut().now_or_never().is_none());
        let first = store.waits(1).1.pop();
        async move {
            first.is_some_and(|wait| {
                wait.position == QUEUED + 1 && wait.holder.is_some_and(|holder| holder.replica == "c")
            })
        }
    })
    .await;
    let go_on = async {
        guard.release().await.unwrap();
        // In any order: the requests were sent concurrently.
        let each = waiting.into_iter().map(async |one| one.await.unwrap().release().await.unwrap());
        futures::future::join_all(each).await;
    };
    let (created, ()) = tokio::join!(create, go_on);
    let created = created.unwrap();
    assert_eq!(created.waited.queue_depth, QUEUED as u64 + 1);
    created.commit(Outcome::Remove).await.unwrap();
}
