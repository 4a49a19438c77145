//! Ownership of instances.

use futures::FutureExt as _;

use super::*;

pub(super) async fn a_seat_is_taken_once(rig: &impl Rig) {
    let stores = [rig.replica("a"), rig.replica("b")];
    let web = stores[0].with("web").await;
    let key = instance_key("web", "alice");
    let tries = (0..16).map(|n| {
        let (store, web, key) = (&stores[n % 2], &web, &key);
        async move {
            let intent = instance(key.clone(), Phase::Provisioning);
            store.begin_create(web, &intent, None, &patient()).await
        }
    });
    let (mut taken, mut conflicts) = (Vec::new(), 0);
    for result in futures::future::join_all(tries).await {
        match result {
            Ok(held) => taken.push(held),
            Err(Error::Conflict) => conflicts += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((taken.len(), conflicts), (1, 15));
    let held = taken.remove(0);
    assert_eq!(held.kind, LockKind::Instance);
    assert_eq!(stores[1].at(&key).await.value.phase, Phase::Provisioning);
    held.commit(Outcome::Remove).await.unwrap();
    stores[0].check().await;
    stores[0].ready(&web, key).await;
    stores[0].check().await;
}

pub(super) async fn a_changed_challenge_conflicts(rig: &impl Rig) {
    let store = rig.replica("a");
    let old = store.with("web").await;
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.update_challenge(&Challenge { revision: 2, ..old.value.clone() }).await.unwrap();
    let intent = instance(instance_key("web", "alice"), Phase::Provisioning);
    assert_eq!(store.begin_create(&old, &intent, None, &patient()).await.unwrap_err(), Error::Conflict);
    assert_eq!(store.instance(&intent.key).await.unwrap(), None);
    let gone = Stored { value: challenge("gone"), ..old };
    let intent = instance(instance_key("gone", "alice"), Phase::Provisioning);
    assert_eq!(store.begin_create(&gone, &intent, None, &patient()).await.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn a_create_waits_for_the_challenge_lock(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = store.with("web").await;
    let intent = instance(instance_key("web", "alice"), Phase::Provisioning);
    let lock = other.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(matches!(store.begin_create(&web, &intent, None, &short()).await, Err(Error::Busy { ahead: 1, .. })));
    assert!(matches!(store.begin_create(&web, &intent, None, &at_once()).await, Err(Error::Busy { .. })));
    assert_eq!(store.instance(&intent.key).await.unwrap(), None);
    let by = patient();
    let mut waiting = Box::pin(store.begin_create(&web, &intent, None, &by));
    for _ in 0..20 {
        assert!(waiting.as_mut().now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    lock.release().await.unwrap();
    let held = waiting.await.unwrap();
    assert!(held.waited.contended);
    assert_eq!(held.waited.holder, patient().traceparent);
    held.commit(Outcome::Remove).await.unwrap();
    // The rollout lock is no matter to it.
    let rollout = other.lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap();
    let held = store.begin_create(&web, &intent, None, &at_once()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    rollout.release().await.unwrap();
    store.check().await;
}

/// A challenge with bounds, stored.
async fn bounded<T: Tested>(store: &Coordination<T>, name: &str, min: i64, max: i64) -> Stored<Challenge> {
    let bounds = PoolBounds::new(min, max).unwrap();
    store.insert_challenge(&Challenge { bounds, ..challenge(name) }).await.unwrap();
    store.stored(name).await
}

pub(super) async fn an_instance_begins_only_in_the_pool_that_was_counted(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = bounded(&store, "web", 2, 3).await;
    let pooled = |bits| Instance { until: None, ..instance(pooled_key("web", bits), Phase::Provisioning) };
    let counted = store.pool(&id("web"), 3, 9).await.unwrap();
    let first = store.begin_create(&web, &pooled(1), Some(counted.version), &at_once()).await.unwrap();
    // Whoever counted before has not counted that one.
    let again = other.begin_create(&web, &pooled(2), Some(counted.version), &at_once()).await;
    assert_eq!(again.unwrap_err(), Error::Conflict);
    let next = other.pool(&id("web"), 3, 9).await.unwrap();
    assert_eq!(next.version, Version(first.token));
    assert_eq!(next.pooled, [(pooled_key("web", 1), PhaseName::Provisioning)]);
    // Nor one that a source takes beside the pool.
    let alice = instance_key("web", "alice");
    let taken =
        store.begin_create(&web, &instance(alice.clone(), Phase::Provisioning), None, &at_once()).await.unwrap();
    let beside = other.begin_create(&web, &pooled(2), Some(next.version), &at_once()).await;
    assert_eq!(beside.unwrap_err(), Error::Conflict);
    // What is finished, and what is taken from the pool, adds nothing.
    let counted = other.pool(&id("web"), 3, 9).await.unwrap();
    assert_eq!((counted.claimed, counted.pooled.len()), (1, 1));
    let ready = Instance { phase: Phase::Ready, ..pooled(1) };
    first.commit(Outcome::Put(Box::new(ready.clone()))).await.unwrap();
    taken.commit(Outcome::Put(Box::new(instance(alice.clone(), Phase::Ready)))).await.unwrap();
    let stored = store.at(&ready.key).await;
    store.claim(&web, &stored, &instance(instance_key("web", "bob"), Phase::Ready), &at_once()).await.unwrap();
    let second = other.begin_create(&web, &pooled(2), Some(counted.version), &at_once()).await.unwrap();
    second.commit(Outcome::Remove).await.unwrap();
    // A change of the challenge is told by the challenge.
    let lock = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    lock.update_challenge(&Challenge { revision: 2, ..web.value.clone() }).await.unwrap();
    let version = other.pool(&id("web"), 3, 9).await.unwrap().version;
    let late = other.begin_create(&web, &pooled(3), Some(version), &at_once()).await;
    assert_eq!(late.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn creates_beside_a_pool_without_an_upper_bound_do_not_hold_it_up(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = bounded(&store, "web", 2, 0).await;
    let counted = store.pool(&id("web"), 0, 9).await.unwrap();
    store.ready(&web, instance_key("web", "alice")).await;
    let pooled = Instance { until: None, ..instance(pooled_key("web", 1), Phase::Provisioning) };
    let held = store.begin_create(&web, &pooled, Some(counted.version), &at_once()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    // One that keeps no pool has no version to begin by.
    let none = store.with("none").await;
    store.ready(&none, instance_key("none", "alice")).await;
    let counted = store.pool(&id("none"), 0, 9).await.unwrap();
    let pooled = Instance { until: None, ..instance(pooled_key("none", 1), Phase::Provisioning) };
    let refused = store.begin_create(&none, &pooled, Some(counted.version), &at_once()).await;
    assert_eq!(refused.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn closing_and_creating_never_miss_each_other(rig: &impl Rig) {
    let stores = [rig.replica("a"), rig.replica("b")];
    for round in 0..8 {
        let name = format!("web-{round}");
        let read = stores[0].with(&name).await;
        let create = async {
            let intent = instance(instance_key(&name, "alice"), Phase::Provisioning);
            stores[0].begin_create(&read, &intent, None, &patient()).await
        };
        let close = async {
            let held = stores[1].lock(LockKind::Challenge, &id(&name), &patient()).await.unwrap();
            let closed = Challenge { deleting: true, ..read.value.clone() };
            held.update_challenge(&closed).await.unwrap();
            // Whatever was begun before is seen, and nothing is begun after.
            let all: Vec<_> = stores[1].instances_of(&id(&name)).try_collect().await.unwrap();
            all.len()
        };
        let (created, seen) = tokio::join!(create, close);
        match created {
            Ok(held) => {
                assert_eq!(seen, 1);
                held.commit(Outcome::Remove).await.unwrap();
            }
            Err(Error::Conflict) => assert_eq!(seen, 0),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(stores[0].instance(&instance_key(&name, "alice")).await.unwrap(), None);
    }
    stores[0].check().await;
}

pub(super) async fn a_pooled_instance_is_claimed_once(rig: &impl Rig) {
    let stores = [rig.replica("a"), rig.replica("b")];
    stores[0].with("web").await;
    let pool: Vec<Instance> =
        (1..=4).map(|bits| Instance { until: None, ..instance(pooled_key("web", bits), Phase::Ready) }).collect();
    stores[0].put(&pool).await;
    let claimers = (0..16).map(|n| {
        let store = &stores[n % 2];
        async move {
            let who = source(&format!("team-{n}"));
            loop {
                let snapshot = store.snapshot(&id("web"), &who).await.unwrap();
                let (Some(web), Some(pooled)) =
                    (snapshot.challenge, snapshot.pooled.get(n % snapshot.pooled.len().max(1)))
                else {
                    return None;
                };
                let key = InstanceKey { challenge: id("web"), assignment: Assignment::Source(who.clone()) };
                let claimed = Instance { identity: pooled.value.identity.clone(), ..instance(key, Phase::Ready) };
                match store.claim(&web, pooled, &claimed, &patient()).await {
                    Ok(None) => return Some(claimed.identity),
                    Ok(Some(held)) => panic!("owned: {held:?}"),
                    Err(Error::Conflict) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
    let hits: Vec<Identity> = futures::future::join_all(claimers).await.into_iter().flatten().collect();
    assert_eq!(hits.len(), 4);
    assert_eq!(hits.iter().collect::<BTreeSet<_>>().len(), 4);
    let all: Vec<_> = stores[1].instances_of(&id("web")).try_collect().await.unwrap();
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|stored| !stored.value.key.assignment.is_pooled()));
    stores[0].check().await;
}

pub(super) async fn a_claim_with_values_is_owned(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    store.put(&[Instance { until: None, ..instance(pooled_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.at(&pooled_key("web", 1)).await;
    let key = instance_key("web", "alice");
    let claimed = Instance { target: Some(target(1)), ..instance(key.clone(), Phase::Updating) };
    let held = store.claim(&web, &pooled, &claimed, &patient()).await.unwrap().unwrap();
    assert_eq!(store.at(&key).await.value, claimed);
    assert_eq!(store.instance(&pooled.value.key).await.unwrap(), None);
    let ready = instance(key.clone(), Phase::Ready);
    held.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    store.check().await;
}

pub(super) async fn a_claim_of_what_changed_conflicts(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    store.put(&[Instance { until: None, ..instance(pooled_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.at(&pooled_key("web", 1)).await;
    let claimed = instance(instance_key("web", "alice"), Phase::Ready);
    // Being taken down.
    let (held, _) = store.begin(&pooled.value.key, Intent::Delete, &patient()).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &patient()).await.unwrap_err(), Error::Conflict);
    held.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &patient()).await.unwrap_err(), Error::Conflict);
    // The seat is taken.
    store.put(&[Instance { until: None, ..instance(pooled_key("web", 1), Phase::Ready) }]).await;
    let pooled = store.at(&pooled_key("web", 1)).await;
    store.ready(&web, instance_key("web", "alice")).await;
    assert_eq!(store.claim(&web, &pooled, &claimed, &patient()).await.unwrap_err(), Error::Conflict);
    // The challenge is being changed.
    let claimed = instance(instance_key("web", "bob"), Phase::Ready);
    let lock = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    assert!(matches!(store.claim(&web, &pooled, &claimed, &short()).await, Err(Error::Busy { .. })));
    lock.update_challenge(&Challenge { revision: 2, ..web.value.clone() }).await.unwrap();
    assert_eq!(store.claim(&web, &pooled, &claimed, &patient()).await.unwrap_err(), Error::Conflict);
    assert_eq!(store.at(&pooled.value.key).await, pooled);
    store.check().await;
}

pub(super) async fn a_delete_takes_the_instance_as_it_is(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let ready = store.ready(&web, instance_key("web", "alice")).await;
    let key = ready.value.key.clone();
    let (held, begun) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    assert_eq!(begun, Instance { phase: Phase::Deleting, ..ready.value.clone() });
    let now = store.at(&key).await;
    assert_eq!(now.value, begun);
    assert!(now.version.0 > ready.version.0);
    let listed: Vec<_> = store.instances_of(&id("web")).try_collect().await.unwrap();
    assert_eq!(listed, vec![now]);
    held.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.instance(&key).await.unwrap(), None);
    store.check().await;
    assert_eq!(store.all_keys().await.len(), 1, "the challenge is left");
}

pub(super) async fn an_update_sets_the_target(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let ready = store.ready(&web, instance_key("web", "alice")).await.value;
    let key = ready.key.clone();
    let (held, begun) = store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap();
    assert_eq!(begun, Instance { phase: Phase::Updating, target: Some(target(9)), ..ready.clone() });
    assert_eq!(store.at(&key).await.value, begun);
    let done = Instance { until: Some(at(500)), identity: Identity::from_bits(9), ..ready };
    held.commit(Outcome::Put(Box::new(done.clone()))).await.unwrap();
    assert_eq!(store.at(&key).await.value, done);
    store.check().await;
}

pub(super) async fn an_owner_is_waited_for(rig: &impl Rig) {
    let (store, other) = (rig.replica("a"), rig.replica("b"));
    let web = store.with("web").await;
    let ready = store.ready(&web, instance_key("web", "alice")).await.value;
    let key = ready.key.clone();
    let (held, _) = store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap();
    assert!(matches!(other.begin(&key, Intent::Delete, &short()).await, Err(Error::Busy { ahead: 1, .. })));
    assert_eq!(other.begin(&key, Intent::Recover, &patient()).await.unwrap_err(), Error::Conflict);
    let by = patient();
    let mut waiting = Box::pin(other.begin(&key, Intent::Delete, &by));
    for _ in 0..20 {
        assert!(waiting.as_mut().now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    held.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    let (held, begun) = waiting.await.unwrap();
    assert!(held.waited.contended);
    assert_eq!(held.waited.holder, patient().traceparent);
    assert_eq!(begun.phase, Phase::Deleting);
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn what_an_owner_left_is_kept_by_the_next(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = store.ready(&web, instance_key("web", "alice")).await.value.key;
    drop(store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap());
    let (held, begun) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    assert_eq!(begun.phase, Phase::Deleting);
    assert_eq!(begun.target, Some(target(9)), "its resources must go too");
    drop(held);
    eventually("given up", || async { store.live_keys().await.is_empty() }).await;
    let (held, recovered) = store.begin(&key, Intent::Recover, &patient()).await.unwrap();
    assert_eq!(recovered, begun);
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
    assert_eq!(store.all_keys().await.len(), 1);
}

pub(super) async fn what_was_being_deleted_is_not_updated(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = store.ready(&web, instance_key("web", "alice")).await.value.key;
    // The first deletion is an intent beside the record, the second is in the record.
    for _ in 0..2 {
        drop(store.begin(&key, Intent::Delete, &patient()).await.unwrap());
        assert_eq!(store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap_err(), Error::Conflict);
        let left = store.at(&key).await.value;
        assert_eq!((left.phase, left.target), (Phase::Deleting, None));
        assert_eq!(store.unfinished(at(0)).await.unwrap(), [Unfinished::Instance(key.clone())]);
    }
    let (held, _) = store.begin(&key, Intent::Recover, &patient()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
    assert_eq!(store.all_keys().await.len(), 1);
}

pub(super) async fn a_rewrite_needs_the_version_it_read(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let read = store.ready(&web, instance_key("web", "alice")).await;
    let renewed = Instance { until: Some(at(900)), ..read.value.clone() };
    store.rewrite(&read, &renewed, &patient()).await.unwrap();
    assert_eq!(store.at(&read.value.key).await.value, renewed);
    assert_eq!(store.rewrite(&read, &renewed, &patient()).await.unwrap_err(), Error::Conflict);
    // What an owner left behind is written over as it was read.
    let key = read.value.key.clone();
    drop(store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap());
    eventually("given up", || async { store.live_keys().await.is_empty() }).await;
    let left = store.at(&key).await;
    let renewed = Instance { until: Some(at(1000)), ..left.value.clone() };
    store.rewrite(&left, &renewed, &patient()).await.unwrap();
    assert_eq!(store.at(&key).await.value, renewed);
    store.check().await;
    let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    let left = store.at(&key).await;
    held.commit(Outcome::Remove).await.unwrap();
    assert_eq!(store.rewrite(&left, &left.value, &patient()).await.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn a_rewrite_waits_for_the_owner(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let read = store.ready(&web, instance_key("web", "alice")).await;
    let key = read.value.key.clone();
    let (held, _) = store.begin(&key, Intent::Update(target(9)), &patient()).await.unwrap();
    assert!(matches!(store.rewrite(&read, &read.value, &short()).await, Err(Error::Busy { .. })));
    let by = patient();
    let waiting = store.rewrite(&read, &read.value, &by);
    let commit = held.commit(Outcome::Put(Box::new(read.value.clone())));
    let (rewritten, committed) = tokio::join!(waiting, commit);
    committed.unwrap();
    assert_eq!(rewritten.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn nothing_begins_where_nothing_is(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    for begin in [Intent::Delete, Intent::Update(target(9)), Intent::Recover] {
        let result = store.begin(&instance_key("web", "alice"), begin, &patient()).await;
        assert_eq!(result.unwrap_err(), Error::Conflict);
    }
    let ready = store.ready(&web, instance_key("web", "alice")).await;
    assert_eq!(store.begin(&ready.value.key, Intent::Recover, &patient()).await.unwrap_err(), Error::Conflict);
    store.check().await;
}

pub(super) async fn a_dropped_ownership_is_given_up(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    let key = instance_key("web", "alice");
    drop(store.begin_create(&web, &instance(key.clone(), Phase::Provisioning), None, &patient()).await.unwrap());
    eventually("given up", || async { store.live_keys().await.is_empty() }).await;
    assert_eq!(store.unfinished(at(0)).await.unwrap(), vec![Unfinished::Instance(key.clone())]);
    let (held, left) = store.begin(&key, Intent::Recover, &at_once()).await.unwrap();
    assert_eq!(left.phase, Phase::Provisioning);
    assert!(store.unfinished(at(0)).await.unwrap().is_empty());
    held.commit(Outcome::Remove).await.unwrap();
    store.check().await;
}

pub(super) async fn a_cancelled_begin_leaves_no_owner(rig: &impl Rig) {
    let store = rig.replica("a");
    let web = store.with("web").await;
    for polls in 0..12 {
        let key = instance_key("web", &format!("team-{polls}"));
        let intent = instance(key.clone(), Phase::Provisioning);
        let by = patient();
        let mut begin = Box::pin(store.begin_create(&web, &intent, None, &by));
        for _ in 0..polls {
            if begin.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }
    eventually("nothing is owned", || async { store.live_keys().await.is_empty() }).await;
    let stored: Vec<_> = store.instances_of(&id("web")).try_collect().await.unwrap();
    let unfinished = store.unfinished(at(0)).await.unwrap();
    let expected: Vec<_> = keys_of(&stored).into_iter().map(Unfinished::Instance).collect();
    assert_eq!(unfinished, expected, "what was recorded is found");
    store.check().await;
}

pub(super) async fn a_create_that_waits_reads_some_of_those_ahead(rig: &impl Rig) {
    const QUEUED: usize = 60;
    let (store, queued, holder) = (rig.replica("a"), rig.replica("b"), rig.replica("c"));
    let (web, by) = (store.with("web").await, patient());
    store.put(&[instance(pooled_key("web", 1), Phase::Ready)]).await;
    let pooled = store.at(&pooled_key("web", 1)).await;
    // Their keys sort before that of whoever holds the lock.
    queued.core.lease().await.unwrap();
    let held = holder.lock(LockKind::Challenge, &id("web"), &by).await.unwrap();
    let web_id = id("web");
    let mut waiting: Vec<_> = (0..QUEUED).map(|_| Box::pin(queued.lock(LockKind::Challenge, &web_id, &by))).collect();
    eventually("all are queued", || {
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        async { store.live_keys().await.len() == QUEUED + 1 }
    })
    .await;
    store.core.kv.reset();
    let new = instance(instance_key("web", "alice"), Phase::Provisioning);
    let busy = store.begin_create(&web, &new, None, &short()).await.unwrap_err();
    let Error::Busy { what, ahead, .. } = &busy else { panic!("{busy:?}") };
    assert!(what.contains("(held by c since ") && *ahead == QUEUED as u64 + 1, "{busy}");
    let claimed = Instance { key: instance_key("web", "bob"), ..pooled.value.clone() };
    let busy = store.claim(&web, &pooled, &claimed, &short()).await.unwrap_err();
    assert!(matches!(&busy, Error::Busy { ahead, .. } if *ahead == QUEUED as u64 + 1), "{busy}");
    assert!(store.core.kv.largest() <= 20, "{} keys read at once", store.core.kv.largest());
    let mut create = Box::pin(store.begin_create(&web, &new, None, &by));
    eventually("it waits behind all of them", || {
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
        held.release().await.unwrap();
        // In whichever order they have come to be queued.
        let each = waiting.into_iter().map(async |one| one.await.unwrap().release().await.unwrap());
        futures::future::join_all(each).await;
    };
    let (created, ()) = tokio::join!(create, go_on);
    let created = created.unwrap();
    assert_eq!(created.waited.queue_depth, QUEUED as u64 + 1);
    created.commit(Outcome::Remove).await.unwrap();
}
