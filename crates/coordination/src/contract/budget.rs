//! What each operation may cost, in calls of the key-value port.

use std::sync::Arc;

use futures::FutureExt as _;
use gauntlet_domain::{Gauntlet, NewChallenge};

use super::{
    nothing::{call, gauntlet},
    *,
};

/// Has the replica get its lease, which it gets once, and counts from there.
async fn settled<K: Tested>(store: &Coordination<K>) {
    store.core.lease().await.unwrap();
    store.core.kv.reset();
}

pub(super) async fn each_operation_keeps_its_budget(rig: &impl Rig) {
    let store = rig.replica("a");
    let spent = |what: &str, expected: &[(&'static str, usize)]| {
        assert_eq!(store.core.kv.calls(), expected.iter().copied().collect(), "{what}");
        store.core.kv.reset();
    };
    settled(&store).await;

    store.insert_challenge(&challenge("web")).await.unwrap();
    spent("a challenge is inserted", &[("txn", 1)]);

    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    spent("a lock is taken", &[("txn", 1)]);
    held.release().await.unwrap();
    spent("a lock is released", &[("txn", 1)]);

    let key = instance_key("web", "alice");
    let snapshot = store.snapshot(&id("web"), &source("alice")).await.unwrap();
    spent("what a create needs to know", &[("txn", 1)]);
    let web = snapshot.challenge.unwrap();
    let intent = instance(key.clone(), Phase::Provisioning);
    let held = store.begin_create(&web, &intent, None, &patient()).await.unwrap();
    held.commit(Outcome::Put(Box::new(instance(key.clone(), Phase::Ready)))).await.unwrap();
    spent("a create", &[("txn", 2)]);

    let stored = store.at(&key).await;
    store.core.kv.reset();
    store.rewrite(&stored, &Instance { until: Some(at(500)), ..stored.value.clone() }, &patient()).await.unwrap();
    spent("a renewal", &[("txn", 1)]);

    let (held, _) = store.begin(&key, Intent::Delete, &patient()).await.unwrap();
    held.commit(Outcome::Remove).await.unwrap();
    spent("a delete", &[("txn", 2)]);

    store.put(&[instance(pooled_key("web", 1), Phase::Ready)]).await;
    let pooled = store.at(&pooled_key("web", 1)).await;
    store.core.kv.reset();
    store.claim(&web, &pooled, &instance(key.clone(), Phase::Ready), &patient()).await.unwrap();
    spent("a claim", &[("txn", 1)]);

    store.pool(&id("web"), 1000, 1000).await.unwrap();
    spent("what a refill needs to know", &[("txn", 1)]);

    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    held.update_challenge(&web.value).await.unwrap();
    spent("a change of a challenge", &[("txn", 2)]);

    let all: Vec<Instance> =
        (0..900).map(|n| instance(instance_key("web", &format!("team-{n}")), Phase::Ready)).collect();
    store.put(&all).await;
    store.core.kv.reset();
    let listed: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(listed.len(), 901);
    spent("a query is its pages", &[("page", 4)]);
    let listed: Vec<_> = store.instances_by_source(Some(&source("team-5"))).try_collect().await.unwrap();
    assert_eq!(listed.len(), 1);
    spent("a source's query is what it returns", &[("page", 1), ("txn", 1)]);
    assert!(store.unfinished(at(0)).await.unwrap().is_empty());
    spent("looking for unfinished work", &[("page", 3)]);
}

fn new(name: &str, min: i64) -> NewChallenge {
    NewChallenge {
        id: id(name),
        scenario: "registry.test/web:1".to_owned(),
        timeout: Some(Duration::from_secs(60)),
        until: None,
        additional: BTreeMap::new(),
        min,
        max: 0,
    }
}

pub(super) async fn each_use_case_keeps_its_budget(rig: &impl Rig) {
    let store = Arc::new(rig.replica("a"));
    let gauntlet = gauntlet(store.clone());
    let spent = |what: &str, expected: &[(&'static str, usize)]| {
        assert_eq!(store.core.kv.calls(), expected.iter().copied().collect(), "{what}");
        store.core.kv.reset();
    };
    let create = |name: &'static str, who: &'static str| {
        let gauntlet = &gauntlet;
        async move { gauntlet.create_instance(&call(), &id(name), &source(who), BTreeMap::new()).await.unwrap() }
    };
    settled(&store).await;
    gauntlet.create_challenge(&call(), new("web", 0)).await.unwrap();
    spent("a challenge: known already? then stored", &[("txn", 2)]);
    create("web", "alice").await;
    spent("a create", &[("txn", 2)]);
    gauntlet.renew_instance(&call(), &id("web"), &source("alice")).await.unwrap();
    spent("a renewal", &[("txn", 1)]);
    gauntlet.renew_instance(&call(), &id("web"), &source("alice")).await.unwrap();
    spent("another", &[("txn", 1)]);
    gauntlet.delete_instance(&call(), &id("web"), &source("alice")).await.unwrap();
    spent("a delete", &[("txn", 2)]);

    gauntlet.create_challenge(&call(), new("pooled", 3)).await.unwrap();
    gauntlet_testing::maintain_pool(&gauntlet, &call(), &id("pooled")).await.unwrap();
    store.core.kv.reset();
    for who in ["alice", "bob", "carol"] {
        create("pooled", who).await;
        spent("a claim", &[("txn", 1)]);
    }
    gauntlet.plan_pool(&call(), &id("web"), 8).await.unwrap();
    spent("a look at a pool", &[("txn", 2)]);
    create("pooled", "dave").await;
    spent("a create beside an empty pool: is it still? then begun and committed", &[("txn", 3)]);

    // Another replica has seen nothing, and then too little.
    let other = Arc::new(rig.replica("b"));
    let elsewhere = self::gauntlet(other.clone());
    settled(&other).await;
    let renew = |gauntlet: &Gauntlet| {
        let gauntlet = gauntlet.clone();
        async move { gauntlet.renew_instance(&call(), &id("pooled"), &source("alice")).await.unwrap() }
    };
    renew(&elsewhere).await;
    assert_eq!(other.core.kv.calls(), BTreeMap::from([("txn", 2)]), "what is not known is read");
    renew(&gauntlet).await;
    spent("what is old is met and done again", &[("txn", 2)]);
    drop(elsewhere);
    store.check().await;
}

pub(super) async fn a_commit_that_was_resolved_costs_nothing_later(rig: &impl Rig) {
    let store = Arc::new(rig.replica("a"));
    let gauntlet = gauntlet(store.clone());
    settled(&store).await;
    gauntlet.create_challenge(&call(), new("web", 0)).await.unwrap();
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let web = store.stored("web").await.value;
    store.core.kv.fail_next(Fault::LostAnswer);
    held.update_challenge(&Challenge { revision: web.revision + 1, ..web }).await.unwrap();
    for who in ["alice", "bob"] {
        store.core.kv.reset();
        gauntlet.create_instance(&call(), &id("web"), &source(who), BTreeMap::new()).await.unwrap();
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 2)]), "{who}");
    }
    let key = instance_key("web", "carol");
    let intent = instance(key.clone(), Phase::Provisioning);
    let held = store.begin_create(&store.stored("web").await, &intent, None, &patient()).await.unwrap();
    store.core.kv.fail_next(Fault::LostAnswer);
    let ready = Instance { applied_revision: 2, until: None, ..instance(key.clone(), Phase::Ready) };
    held.commit(Outcome::Put(Box::new(ready))).await.unwrap();
    for which in ["a renewal", "another"] {
        store.core.kv.reset();
        gauntlet.renew_instance(&call(), &id("web"), &source("carol")).await.unwrap();
        assert_eq!(store.core.kv.calls(), BTreeMap::from([("txn", 1)]), "{which}");
    }
}

pub(super) async fn what_is_remembered_is_never_trusted(rig: &impl Rig) {
    let (a, b) = (Arc::new(rig.replica("a")), Arc::new(rig.replica("b")));
    let (one, two) = (gauntlet(a.clone()), gauntlet(b.clone()));
    let (web, alice) = (id("web"), source("alice"));
    one.create_challenge(&call(), new("web", 2)).await.unwrap();
    gauntlet_testing::maintain_pool(&one, &call(), &web).await.unwrap();
    assert_eq!(a.cached_snapshot(&web, &alice).unwrap().pooled.len(), 2);
    // All that the first one knows is changed by the second: the pool is used up, the challenge has another timeout, the instance is gone.
    two.create_instance(&call(), &web, &source("bob"), BTreeMap::new()).await.unwrap();
    two.create_instance(&call(), &web, &source("carol"), BTreeMap::new()).await.unwrap();
    one.create_instance(&call(), &web, &alice, BTreeMap::new()).await.unwrap();
    let timeout = Some(Duration::from_secs(7200));
    let update = gauntlet_domain::ChallengeUpdate { timeout: Some(timeout), ..Default::default() };
    two.update_challenge(&call(), &web, update).await.unwrap();
    let (renewed, now) = (one.renew_instance(&call(), &web, &alice).await.unwrap(), Timestamp::now());
    assert!(renewed.until.unwrap() > now + Duration::from_secs(7000), "by the new timeout");
    two.delete_instance(&call(), &web, &alice).await.unwrap();
    let refused = one.renew_instance(&call(), &web, &alice).await.unwrap_err();
    assert_eq!(refused, Error::InstanceNotFound(web.clone(), alice.clone()));
    one.create_instance(&call(), &web, &alice, BTreeMap::new()).await.unwrap();
    let refused = two.create_instance(&call(), &web, &alice, BTreeMap::new()).await.unwrap_err();
    assert_eq!(refused, Error::InstanceExists(web.clone(), alice.clone()));
    two.delete_challenge(&call(), &web).await.unwrap();
    let refused = one.create_instance(&call(), &web, &alice, BTreeMap::new()).await.unwrap_err();
    assert_eq!(refused, Error::ChallengeNotFound(web.clone()));
    a.check().await;
}

pub(super) async fn a_thousand_waiters_share_one_watch(rig: &impl Rig) {
    const WAITERS: usize = 1000;
    let store = rig.replica("a");
    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    let (web, patient) = (id("web"), LockOptions { timeout: Duration::from_secs(300), ..patient() });
    let mut waiting: Vec<_> = (0..WAITERS).map(|_| Box::pin(store.lock(LockKind::Challenge, &web, &patient))).collect();
    eventually("all wait", || {
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        async { store.live_keys().await.len() == WAITERS + 1 }
    })
    .await;
    assert_eq!(store.core.kv.calls().get("follow"), Some(&1));
    drop(waiting);
    held.release().await.unwrap();
    store.check().await;
}
