//! What was read, or asked for, some time ago: meanwhile somebody else was first.

use gauntlet_domain::{
    Additional, ChallengeUpdate, Error, Identity, LockKind, Phase, ProvisionedInstance, SourceId, Store as _,
};
use tokio::task::JoinHandle;

use crate::world::{ALICE, BOB, TIMEOUT, World, digest, reference, within};

#[tokio::test]
async fn a_delayed_renewal_takes_nothing_back() {
    let world = World::with_an_instance().await;
    let alice = SourceId::new(ALICE).unwrap();
    let (early, late) = (world.at(1100), world.at(1200));
    world.gauntlet.renew_instance(&late, &world.web, &alice).await.unwrap();
    let delayed = world.gauntlet.renew_instance(&early, &world.web, &alice).await.unwrap();
    assert_eq!(delayed.last_renew, late.now);
    let stored = world.stored(ALICE).await.unwrap();
    assert_eq!((stored.last_renew, stored.until), (late.now, Some(world.at(1200 + TIMEOUT).now)));
    // Nor does an update that was asked for before, whether it touches resources or not.
    for scenario in [None, Some(reference(2))] {
        let update = ChallengeUpdate { scenario, ..ChallengeUpdate::default() };
        let updated = world.gauntlet.update_challenge(&early, &world.web, update).await.unwrap();
        assert_eq!((updated.failures, updated.instances[0].applied_revision), (Vec::new(), updated.challenge.revision));
        assert_eq!(world.stored(ALICE).await.unwrap().until, Some(world.at(1200 + TIMEOUT).now));
    }
}

#[tokio::test]
async fn what_ended_is_not_revived_in_the_place_of_another() {
    let world = World::with_an_instance().await;
    let (alice, before) = (world.stored(ALICE).await.unwrap(), world.create(BOB).await);
    world.machine.end(&alice.identity);
    world.machine.end(&before.identity);
    // Both are read as ended; the first is brought back, and meanwhile the second becomes another.
    let mut first = world.machine.hold("update");
    let reconciled = world.beside(|gauntlet, call, _| async move { gauntlet.reconcile(&call).await });
    first.reached().await;
    world.delete(BOB).await.unwrap();
    let anew = world.create(BOB).await;
    assert_ne!(anew.identity, before.identity);
    first.open();
    let done = within("reconciling", reconciled).await.unwrap().unwrap();
    assert_eq!((done.restarted, done.failures), (1, Vec::new()));
    assert_eq!(world.stored(BOB).await, Some(anew.clone()));
    assert_eq!(world.machine.running(), [(alice.identity, digest(1)), (anew.identity, digest(1))]);
}

#[tokio::test]
async fn one_that_is_told_to_have_ended_is_brought_back_and_no_other() {
    let world = World::with_an_instance().await;
    let (alice, bob) = (world.stored(ALICE).await.unwrap(), world.create(BOB).await);
    world.machine.end(&alice.identity);
    world.machine.end(&bob.identity);
    let told = |identity: &Identity| ProvisionedInstance {
        challenge: world.web.clone(),
        identity: identity.clone(),
        generation: 1,
        alive: false,
    };
    let done = world.gauntlet.reconcile_instance(&world.at(1), told(&alice.identity)).await.unwrap();
    assert_eq!((done.restarted, done.failures), (1, Vec::new()));
    assert_eq!(world.machine.running(), [(alice.identity, digest(1))]);
    // What was deleted meanwhile is taken down, not brought back.
    world.delete(BOB).await.unwrap();
    let done = world.gauntlet.reconcile_instance(&world.at(2), told(&bob.identity)).await.unwrap();
    assert_eq!((done.restarted, done.orphans_removed, done.failures), (0, 1, Vec::new()));
}

#[tokio::test]
async fn an_update_of_what_has_become_another_leaves_one_of_them() {
    let world = World::with_an_instance().await;
    world.create(BOB).await;
    let mut first = world.machine.hold("update");
    let updated = world.beside(|gauntlet, call, web| async move {
        let update = ChallengeUpdate { scenario: Some(reference(2)), ..ChallengeUpdate::default() };
        gauntlet.update_challenge(&call, &web, update).await
    });
    first.reached().await;
    world.delete(BOB).await.unwrap();
    world.create(BOB).await;
    first.open();
    assert_eq!(within("updating", updated).await.unwrap().unwrap().failures, []);
    let recorded = [world.stored(ALICE).await.unwrap(), world.stored(BOB).await.unwrap()];
    let mut recorded = recorded.map(|instance| (instance.identity, digest(2)));
    recorded.sort();
    assert_eq!(world.machine.running(), recorded);
}

/// A deletion that has taken down what there was, and waits for the challenge's lock: behind one that removes the challenge, and one more.
async fn deletion_held_up(world: &World) -> (JoinHandle<gauntlet_domain::Result<()>>, gauntlet_domain::LockGuard) {
    let held = world.lock(LockKind::Challenge).await.unwrap();
    let deleted = world.beside(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    world.queued(LockKind::Challenge, 2).await;
    // They come between the two times that it takes the lock.
    let other = world.lock(LockKind::Challenge);
    world.queued(LockKind::Challenge, 3).await;
    let last = world.lock(LockKind::Challenge);
    world.queued(LockKind::Challenge, 4).await;
    held.release().await.unwrap();
    let other = within("taking the lock", other).await.unwrap();
    world.queued(LockKind::Rollout, 1).await;
    world.queued(LockKind::Challenge, 3).await;
    other.remove_challenge().await.unwrap();
    (deleted, within("taking the lock", last).await.unwrap())
}

#[tokio::test]
async fn a_deletion_that_was_held_up_removes_no_challenge_created_anew() {
    let world = World::with_a_challenge(0).await;
    let (deleted, last) = deletion_held_up(&world).await;
    world.create_challenge(0).await;
    last.release().await.unwrap();
    assert_eq!(within("deleting", deleted).await.unwrap(), Ok(()));
    assert!(!world.store.challenge(&world.web).await.unwrap().unwrap().value.deleting);
}

#[tokio::test]
async fn a_deletion_that_finds_nothing_removes_nothing() {
    let world = World::with_a_challenge(0).await;
    let (mut deleted, last) = deletion_held_up(&world).await;
    let mut removal = world.hold_removal();
    last.release().await.unwrap();
    // It has seen that there is nothing; if it removes that all the same, then what comes to be now.
    let answered = tokio::select! {
        answered = &mut deleted => Some(answered.unwrap()),
        () = removal.reached() => None,
    };
    world.create_challenge(0).await;
    removal.open();
    let answered = match answered {
        Some(answered) => answered,
        None => within("deleting", deleted).await.unwrap(),
    };
    assert_eq!(answered, Ok(()));
    assert!(world.store.challenge(&world.web).await.unwrap().is_some());
}

#[tokio::test]
async fn a_deletion_behind_another_leaves_what_was_created_since() {
    let world = World::with_a_challenge(0).await;
    let other = world.lock(LockKind::Rollout).await.unwrap();
    let deleted = world.beside(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    world.queued(LockKind::Rollout, 2).await;
    let held = world.lock(LockKind::Challenge).await.unwrap();
    held.remove_challenge().await.unwrap();
    world.create_challenge(0).await;
    let anew = world.create(ALICE).await;
    other.release().await.unwrap();
    assert_eq!(within("deleting", deleted).await.unwrap(), Ok(()));
    assert_eq!(world.stored(ALICE).await, Some(anew.clone()));
    assert_eq!(world.machine.running(), [(anew.identity, digest(1))]);
}

#[tokio::test]
async fn an_update_does_not_bring_back_what_is_being_deleted() {
    let world = World::with_an_instance().await;
    let mut down = world.machine.hold("down");
    let deleted = world.beside(|gauntlet, call, web| async move {
        gauntlet.delete_instance(&call, &web, &SourceId::new(ALICE).unwrap()).await
    });
    down.reached().await;
    // Whoever was at it is gone.
    deleted.abort();
    assert!(within("ending", deleted).await.unwrap_err().is_cancelled());
    let update = ChallengeUpdate { scenario: Some(reference(2)), ..ChallengeUpdate::default() };
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, update);
    let updated = within("updating", updated).await.unwrap();
    assert_eq!((updated.failures, updated.challenge.rollout), (Vec::new(), None));
    assert_eq!(world.stored(ALICE).await.unwrap().phase, Phase::Deleting);
    // Its ownership is given up in the background.
    let recovered = async {
        while world.stored(ALICE).await.is_some() {
            world.gauntlet.reconcile(&world.call).await.unwrap();
        }
    };
    within("recovering", recovered).await;
    assert_eq!(world.machine.running(), []);
}

#[tokio::test]
async fn expired_deletion_leaves_a_renewed_or_recreated_instance() {
    let world = World::with_an_instance().await;
    let alice = SourceId::new(ALICE).unwrap();
    let since = world.stored(ALICE).await.unwrap().since;
    let (renewed, late) = (world.at(1500), world.at(1001 + TIMEOUT));
    world.gauntlet.renew_instance(&renewed, &world.web, &alice).await.unwrap();
    let kept = world.stored(ALICE).await;
    assert_eq!(world.gauntlet.delete_expired_instance(&late, &world.web, &alice, since).await, Ok(false));
    assert_eq!(world.stored(ALICE).await, kept);

    world.delete(ALICE).await.unwrap();
    let again = world.gauntlet.create_instance(&renewed, &world.web, &alice, Additional::new()).await.unwrap();
    let later = world.at(1501 + TIMEOUT);
    assert_eq!(world.gauntlet.delete_expired_instance(&later, &world.web, &alice, since).await, Ok(false));
    assert_eq!(world.stored(ALICE).await, Some(again.clone()));

    assert_eq!(world.gauntlet.delete_expired_instance(&later, &world.web, &alice, again.since).await, Ok(true));
    assert_eq!((world.stored(ALICE).await, world.machine.running()), (None, Vec::new()));
    let gone = world.gauntlet.delete_expired_instance(&later, &world.web, &alice, again.since).await;
    assert_eq!(gone, Err(Error::InstanceNotFound(world.web.clone(), alice)));
}

#[tokio::test]
async fn expired_deletion_leaves_what_was_created_after_it_was_judged() {
    let world = World::with_an_instance().await;
    let alice = SourceId::new(ALICE).unwrap();
    let since = world.stored(ALICE).await.unwrap().since;
    let (late, source) = (world.at(1001 + TIMEOUT), alice.clone());
    let mut judged = world.hold_rewrite();
    let deleted = world.beside(move |gauntlet, _, web| async move {
        gauntlet.delete_expired_instance(&late, &web, &source, since).await
    });
    judged.reached().await;
    world.delete(ALICE).await.unwrap();
    let now = world.at(1001 + TIMEOUT);
    let anew = world.gauntlet.create_instance(&now, &world.web, &alice, Additional::new()).await.unwrap();
    judged.open();
    assert_eq!(within("deleting", deleted).await.unwrap(), Ok(false));
    assert_eq!(world.stored(ALICE).await, Some(anew.clone()));
    assert_eq!(world.machine.running(), [(anew.identity, digest(1))]);
}
