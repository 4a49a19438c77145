//! The number of calls to the key-value port that each operation may make.

use std::sync::Arc;

use futures::FutureExt as _;
use gauntlet_domain::Gauntlet;
use gauntlet_testing::fixtures::new_challenge;

use super::{
    noop::{call_now, gauntlet},
    *,
};

/// Waits for the replica's lease, which is granted once, and resets the counters.
async fn start_counting<K: TestKv>(store: &Coordination<K>) {
    store.core.lease().await.unwrap();
    store.core.kv.reset();
}

pub(super) async fn operations_stay_within_budget(fixture: &impl Fixture) {
    let store = fixture.replica("a");
    let assert_calls = |what: &str, expected: &[(&'static str, usize)]| {
        assert_eq!(store.core.kv.calls(), expected.iter().copied().collect(), "{what}");
        store.core.kv.reset();
    };
    start_counting(&store).await;

    store.insert_challenge(&challenge("web")).await.unwrap();
    assert_calls("insert a challenge", &[("txn", 1)]);

    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    assert_calls("acquire a lock", &[("txn", 1)]);
    guard.release().await.unwrap();
    assert_calls("release a lock", &[("txn", 1)]);

    let key = source_key("web", "alice");
    let snapshot = store.snapshot(&challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_calls("a snapshot for a create", &[("txn", 1)]);
    let web = snapshot.challenge.unwrap();
    let intent = instance(key.clone(), Phase::Provisioning);
    let guard = store.begin_create(&web, &intent, None, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Put(Box::new(instance(key.clone(), Phase::Ready)))).await.unwrap();
    assert_calls("a create", &[("txn", 2)]);

    let stored = store.stored_instance(&key).await;
    store.core.kv.reset();
    store
        .rewrite(&stored, &Instance { until: Some(timestamp(500)), ..stored.value.clone() }, &long_timeout())
        .await
        .unwrap();
    assert_calls("a renewal", &[("txn", 1)]);

    let (guard, _) = store.begin(&key, Intent::Delete, &long_timeout()).await.unwrap();
    guard.commit(Outcome::Remove).await.unwrap();
    assert_calls("a delete", &[("txn", 2)]);

    store.put_instances(&[instance(pool_key("web", 1), Phase::Ready)]).await;
    let pooled = store.stored_instance(&pool_key("web", 1)).await;
    store.core.kv.reset();
    store.claim(&web, &pooled, &instance(key.clone(), Phase::Ready), &long_timeout()).await.unwrap();
    assert_calls("a claim", &[("txn", 1)]);

    store.pool(&challenge_id("web"), 1000, 1000).await.unwrap();
    assert_calls("the counts for a refill", &[("txn", 1)]);

    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    guard.update_challenge(&web.value).await.unwrap();
    assert_calls("update a challenge", &[("txn", 2)]);

    let all: Vec<Instance> =
        (0..900).map(|n| instance(source_key("web", &format!("team-{n}")), Phase::Ready)).collect();
    store.put_instances(&all).await;
    store.core.kv.reset();
    let listed: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(listed.len(), 901);
    assert_calls("a listing reads its pages only", &[("page", 4)]);
    let listed: Vec<_> = store.instances_by_source(Some(&source_id("team-5"))).try_collect().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_calls("a source's listing reads its own instances only", &[("page", 1), ("txn", 1)]);
    assert!(store.unfinished(timestamp(0)).await.unwrap().is_empty());
    assert_calls("find unfinished work", &[("page", 3)]);
}

pub(super) async fn use_cases_stay_within_budget(fixture: &impl Fixture) {
    let store = Arc::new(fixture.replica("a"));
    let gauntlet = gauntlet(store.clone());
    let assert_calls = |what: &str, expected: &[(&'static str, usize)]| {
        assert_eq!(store.core.kv.calls(), expected.iter().copied().collect(), "{what}");
        store.core.kv.reset();
    };
    let create = |name: &'static str, who: &'static str| {
        let gauntlet = &gauntlet;
        async move {
            gauntlet.create_instance(&call_now(), &challenge_id(name), &source_id(who), BTreeMap::new()).await.unwrap()
        }
    };
    start_counting(&store).await;
    gauntlet.create_challenge(&call_now(), new_challenge("web", 0)).await.unwrap();
    assert_calls("a challenge: check whether it exists, then insert it", &[("txn", 2)]);
    create("web", "alice").await;
    assert_calls("a create", &[("txn", 2)]);
    gauntlet.renew_instance(&call_now(), &challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_calls("a renewal", &[("txn", 1)]);
    gauntlet.renew_instance(&call_now(), &challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_calls("a second renewal", &[("txn", 1)]);
    gauntlet.delete_instance(&call_now(), &challenge_id("web"), &source_id("alice")).await.unwrap();
    assert_calls("a delete", &[("txn", 2)]);

    gauntlet.create_challenge(&call_now(), new_challenge("pooled", 3)).await.unwrap();
    gauntlet_testing::maintain_pool(&gauntlet, &call_now(), &challenge_id("pooled")).await.unwrap();
    store.core.kv.reset();
    for who in ["alice", "bob", "carol"] {
        create("pooled", who).await;
        assert_calls("a claim", &[("txn", 1)]);
    }
    gauntlet.plan_pool(&call_now(), &challenge_id("web"), 8).await.unwrap();
    assert_calls("the plan for a pool", &[("txn", 2)]);
    create("pooled", "dave").await;
    assert_calls("a create beside an empty pool: check the pool again, begin, commit", &[("txn", 3)]);

    // Another replica has an empty cache; then this one has a stale cache.
    let other = Arc::new(fixture.replica("b"));
    let elsewhere = self::gauntlet(other.clone());
    start_counting(&other).await;
    let renew = |gauntlet: &Gauntlet| {
        let gauntlet = gauntlet.clone();
        async move { gauntlet.renew_instance(&call_now(), &challenge_id("pooled"), &source_id("alice")).await.unwrap() }
    };
    renew(&elsewhere).await;
    assert_eq!(other.core.kv.calls(), BTreeMap::from([("txn", 2)]), "uncached records are read");
    renew(&gauntlet).await;
    assert_calls("a stale cache costs one retry", &[("txn", 2)]);
    drop(elsewhere);
    store.check_invariants().await;
}

pub(super) async fn resolved_commit_adds_no_later_calls(fixture: &impl Fixture) {
    let store = Arc::new(fixture.replica("a"));
    let gauntlet = gauntlet(store.clone());
    start_counting(&store).await;
    gauntlet.create_challenge(&call_now(), new_challenge("web", 0)).await.unwrap();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let web = store.stored_challenge("web").await.value;
    store.core.kv.inject(Fault::LostResponse);
    guard.update_challenge(&Challenge { revision: web.revision + 1, ..web }).await.unwrap();
    for who in ["alice", "bob"] {
        store.core.kv.reset();
        gauntlet.create_instance(&call_now(), &challenge_id("web"), &source_id(who), BTreeMap::new()).await.unwrap();
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 2)]), "{who}");
    }
    let key = source_key("web", "carol");
    let intent = instance(key.clone(), Phase::Provisioning);
    let guard = store.begin_create(&store.stored_challenge("web").await, &intent, None, &long_timeout()).await.unwrap();
    store.core.kv.inject(Fault::LostResponse);
    let ready = Instance { applied_revision: 2, until: None, ..instance(key.clone(), Phase::Ready) };
    guard.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    for which in ["a renewal", "a second renewal"] {
        store.core.kv.reset();
        gauntlet.renew_instance(&call_now(), &challenge_id("web"), &source_id("carol")).await.unwrap();
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 1)]), "{which}");
    }
}

pub(super) async fn stale_cache_is_never_trusted(fixture: &impl Fixture) {
    let (a, b) = (Arc::new(fixture.replica("a")), Arc::new(fixture.replica("b")));
    let (one, two) = (gauntlet(a.clone()), gauntlet(b.clone()));
    let (web, alice) = (challenge_id("web"), source_id("alice"));
    one.create_challenge(&call_now(), new_challenge("web", 2)).await.unwrap();
    gauntlet_testing::maintain_pool(&one, &call_now(), &web).await.unwrap();
    assert_eq!(a.cached_snapshot(&web, &alice).unwrap().pooled.len(), 2);
    // The second replica changes everything that the first has cached: it uses up the pool, changes the timeout, deletes the instance.
    two.create_instance(&call_now(), &web, &source_id("bob"), BTreeMap::new()).await.unwrap();
    two.create_instance(&call_now(), &web, &source_id("carol"), BTreeMap::new()).await.unwrap();
    one.create_instance(&call_now(), &web, &alice, BTreeMap::new()).await.unwrap();
    let timeout = Some(Duration::from_secs(7200));
    let update = gauntlet_domain::ChallengeUpdate { timeout: Some(timeout), ..Default::default() };
    two.update_challenge(&call_now(), &web, update).await.unwrap();
    let (renewed, now) = (one.renew_instance(&call_now(), &web, &alice).await.unwrap(), Timestamp::now());
    assert!(renewed.until.unwrap() > now + Duration::from_secs(7000), "the new timeout applies");
    two.delete_instance(&call_now(), &web, &alice).await.unwrap();
    let refused = one.renew_instance(&call_now(), &web, &alice).await.unwrap_err();
    assert_eq!(refused, Error::InstanceNotFound(web.clone(), alice.clone()));
    one.create_instance(&call_now(), &web, &alice, BTreeMap::new()).await.unwrap();
    let refused = two.create_instance(&call_now(), &web, &alice, BTreeMap::new()).await.unwrap_err();
    assert_eq!(refused, Error::InstanceExists(web.clone(), alice.clone()));
    two.delete_challenge(&call_now(), &web).await.unwrap();
    let refused = one.create_instance(&call_now(), &web, &alice, BTreeMap::new()).await.unwrap_err();
    assert_eq!(refused, Error::ChallengeNotFound(web.clone()));
    a.check_invariants().await;
}

pub(super) async fn waiters_share_one_watch(fixture: &impl Fixture) {
    const WAITERS: usize = 1000;
    let store = fixture.replica("a");
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &long_timeout()).await.unwrap();
    let (web, options) = (challenge_id("web"), LockOptions { timeout: Duration::from_secs(300), ..long_timeout() });
    let mut waiting: Vec<_> = (0..WAITERS).map(|_| Box::pin(store.lock(LockKind::Challenge, &web, &options))).collect();
    eventually("all callers wait", || {
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        async { store.live_keys().await.len() == WAITERS + 1 }
    })
    .await;
    assert_eq!(store.core.kv.calls().get("watch"), Some(&1));
    drop(waiting);
    guard.release().await.unwrap();
    store.check_invariants().await;
}
