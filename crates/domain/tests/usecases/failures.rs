//! The provisioner fails: what remains, and how it is retried.

use std::{sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, Call, ChallengeUpdate, Entropy, Error, Fact, Instance, Operation, OperationOutcome, Phase, PhaseName,
    Settings, Store as _, Strategy,
};
use gauntlet_testing::fixtures::source_id;

use crate::harness::{ALICE, Harness, digest, update, within};

#[tokio::test]
async fn failed_deletion_keeps_the_instance_and_is_retried() {
    let harness = Harness::with_instance().await;
    let before = harness.stored(ALICE).await.unwrap();
    harness.provisioner.refuse(["down"]);
    assert!(matches!(harness.delete(ALICE).await, Err(Error::Unavailable { .. })));
    let kept = harness.stored(ALICE).await.unwrap();
    let Phase::Failed(failure) = &kept.phase else { panic!("{kept:?}") };
    assert_eq!((failure.during, kept.identity.clone()), (Operation::Delete, before.identity));
    assert!(failure.reason.contains("down is refused"), "{failure:?}");
    assert_eq!(harness.provisioner.running().len(), 1);
    assert_eq!(visible(&harness).await, (true, 1, 1, 1));
    let alice = source_id(ALICE);
    assert_eq!(harness.try_create(ALICE).await, Err(Error::InstanceExists(harness.web.clone(), alice)));
    // It is retried when it is due, not before, until it succeeds.
    assert_eq!(harness.gauntlet.reconcile(&harness.call).await.unwrap().recovered, 0);
    let due = Call { now: failure.retry_at, ..harness.call.clone() };
    assert_eq!(harness.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
    let Some(Phase::Failed(again)) = harness.stored(ALICE).await.map(|kept| kept.phase) else {
        panic!("the instance is gone")
    };
    assert_eq!((again.attempts, again.since), (2, failure.since));
    harness.provisioner.refuse([]);
    let due = Call { now: again.retry_at, ..due };
    assert_eq!(harness.gauntlet.reconcile(&due).await.unwrap().recovered, 1);
    assert_eq!((harness.stored(ALICE).await, harness.provisioner.running()), (None, Vec::new()));
}

#[tokio::test]
async fn failed_deletion_of_a_challenge_is_resumed() {
    let harness = Harness::with_instance().await;
    harness.provisioner.refuse(["down"]);
    let deleted = harness.gauntlet.delete_challenge(&harness.call, &harness.web).await;
    assert!(matches!(deleted, Err(Error::Unavailable { .. })), "{deleted:?}");
    assert!(harness.store.challenge(&harness.web).await.unwrap().unwrap().value.deleting);
    harness.provisioner.refuse([]);
    assert_eq!(harness.gauntlet.reconcile(&harness.call_at(10_000)).await.unwrap().resumed, 1);
    assert_eq!(harness.store.challenge(&harness.web).await.unwrap(), None);
    assert_eq!((harness.stored(ALICE).await, harness.provisioner.running()), (None, Vec::new()));
}

#[tokio::test]
async fn launch_gets_other_ports_at_most_twice() {
    let harness = Harness::with_challenge(0).await;
    harness.ports.take(2);
    harness.create(ALICE).await;
    assert_eq!(harness.ports.take_reservations(), 3);
    harness.delete(ALICE).await.unwrap();
    harness.ports.take(3);
    let error = harness.try_create(ALICE).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { .. }) && error.is_fault(), "{error:?}");
    assert_eq!((error.code(), harness.ports.take_reservations()), ("PROVISION_FAILED", 3));
    assert_eq!((harness.stored(ALICE).await, harness.provisioner.running()), (None, Vec::new()));
}

#[tokio::test]
async fn update_that_cannot_reserve_keeps_the_old_resources() {
    let harness = Harness::with_instance().await;
    let before = harness.stored(ALICE).await.unwrap();
    harness.provisioner.refuse(["reserve"]);
    let next = update(2, Strategy::UpdateInPlace);
    let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, next).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    let after = harness.stored(ALICE).await.unwrap();
    assert_eq!((&after.phase, &after.identity), (&Phase::Ready, &before.identity));
    assert_eq!(harness.provisioner.running(), [(before.identity, digest(1))]);
}

#[tokio::test]
async fn every_delete_is_recorded_as_a_fact() {
    let harness = Harness::with_instance().await;
    let deleted = |outcome| {
        vec![Fact::InstanceOperation { challenge: harness.web.clone(), operation: Operation::Delete, outcome }]
    };
    harness.facts.take();
    harness.delete(ALICE).await.unwrap();
    assert_eq!(harness.facts.take(), deleted(OperationOutcome::Ok));
    harness.delete(ALICE).await.unwrap_err();
    assert_eq!(harness.facts.take(), deleted(OperationOutcome::Refused("INSTANCE_NOT_FOUND")));
    // There is no such instance, and its challenge cannot be read.
    harness.make_challenges_unreadable();
    assert!(matches!(harness.delete(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(harness.facts.take(), deleted(OperationOutcome::Failed("UNAVAILABLE")));
}

/// Returns the same number every time.
struct FixedEntropy(u64);

impl Entropy for FixedEntropy {
    fn next_u64(&self) -> u64 {
        self.0
    }
}

#[tokio::test]
async fn retry_delays_grow_to_a_limit_and_have_jitter() {
    let Settings { retry_initial_delay, retry_max_delay, .. } = Settings::default();
    for (bits, share) in [(0, 0.5), (1 << 63, 0.75), (u64::MAX, 1.0)] {
        let harness = Harness::with_instance().await;
        harness.provisioner.refuse(["down"]);
        assert!(harness.delete(ALICE).await.is_err());
        let mut delay = retry_initial_delay;
        for attempt in 1..=20 {
            let Some(Phase::Failed(failed)) = harness.stored(ALICE).await.map(|kept| kept.phase) else {
                panic!("the instance is gone")
            };
            assert_eq!(failed.attempts, attempt);
            let due = Call { now: failed.retry_at, entropy: Arc::new(FixedEntropy(bits)), ..harness.call.clone() };
            assert_eq!(harness.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
            let Some(Phase::Failed(next)) = harness.stored(ALICE).await.map(|kept| kept.phase) else {
                panic!("the instance is gone")
            };
            delay = (delay * 2).min(retry_max_delay);
            let expected = failed.retry_at + delay.mul_f64(share);
            assert!(next.retry_at.duration_since(expected).abs() < Duration::from_millis(1).try_into().unwrap());
        }
        assert_eq!(delay, retry_max_delay);
    }
}

#[tokio::test]
async fn failed_create_leaves_nothing() {
    let harness = Harness::with_instance().await;
    harness.delete(ALICE).await.unwrap();
    harness.provisioner.refuse(["up"]);
    assert!(matches!(harness.try_create(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!((harness.stored(ALICE).await, harness.provisioner.running()), (None, Vec::new()));
}

/// What clients see: whether the instance can be retrieved, and how many instances three queries return.
async fn visible(harness: &Harness) -> (bool, usize, usize, usize) {
    let alice = source_id(ALICE);
    let one = harness.gauntlet.retrieve_instance(&harness.web, &alice).await.is_ok();
    let own: Vec<_> = harness.gauntlet.query_instances(Some(&alice)).try_collect().await.unwrap();
    let all: Vec<_> = harness.gauntlet.query_challenges().try_collect().await.unwrap();
    let of = harness.gauntlet.retrieve_challenge(&harness.web).await.unwrap().1;
    (one, own.len(), all[0].1.len(), of.len())
}

#[tokio::test]
async fn failed_undo_of_a_create_is_visible_to_operators_only() {
    let harness = Harness::with_challenge(0).await;
    harness.provisioner.refuse(["up", "down"]);
    let error = harness.try_create(ALICE).await.unwrap_err().to_string();
    assert!(error.contains("up is refused") && error.contains("down is refused"), "{error}");
    let failed = |kept: &Instance| match &kept.phase {
        Phase::Failed(failure) => failure.clone(),
        other => panic!("{other:?}"),
    };
    let kept = harness.stored(ALICE).await.unwrap();
    assert_eq!(failed(&kept).during, Operation::Create);
    assert!(failed(&kept).reason.contains("down is refused"), "{kept:?}");
    let census = harness.store.census(harness.call.now).await.unwrap();
    assert_eq!(census.instances, [((harness.web.clone(), PhaseName::Failed, false), 1)].into());
    assert_eq!(visible(&harness).await, (false, 0, 0, 0));
    // The same holds after the reconciler, a delete and another create have failed to undo it too.
    let due = Call { now: failed(&kept).retry_at, ..harness.call.clone() };
    assert_eq!(harness.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
    assert_eq!(visible(&harness).await, (false, 0, 0, 0));
    assert!(matches!(harness.delete(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(visible(&harness).await, (false, 0, 0, 0));
    assert!(matches!(harness.try_create(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(visible(&harness).await, (false, 0, 0, 0));
    // Once it can be undone, the next create does that and launches a new instance.
    harness.provisioner.refuse([]);
    let recreated = harness.create(ALICE).await;
    assert_ne!(recreated.identity, kept.identity);
    assert_eq!(harness.provisioner.running(), [(recreated.identity, digest(1))]);
    assert_eq!(visible(&harness).await, (true, 1, 1, 1));
}

#[tokio::test]
async fn rest_of_a_failed_create_can_be_deleted() {
    let harness = Harness::with_challenge(0).await;
    harness.provisioner.refuse(["up", "down"]);
    assert!(harness.try_create(ALICE).await.is_err());
    harness.provisioner.refuse([]);
    harness.delete(ALICE).await.unwrap();
    assert_eq!(harness.stored(ALICE).await, None);
}

#[tokio::test]
async fn failed_undo_of_a_claim_is_not_visible_to_clients() {
    let harness = Harness::with_challenge(1).await;
    harness.maintain_pool().await;
    harness.provisioner.refuse(["update", "down"]);
    let (alice, own) = (source_id(ALICE), Additional::from([("a".to_owned(), "b".to_owned())]));
    assert!(harness.gauntlet.create_instance(&harness.call, &harness.web, &alice, own).await.is_err());
    assert!(matches!(harness.stored(ALICE).await.unwrap().phase, Phase::Failed(_)));
    assert_eq!(visible(&harness).await, (false, 0, 0, 0));
}

#[tokio::test]
async fn failed_update_keeps_the_old_resources() {
    let harness = Harness::with_instance().await;
    let before = harness.stored(ALICE).await.unwrap();
    harness.provisioner.refuse(["up"]);
    let updated =
        harness.gauntlet.update_challenge(&harness.call, &harness.web, update(2, Strategy::BlueGreen)).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    assert_eq!(updated.challenge.scenario.digest, digest(2));
    let kept = harness.stored(ALICE).await.unwrap();
    assert_eq!(kept.phase, Phase::Ready);
    assert_eq!((&kept.identity, &kept.scenario), (&before.identity, &before.scenario));
    assert_eq!(harness.provisioner.running(), [(before.identity.clone(), digest(1))]);
    // The next update succeeds and removes the old resources.
    harness.provisioner.refuse([]);
    let updated =
        harness.gauntlet.update_challenge(&harness.call, &harness.web, update(2, Strategy::Recreate)).await.unwrap();
    assert_eq!(updated.failures, []);
    let after = harness.stored(ALICE).await.unwrap();
    assert_eq!((&after.phase, &after.scenario), (&Phase::Ready, &updated.challenge.scenario));
    assert_eq!(harness.provisioner.running(), [(after.identity.clone(), digest(2))]);
    harness.delete(ALICE).await.unwrap();
    assert_eq!(harness.provisioner.running(), []);
}

#[tokio::test]
async fn failed_update_is_caught_up_by_the_next_one() {
    let harness = Harness::with_instance().await;
    harness.provisioner.refuse(["up"]);
    let update = update(2, Strategy::BlueGreen);
    let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, update).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    let kept = harness.stored(ALICE).await.unwrap();
    assert_eq!((kept.phase, kept.applied_revision, kept.scenario.digest), (Phase::Ready, 1, digest(1)));
    // The next update, though it changes something else, applies what the failed one did not.
    harness.provisioner.refuse([]);
    let timeout = ChallengeUpdate { timeout: Some(None), ..ChallengeUpdate::default() };
    let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, timeout).await.unwrap();
    assert_eq!(updated.failures, []);
    let after = harness.stored(ALICE).await.unwrap();
    assert_eq!((after.applied_revision, &after.scenario.digest), (3, &digest(2)));
    assert_eq!(harness.provisioner.running(), [(after.identity, digest(2))]);
}

#[tokio::test]
async fn pooled_instance_whose_update_failed_is_never_claimed() {
    let harness = Harness::with_challenge(1).await;
    harness.maintain_pool().await;
    harness.provisioner.refuse(["up"]);
    let update = update(2, Strategy::BlueGreen);
    let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, update).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    harness.provisioner.refuse([]);
    harness.maintain_pool().await;
    // The pool replaces it, and the replacement is claimed.
    let pooled = harness.pooled().await;
    assert_eq!(pooled.len(), 1);
    assert_eq!(harness.provisioner.running(), [(pooled[0].identity.clone(), digest(2))]);
    let claimed = harness.create(ALICE).await;
    assert_eq!((&claimed.identity, claimed.scenario.digest), (&pooled[0].identity, digest(2)));
}

#[tokio::test]
async fn next_update_removes_the_resources_of_an_unfinished_one() {
    for strategy in [Strategy::BlueGreen, Strategy::Recreate, Strategy::UpdateInPlace] {
        let harness = Harness::with_instance().await;
        // The new resources run, and the old ones cannot be removed.
        harness.provisioner.refuse(["down"]);
        let first = update(2, Strategy::BlueGreen);
        let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, first).await.unwrap();
        assert_eq!((updated.failures.len(), harness.provisioner.running().len()), (1, 2));
        harness.provisioner.refuse([]);
        let next = update(3, strategy);
        let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, next).await.unwrap();
        assert_eq!(updated.failures, []);
        let after = harness.stored(ALICE).await.unwrap();
        assert_eq!((&after.phase, &after.scenario.digest), (&Phase::Ready, &digest(3)));
        assert_eq!(harness.provisioner.running(), [(after.identity, digest(3))]);
    }
}

#[tokio::test]
async fn unfinished_in_place_update_does_not_change_the_strategy_of_the_next() {
    for (strategy, old_runs_until_new_is_ready) in [(Strategy::BlueGreen, true), (Strategy::Recreate, false)] {
        let harness = Harness::with_instance().await;
        let before = harness.stored(ALICE).await.unwrap();
        harness.provisioner.refuse(["update"]);
        let first = update(2, Strategy::UpdateInPlace);
        let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, first).await.unwrap();
        assert_eq!(updated.failures.len(), 1);
        let unfinished = harness.stored(ALICE).await.unwrap();
        assert_eq!(unfinished.target.map(|target| target.identity), Some(before.identity.clone()));
        harness.provisioner.refuse([]);
        let mut launch = harness.provisioner.hold("up");
        let updated = harness.spawn(move |gauntlet, call, web| async move {
            gauntlet.update_challenge(&call, &web, update(3, strategy)).await
        });
        launch.arrived().await;
        assert_eq!(!harness.provisioner.running().is_empty(), old_runs_until_new_is_ready, "{strategy:?}");
        launch.open();
        assert_eq!(within("the update ends", updated).await.unwrap().unwrap().failures, []);
        let after = harness.stored(ALICE).await.unwrap();
        assert_ne!(after.identity, before.identity, "{strategy:?}");
        assert_eq!(harness.provisioner.running(), [(after.identity, digest(3))]);
    }
}
