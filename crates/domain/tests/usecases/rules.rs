//! The rules of challenges and instances.

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, ChallengeId, Error, Fact, Identity, Intent, LockOptions, NewChallenge, SourceId, Store as _, Strategy,
    Target,
};

use crate::world::{ALICE, World, reference};

/// A challenge that ends at 2000.
async fn brief(world: &World, min: i64) -> ChallengeId {
    let id = ChallengeId::new("brief").unwrap();
    let challenge = NewChallenge {
        id: id.clone(),
        scenario: reference(1),
        timeout: None,
        until: Some(world.at(2000).now),
        additional: Additional::new(),
        min,
        max: 0,
    };
    world.gauntlet.create_challenge(&world.call, challenge).await.unwrap();
    id
}

#[tokio::test]
async fn expired_challenge_drains_its_pool() {
    let world = World::with_a_challenge(0).await;
    let id = brief(&world, 2).await;
    for (second, pooled) in [(1999, 2), (2000, 0)] {
        world.gauntlet.maintain_pool(&world.at(second), &id).await.unwrap();
        let all: Vec<_> = world.store.instances_of(&id).try_collect().await.unwrap();
        assert_eq!(all.len(), pooled, "at {second}");
    }
}

#[tokio::test]
async fn expired_challenge_accepts_no_instance() {
    let world = World::with_a_challenge(0).await;
    let id = brief(&world, 0).await;
    let create = async |second, source| {
        let source = SourceId::new(source).unwrap();
        world.gauntlet.create_instance(&world.at(second), &id, &source, Additional::new()).await
    };
    assert_eq!(create(1999, "in-time").await.unwrap().until, Some(world.at(2000).now));
    assert_eq!(create(2000, "late").await.unwrap_err(), Error::ChallengeExpired(id.clone()));
}

#[tokio::test]
async fn deleted_challenge_is_gone_with_its_instances() {
    let world = World::with_an_instance().await;
    world.gauntlet.delete_challenge(&world.call, &world.web).await.unwrap();
    assert_eq!(world.store.challenge(&world.web).await.unwrap(), None);
    assert_eq!(world.stored(ALICE).await, None);
    assert_eq!(world.try_create(ALICE).await.unwrap_err(), Error::ChallengeNotFound(world.web.clone()));
}

#[tokio::test]
async fn create_notes_a_pool_claim_only_where_there_is_a_pool() {
    for (min, claims) in [(0, vec![]), (1, vec![false])] {
        let world = World::with_a_challenge(min).await;
        world.create(ALICE).await;
        let hits = world.facts.take().into_iter().filter_map(|fact| match fact {
            Fact::PoolClaim { hit, .. } => Some(hit),
            _ => None,
        });
        assert_eq!(hits.collect::<Vec<_>>(), claims, "min {min}");
    }
}

#[tokio::test]
async fn update_that_recovery_finishes_gives_the_instance_a_new_end() {
    let world = World::with_an_instance().await;
    let instance = world.stored(ALICE).await.unwrap();
    assert_eq!(instance.until, Some(world.at(2000).now));
    let target = Target {
        identity: Identity::from_bits(7),
        scenario: instance.scenario.clone(),
        revision: instance.applied_revision + 1,
        strategy: Strategy::Recreate,
    };
    // Released without a commit, as a crash leaves it.
    let (held, _) = world.store.begin(&instance.key, Intent::Update(target), &LockOptions::default()).await.unwrap();
    held.release().await.unwrap();
    assert_eq!(world.gauntlet.reconcile(&world.at(1500)).await.unwrap().recovered, 1);
    let updated = world.stored(ALICE).await.unwrap();
    assert_eq!((updated.identity, updated.until), (Identity::from_bits(7), Some(world.at(2500).now)));
}
