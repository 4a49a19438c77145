//! One deadline for a call, however often it waits or tries again.

use std::time::Duration;

use gauntlet_domain::{ChallengeUpdate, Error, LockKind, SourceId};

use crate::world::{ALICE, BOB, PATIENCE, World, within};

#[tokio::test]
async fn a_deletion_that_has_waited_for_one_lock_does_not_wait_as_long_for_the_next() {
    let world = World::with_a_challenge(0).await;
    let (first, second) =
        (world.lock(LockKind::Challenge).await.unwrap(), world.lock(LockKind::Rollout).await.unwrap());
    let deleted = world.beside(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    world.queued(LockKind::Challenge, 2).await;
    world.time.pass(PATIENCE);
    first.release().await.unwrap();
    let answer = within("deleting", deleted).await.unwrap();
    assert!(matches!(answer, Err(Error::Busy { .. })), "{answer:?}");
    second.release().await.unwrap();
    world.gauntlet.delete_challenge(&world.call, &world.web).await.unwrap();
}

#[tokio::test]
async fn an_update_that_has_waited_for_one_lock_does_not_wait_as_long_for_the_next() {
    let world = World::with_an_instance().await;
    let (first, second) =
        (world.lock(LockKind::Rollout).await.unwrap(), world.lock(LockKind::Challenge).await.unwrap());
    let updated = world.beside(|gauntlet, call, web| async move {
        gauntlet
            .update_challenge(&call, &web, ChallengeUpdate::default())
            .await
            .map(|updated| updated.challenge.revision)
    });
    world.queued(LockKind::Rollout, 2).await;
    world.time.pass(PATIENCE);
    first.release().await.unwrap();
    let answer = within("updating", updated).await.unwrap();
    assert!(matches!(answer, Err(Error::Busy { .. })), "{answer:?}");
    second.release().await.unwrap();
}

/// Each at least half of what it may be, which is twice the one before up to a bound; and all within the deadline.
fn grow_within_the_deadline(pauses: &[Duration]) {
    assert!(pauses.len() > 20, "{pauses:?}");
    let mut longest = Duration::from_millis(2);
    for pause in pauses {
        assert!((longest / 2..=longest).contains(pause), "{pause:?} of {longest:?} in {pauses:?}");
        longest = (longest * 2).min(Duration::from_millis(250));
    }
    let all: Duration = pauses.iter().sum();
    assert!(all <= PATIENCE && all + longest >= PATIENCE, "{all:?}");
}

#[tokio::test]
async fn who_always_comes_second_tries_at_growing_delays_until_the_deadline() {
    let world = World::with_an_instance().await;
    world.rival(true);
    let (alice, call) = (SourceId::new(ALICE).unwrap(), world.at(1100));
    let _ = world.time.pauses();
    assert_eq!(world.try_create(BOB).await.unwrap_err(), Error::Conflict);
    grow_within_the_deadline(&world.time.pauses());
    assert_eq!(world.gauntlet.renew_instance(&call, &world.web, &alice).await.unwrap_err(), Error::Conflict);
    grow_within_the_deadline(&world.time.pauses());
    world.rival(false);
    world.create(BOB).await;
    assert_eq!(world.time.pauses(), [], "nobody is in the way");
}

#[tokio::test]
async fn deletion_of_an_expired_instance_that_others_keep_changing_ends_at_the_deadline() {
    let world = World::with_an_instance().await;
    let (alice, since) = (SourceId::new(ALICE).unwrap(), world.stored(ALICE).await.unwrap().since);
    world.rival(true);
    let _ = world.time.pauses();
    let deleted = world.gauntlet.delete_expired_instance(&world.at(10_000), &world.web, &alice, since).await;
    assert_eq!(deleted.unwrap_err(), Error::Conflict);
    grow_within_the_deadline(&world.time.pauses());
}

#[tokio::test]
async fn refill_that_always_counts_too_early_tries_until_the_deadline() {
    let world = World::with_a_challenge(1).await;
    world.rival(true);
    let _ = world.time.pauses();
    let planned = world.gauntlet.plan_pool(&world.call, &world.web, 8).await;
    assert_eq!(planned.map(|plan| plan.jobs.len()).unwrap_err(), Error::Conflict);
    grow_within_the_deadline(&world.time.pauses());
    world.rival(false);
    world.gauntlet.maintain_pool(&world.call, &world.web).await.unwrap();
    assert_eq!(world.pooled().await.len(), 1);
}
