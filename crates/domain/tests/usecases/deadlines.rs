//! A call has one deadline, however often it waits or retries.

use std::time::Duration;

use gauntlet_domain::{ChallengeUpdate, Error, LockKind};
use gauntlet_testing::fixtures::source_id;

use crate::harness::{ALICE, BOB, Harness, LOCK_TIMEOUT, within};

#[tokio::test]
async fn deletion_has_one_deadline_for_both_locks() {
    let harness = Harness::with_challenge(0).await;
    let (first, second) =
        (harness.lock(LockKind::Challenge).await.unwrap(), harness.lock(LockKind::Rollout).await.unwrap());
    let deleted = harness.spawn(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    harness.wait_for_queue(LockKind::Challenge, 2).await;
    harness.clock.advance(LOCK_TIMEOUT);
    first.release().await.unwrap();
    let answer = within("deleting", deleted).await.unwrap();
    assert!(matches!(answer, Err(Error::Busy { .. })), "{answer:?}");
    second.release().await.unwrap();
    harness.gauntlet.delete_challenge(&harness.call, &harness.web).await.unwrap();
}

#[tokio::test]
async fn update_has_one_deadline_for_both_locks() {
    let harness = Harness::with_instance().await;
    let (first, second) =
        (harness.lock(LockKind::Rollout).await.unwrap(), harness.lock(LockKind::Challenge).await.unwrap());
    let updated = harness.spawn(|gauntlet, call, web| async move {
        gauntlet
            .update_challenge(&call, &web, ChallengeUpdate::default())
            .await
            .map(|updated| updated.challenge.revision)
    });
    harness.wait_for_queue(LockKind::Rollout, 2).await;
    harness.clock.advance(LOCK_TIMEOUT);
    first.release().await.unwrap();
    let answer = within("updating", updated).await.unwrap();
    assert!(matches!(answer, Err(Error::Busy { .. })), "{answer:?}");
    second.release().await.unwrap();
}

/// Each pause is at least half of its bound, which doubles up to a limit. Together they use up the time until the deadline, and no more.
fn assert_growing_until_the_deadline(pauses: &[Duration]) {
    assert!(pauses.len() > 20, "{pauses:?}");
    let mut bound = Duration::from_millis(2);
    for pause in pauses {
        assert!((bound / 2..=bound).contains(pause), "{pause:?} of {bound:?} in {pauses:?}");
        bound = (bound * 2).min(Duration::from_millis(250));
    }
    let total: Duration = pauses.iter().sum();
    assert!(total <= LOCK_TIMEOUT && total + bound >= LOCK_TIMEOUT, "{total:?}");
}

#[tokio::test]
async fn conflicting_calls_retry_with_growing_pauses_until_the_deadline() {
    let harness = Harness::with_instance().await;
    harness.always_conflict(true);
    let (alice, call) = (source_id(ALICE), harness.call_at(1100));
    let _ = harness.clock.take_sleeps();
    assert_eq!(harness.try_create(BOB).await.unwrap_err(), Error::Conflict);
    assert_growing_until_the_deadline(&harness.clock.take_sleeps());
    assert_eq!(harness.gauntlet.renew_instance(&call, &harness.web, &alice).await.unwrap_err(), Error::Conflict);
    assert_growing_until_the_deadline(&harness.clock.take_sleeps());
    harness.always_conflict(false);
    harness.create(BOB).await;
    assert_eq!(harness.clock.take_sleeps(), [], "without conflicts");
}

#[tokio::test]
async fn expired_deletion_retries_conflicts_until_the_deadline() {
    let harness = Harness::with_instance().await;
    let (alice, since) = (source_id(ALICE), harness.stored(ALICE).await.unwrap().since);
    harness.always_conflict(true);
    let _ = harness.clock.take_sleeps();
    let deleted = harness.gauntlet.delete_expired_instance(&harness.call_at(10_000), &harness.web, &alice, since).await;
    assert_eq!(deleted.unwrap_err(), Error::Conflict);
    assert_growing_until_the_deadline(&harness.clock.take_sleeps());
}

#[tokio::test]
async fn pool_planning_retries_conflicts_until_the_deadline() {
    let harness = Harness::with_challenge(1).await;
    harness.always_conflict(true);
    let _ = harness.clock.take_sleeps();
    let planned = harness.gauntlet.plan_pool(&harness.call, &harness.web, 8).await;
    assert_eq!(planned.map(|plan| plan.jobs.len()).unwrap_err(), Error::Conflict);
    assert_growing_until_the_deadline(&harness.clock.take_sleeps());
    harness.always_conflict(false);
    harness.maintain_pool().await;
    assert_eq!(harness.pooled().await.len(), 1);
}
