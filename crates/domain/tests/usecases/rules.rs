//! Rules of challenges and instances that need no failure and no race.

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, ChallengeId, Error, Fact, Identity, Intent, LockOptions, NewChallenge, Store as _, Strategy, Target,
};
use gauntlet_testing::fixtures::{challenge_id, new_challenge, source_id};

use crate::harness::{ALICE, BOB, Harness, update};

/// Creates a challenge that expires at 2000.
async fn expiring_challenge(harness: &Harness, min: i64) -> ChallengeId {
    let id = challenge_id("expiring");
    let until = Some(harness.call_at(2000).now);
    let challenge = NewChallenge { timeout: None, until, ..new_challenge(id.as_str(), min) };
    harness.gauntlet.create_challenge(&harness.call, challenge).await.unwrap();
    id
}

#[tokio::test]
async fn expired_challenge_drains_its_pool() {
    let harness = Harness::with_challenge(0).await;
    let id = expiring_challenge(&harness, 2).await;
    for (second, pooled) in [(1999, 2), (2000, 0)] {
        gauntlet_testing::maintain_pool(&harness.gauntlet, &harness.call_at(second), &id).await.unwrap();
        let all: Vec<_> = harness.store.instances_of(&id).try_collect().await.unwrap();
        assert_eq!(all.len(), pooled, "at {second}");
    }
}

#[tokio::test]
async fn expired_challenge_accepts_no_instance() {
    let harness = Harness::with_challenge(0).await;
    let id = expiring_challenge(&harness, 0).await;
    let create = async |second, source| {
        let source = source_id(source);
        harness.gauntlet.create_instance(&harness.call_at(second), &id, &source, Additional::new()).await
    };
    assert_eq!(create(1999, "in-time").await.unwrap().until, Some(harness.call_at(2000).now));
    assert_eq!(create(2000, "late").await.unwrap_err(), Error::ChallengeExpired(id.clone()));
}

#[tokio::test]
async fn deleting_a_challenge_removes_its_instances() {
    let harness = Harness::with_instance().await;
    harness.gauntlet.delete_challenge(&harness.call, &harness.web).await.unwrap();
    assert_eq!(harness.store.challenge(&harness.web).await.unwrap(), None);
    assert_eq!(harness.stored(ALICE).await, None);
    assert_eq!(harness.try_create(ALICE).await.unwrap_err(), Error::ChallengeNotFound(harness.web.clone()));
}

#[tokio::test]
async fn create_records_a_pool_claim_only_for_challenges_with_a_pool() {
    for (min, claims) in [(0, vec![]), (1, vec![false])] {
        let harness = Harness::with_challenge(min).await;
        harness.create(ALICE).await;
        let hits = harness.facts.take().into_iter().filter_map(|fact| match fact {
            Fact::PoolClaim { hit, .. } => Some(hit),
            _ => None,
        });
        assert_eq!(hits.collect::<Vec<_>>(), claims, "min {min}");
    }
}

#[tokio::test]
async fn recovered_update_restarts_the_timeout() {
    let harness = Harness::with_instance().await;
    let instance = harness.stored(ALICE).await.unwrap();
    assert_eq!(instance.until, Some(harness.call_at(2000).now));
    let target = Target {
        identity: Identity::from_bits(7),
        scenario: instance.scenario.clone(),
        revision: instance.applied_revision + 1,
        strategy: Strategy::Recreate,
    };
    // Released without a commit, as after a crash.
    let (guard, _) = harness.store.begin(&instance.key, Intent::Update(target), &LockOptions::default()).await.unwrap();
    guard.release().await.unwrap();
    assert_eq!(harness.gauntlet.reconcile(&harness.call_at(1500)).await.unwrap().recovered, 1);
    let updated = harness.stored(ALICE).await.unwrap();
    assert_eq!((updated.identity, updated.until), (Identity::from_bits(7), Some(harness.call_at(2500).now)));
}

#[tokio::test]
async fn instance_keeps_its_flag_key_through_updates_and_claims() {
    for strategy in [Strategy::UpdateInPlace, Strategy::BlueGreen, Strategy::Recreate] {
        let harness = Harness::with_challenge(0).await;
        harness.scenarios.set_flag_key("old");
        harness.create(ALICE).await;
        harness.scenarios.set_flag_key("new");
        harness.create(BOB).await;
        harness.gauntlet.update_challenge(&harness.call, &harness.web, update(2, strategy)).await.unwrap();
        for (source, key) in [(ALICE, "old"), (BOB, "new")] {
            let stored = harness.stored(source).await.unwrap();
            assert_eq!((stored.flags, stored.flag_key.as_deref()), (vec![key.to_owned()], Some(key)), "{strategy:?}");
        }
    }
    let harness = Harness::with_challenge(1).await;
    harness.scenarios.set_flag_key("old");
    harness.maintain_pool().await;
    harness.scenarios.set_flag_key("new");
    let claimed = harness.create(ALICE).await;
    assert_eq!((claimed.flags, claimed.flag_key.as_deref()), (vec!["old".to_owned()], Some("old")));
}
