//! The machine refuses: what becomes of what was there.

use std::{sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, Call, ChallengeUpdate, Entropy, Error, Fact, Instance, Operation, OperationOutcome, Phase, PhaseName,
    Settings, SourceId, Store as _, Strategy,
};

use crate::world::{ALICE, World, digest, reference};

#[tokio::test]
async fn what_cannot_be_taken_down_is_kept_and_tried_again() {
    let world = World::with_an_instance().await;
    let before = world.stored(ALICE).await.unwrap();
    world.machine.refuse(["down"]);
    assert!(matches!(world.delete(ALICE).await, Err(Error::Unavailable { .. })));
    let kept = world.stored(ALICE).await.unwrap();
    let Phase::Failed(failure) = &kept.phase else { panic!("{kept:?}") };
    assert_eq!((failure.during, kept.identity.clone()), (Operation::Delete, before.identity));
    assert!(failure.reason.contains("down is refused"), "{failure:?}");
    assert_eq!(world.machine.running().len(), 1);
    // Not before it is due, and then for as often as it takes.
    assert_eq!(world.gauntlet.reconcile(&world.call).await.unwrap().recovered, 0);
    let due = Call { now: failure.retry_at, ..world.call.clone() };
    assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
    let Some(Phase::Failed(again)) = world.stored(ALICE).await.map(|kept| kept.phase) else { panic!("it is kept") };
    assert_eq!((again.attempts, again.since), (2, failure.since));
    world.machine.refuse([]);
    let due = Call { now: again.retry_at, ..due };
    assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().recovered, 1);
    assert_eq!((world.stored(ALICE).await, world.machine.running()), (None, Vec::new()));
}

#[tokio::test]
async fn port_that_another_program_takes_is_replaced_at_most_twice() {
    let world = World::with_a_challenge(0).await;
    world.machine.take_ports(2);
    world.create(ALICE).await;
    assert_eq!(world.machine.reservations(), 3);
    world.delete(ALICE).await.unwrap();
    world.machine.take_ports(3);
    let error = world.try_create(ALICE).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { .. }) && error.is_fault(), "{error:?}");
    assert_eq!((error.code(), world.machine.reservations()), ("PROVISION_FAILED", 3));
    assert_eq!((world.stored(ALICE).await, world.machine.running()), (None, Vec::new()));
}

#[tokio::test]
async fn update_that_cannot_reserve_leaves_the_instance_as_it_was() {
    let world = World::with_an_instance().await;
    let before = world.stored(ALICE).await.unwrap();
    world.machine.refuse(["reserve"]);
    let next = update(2, Strategy::UpdateInPlace);
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, next).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    let after = world.stored(ALICE).await.unwrap();
    assert_eq!((&after.phase, &after.identity), (&Phase::Ready, &before.identity));
    assert_eq!(world.machine.running(), [(before.identity, digest(1))]);
}

#[tokio::test]
async fn every_delete_is_counted() {
    let world = World::with_an_instance().await;
    let deleted =
        |outcome| vec![Fact::InstanceOperation { challenge: world.web.clone(), operation: Operation::Delete, outcome }];
    world.facts.take();
    world.delete(ALICE).await.unwrap();
    assert_eq!(world.facts.take(), deleted(OperationOutcome::Ok));
    world.delete(ALICE).await.unwrap_err();
    assert_eq!(world.facts.take(), deleted(OperationOutcome::Refused("INSTANCE_NOT_FOUND")));
    // Nothing is there, and whether its challenge is cannot be read.
    world.hide_challenges();
    assert!(matches!(world.delete(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(world.facts.take(), deleted(OperationOutcome::Failed("UNAVAILABLE")));
}

/// The same each time.
struct Bits(u64);

impl Entropy for Bits {
    fn next_u64(&self) -> u64 {
        self.0
    }
}

#[tokio::test]
async fn tries_come_at_longer_and_longer_delays_up_to_a_bound_and_not_all_at_once() {
    let Settings { retry_initial_delay, retry_max_delay, .. } = Settings::default();
    for (bits, share) in [(0, 0.5), (1 << 63, 0.75), (u64::MAX, 1.0)] {
        let world = World::with_an_instance().await;
        world.machine.refuse(["down"]);
        assert!(world.delete(ALICE).await.is_err());
        let mut delay = retry_initial_delay;
        for attempt in 1..=20 {
            let Some(Phase::Failed(failed)) = world.stored(ALICE).await.map(|kept| kept.phase) else {
                panic!("it is kept")
            };
            assert_eq!(failed.attempts, attempt);
            let due = Call { now: failed.retry_at, entropy: Arc::new(Bits(bits)), ..world.call.clone() };
            assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
            let Some(Phase::Failed(next)) = world.stored(ALICE).await.map(|kept| kept.phase) else {
                panic!("it is kept")
            };
            delay = (delay * 2).min(retry_max_delay);
            let expected = failed.retry_at + delay.mul_f64(share);
            assert!(next.retry_at.duration_since(expected).abs() < Duration::from_millis(1).try_into().unwrap());
        }
        assert_eq!(delay, retry_max_delay);
    }
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing() {
    let world = World::with_an_instance().await;
    world.delete(ALICE).await.unwrap();
    world.machine.refuse(["up"]);
    assert!(matches!(world.try_create(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!((world.stored(ALICE).await, world.machine.running()), (None, Vec::new()));
}

/// What players are shown, of one source and of a challenge.
async fn shown(world: &World) -> (bool, usize, usize, usize) {
    let alice = SourceId::new(ALICE).unwrap();
    let one = world.gauntlet.retrieve_instance(&world.web, &alice).await.is_ok();
    let own: Vec<_> = world.gauntlet.query_instances(Some(&alice)).try_collect().await.unwrap();
    let all: Vec<_> = world.gauntlet.query_challenges().try_collect().await.unwrap();
    let of = world.gauntlet.retrieve_challenge(&world.web).await.unwrap().1;
    (one, own.len(), all[0].1.len(), of.len())
}

#[tokio::test]
async fn what_a_create_could_not_undo_is_shown_to_the_operator_and_to_no_player() {
    let world = World::with_a_challenge(0).await;
    world.machine.refuse(["up", "down"]);
    let told = world.try_create(ALICE).await.unwrap_err().to_string();
    assert!(told.contains("up is refused") && told.contains("down is refused"), "{told}");
    let failed = |kept: &Instance| match &kept.phase {
        Phase::Failed(failure) => failure.clone(),
        other => panic!("{other:?}"),
    };
    let kept = world.stored(ALICE).await.unwrap();
    assert_eq!(failed(&kept).during, Operation::Create);
    assert!(failed(&kept).reason.contains("down is refused"), "{kept:?}");
    let census = world.store.census(world.call.now).await.unwrap();
    assert_eq!(census.instances, [((world.web.clone(), PhaseName::Failed, false), 1)].into());
    assert_eq!(shown(&world).await, (false, 0, 0, 0));
    // Nor after the reconciler, a delete, or the player's next try could not undo it either.
    let due = Call { now: failed(&kept).retry_at, ..world.call.clone() };
    assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
    assert_eq!(shown(&world).await, (false, 0, 0, 0));
    assert!(matches!(world.delete(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(shown(&world).await, (false, 0, 0, 0));
    assert!(matches!(world.try_create(ALICE).await, Err(Error::Unavailable { .. })));
    assert_eq!(shown(&world).await, (false, 0, 0, 0));
    // Once it can be undone the next create does so, and has its own.
    world.machine.refuse([]);
    let anew = world.create(ALICE).await;
    assert_ne!(anew.identity, kept.identity);
    assert_eq!(world.machine.running(), [(anew.identity, digest(1))]);
    assert_eq!(shown(&world).await, (true, 1, 1, 1));
}

#[tokio::test]
async fn what_a_create_could_not_undo_can_be_deleted() {
    let world = World::with_a_challenge(0).await;
    world.machine.refuse(["up", "down"]);
    assert!(world.try_create(ALICE).await.is_err());
    world.machine.refuse([]);
    world.delete(ALICE).await.unwrap();
    assert_eq!(world.stored(ALICE).await, None);
}

#[tokio::test]
async fn a_claim_that_could_not_be_undone_is_shown_to_no_player() {
    let world = World::with_a_challenge(1).await;
    world.gauntlet.maintain_pool(&world.call, &world.web).await.unwrap();
    world.machine.refuse(["update", "down"]);
    let (alice, own) = (SourceId::new(ALICE).unwrap(), Additional::from([("a".to_owned(), "b".to_owned())]));
    assert!(world.gauntlet.create_instance(&world.call, &world.web, &alice, own).await.is_err());
    assert!(matches!(world.stored(ALICE).await.unwrap().phase, Phase::Failed(_)));
    assert_eq!(shown(&world).await, (false, 0, 0, 0));
}

#[tokio::test]
async fn an_update_that_fails_keeps_what_ran() {
    let world = World::with_an_instance().await;
    let before = world.stored(ALICE).await.unwrap();
    world.machine.refuse(["up"]);
    let updated =
        world.gauntlet.update_challenge(&world.call, &world.web, update(2, Strategy::BlueGreen)).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    assert_eq!(updated.challenge.scenario.digest, digest(2));
    let kept = world.stored(ALICE).await.unwrap();
    assert_eq!(kept.phase, Phase::Ready);
    assert_eq!((&kept.identity, &kept.scenario), (&before.identity, &before.scenario));
    assert_eq!(world.machine.running(), [(before.identity.clone(), digest(1))]);
    // The next one gets there, and takes the old one down.
    world.machine.refuse([]);
    let updated =
        world.gauntlet.update_challenge(&world.call, &world.web, update(2, Strategy::Recreate)).await.unwrap();
    assert_eq!(updated.failures, []);
    let after = world.stored(ALICE).await.unwrap();
    assert_eq!((&after.phase, &after.scenario), (&Phase::Ready, &updated.challenge.scenario));
    assert_eq!(world.machine.running(), [(after.identity.clone(), digest(2))]);
    world.delete(ALICE).await.unwrap();
    assert_eq!(world.machine.running(), []);
}

#[tokio::test]
async fn a_failed_update_is_not_taken_for_applied() {
    let world = World::with_an_instance().await;
    world.machine.refuse(["up"]);
    let update = update(2, Strategy::BlueGreen);
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, update).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    let kept = world.stored(ALICE).await.unwrap();
    assert_eq!((kept.phase, kept.applied_revision, kept.scenario.digest), (Phase::Ready, 1, digest(1)));
    // An update of something else brings it to what it has missed.
    world.machine.refuse([]);
    let timeout = ChallengeUpdate { timeout: Some(None), ..ChallengeUpdate::default() };
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, timeout).await.unwrap();
    assert_eq!(updated.failures, []);
    let after = world.stored(ALICE).await.unwrap();
    assert_eq!((after.applied_revision, &after.scenario.digest), (3, &digest(2)));
    assert_eq!(world.machine.running(), [(after.identity, digest(2))]);
}

#[tokio::test]
async fn a_pooled_instance_whose_update_failed_is_not_handed_out() {
    let world = World::with_a_challenge(1).await;
    world.gauntlet.maintain_pool(&world.call, &world.web).await.unwrap();
    world.machine.refuse(["up"]);
    let update = update(2, Strategy::BlueGreen);
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, update).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    world.machine.refuse([]);
    world.gauntlet.maintain_pool(&world.call, &world.web).await.unwrap();
    // Another is in its place, and that one is handed out.
    let pooled = world.pooled().await;
    assert_eq!(pooled.len(), 1);
    assert_eq!(world.machine.running(), [(pooled[0].identity.clone(), digest(2))]);
    let claimed = world.create(ALICE).await;
    assert_eq!((&claimed.identity, claimed.scenario.digest), (&pooled[0].identity, digest(2)));
}

#[tokio::test]
async fn what_a_half_done_update_brought_up_is_not_forgotten_by_the_next() {
    for strategy in [Strategy::BlueGreen, Strategy::Recreate, Strategy::UpdateInPlace] {
        let world = World::with_an_instance().await;
        // The new one is up, and the old one does not go.
        world.machine.refuse(["down"]);
        let first = update(2, Strategy::BlueGreen);
        let updated = world.gauntlet.update_challenge(&world.call, &world.web, first).await.unwrap();
        assert_eq!((updated.failures.len(), world.machine.running().len()), (1, 2));
        world.machine.refuse([]);
        let next = update(3, strategy);
        let updated = world.gauntlet.update_challenge(&world.call, &world.web, next).await.unwrap();
        assert_eq!(updated.failures, []);
        let after = world.stored(ALICE).await.unwrap();
        assert_eq!((&after.phase, &after.scenario.digest), (&Phase::Ready, &digest(3)));
        assert_eq!(world.machine.running(), [(after.identity, digest(3))]);
    }
}

/// To another scenario.
fn update(version: u8, strategy: Strategy) -> ChallengeUpdate {
    ChallengeUpdate { scenario: Some(reference(version)), strategy, ..ChallengeUpdate::default() }
}
