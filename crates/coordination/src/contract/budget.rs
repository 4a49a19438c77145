//! What each operation may cost, in calls of the key-value port.

use super::*;

pub(super) async fn each_operation_keeps_its_budget(rig: &impl Rig) {
    let store = rig.replica("a");
    let spent = |what: &str, expected: &[(&'static str, usize)]| {
        assert_eq!(store.core.kv.calls(), expected.iter().copied().collect(), "{what}");
        store.core.kv.reset();
    };
    // The lease is there.
    store.release(store.lock(LockKind::Rollout, &id("web"), &patient()).await.unwrap()).await.unwrap();
    store.core.kv.reset();

    store.insert_challenge(&challenge("web")).await.unwrap();
    spent("a challenge is inserted", &[("txn", 1)]);

    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    spent("a lock is taken", &[("txn", 1)]);
    store.release(held).await.unwrap();
    spent("a lock is released", &[("txn", 1)]);

    let slot = seat("web", "alice");
    let survey = store.survey(&id("web"), &source("alice")).await.unwrap();
    spent("what a create needs to know", &[("txn", 1)]);
    let web = survey.challenge.unwrap();
    let intent = instance(slot.clone(), Phase::Provisioning);
    let held = store.begin_create(&web, &intent, None, &patient()).await.unwrap();
    store.commit(held, &slot, Commit::Put(Box::new(instance(slot.clone(), Phase::Ready)))).await.unwrap();
    spent("a create", &[("txn", 2)]);

    let stored = store.at(&slot).await;
    store.core.kv.reset();
    store.rewrite(&stored, &Instance { until: Some(at(500)), ..stored.value.clone() }, &patient()).await.unwrap();
    spent("a renewal", &[("txn", 1)]);

    let (held, _) = store.begin(&slot, Begin::Delete, &patient()).await.unwrap();
    store.commit(held, &slot, Commit::Remove).await.unwrap();
    spent("a delete", &[("txn", 2)]);

    store.put(&[instance(pool_seat("web", 1), Phase::Ready)]).await;
    let pooled = store.at(&pool_seat("web", 1)).await;
    store.core.kv.reset();
    store.claim(&web, &pooled, &instance(slot.clone(), Phase::Ready), &patient()).await.unwrap();
    spent("a claim", &[("txn", 1)]);

    let held = store.lock(LockKind::Challenge, &id("web"), &patient()).await.unwrap();
    store.update_challenge(held, &web.value).await.unwrap();
    spent("a change of a challenge", &[("txn", 2)]);

    let all: Vec<Instance> = (0..900).map(|n| instance(seat("web", &format!("team-{n}")), Phase::Ready)).collect();
    store.put(&all).await;
    store.core.kv.reset();
    let listed: Vec<_> = store.instances_by_source(None).try_collect().await.unwrap();
    assert_eq!(listed.len(), 901);
    spent("a query is its pages", &[("page", 4)]);
    let listed: Vec<_> = store.instances_by_source(Some(&source("team-5"))).try_collect().await.unwrap();
    assert_eq!(listed.len(), 1);
    spent("a source's query is what it returns", &[("page", 1), ("txn", 1)]);
    assert!(store.stranded(at(0)).await.unwrap().is_empty());
    spent("looking for stranded work", &[("page", 3)]);
}
