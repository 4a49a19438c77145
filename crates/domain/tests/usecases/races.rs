//! Calls that are delayed while another call changes the same challenge or instance.

use gauntlet_domain::{Additional, ChallengeUpdate, Error, Identity, LockKind, Phase, ProvisionedInstance, Store as _};
use gauntlet_testing::fixtures::source_id;
use tokio::task::JoinHandle;

use crate::harness::{ALICE, BOB, Harness, INSTANCE_TIMEOUT, digest, reference, within};

#[tokio::test]
async fn delayed_renewal_does_not_shorten_a_later_one() {
    let harness = Harness::with_instance().await;
    let alice = source_id(ALICE);
    let (early, late) = (harness.call_at(1100), harness.call_at(1200));
    harness.gauntlet.renew_instance(&late, &harness.web, &alice).await.unwrap();
    let delayed = harness.gauntlet.renew_instance(&early, &harness.web, &alice).await.unwrap();
    assert_eq!(delayed.last_renew, late.now);
    let stored = harness.stored(ALICE).await.unwrap();
    assert_eq!((stored.last_renew, stored.until), (late.now, Some(harness.call_at(1200 + INSTANCE_TIMEOUT).now)));
    // Neither does a delayed update, whether it changes resources or not.
    for scenario in [None, Some(reference(2))] {
        let update = ChallengeUpdate { scenario, ..ChallengeUpdate::default() };
        let updated = harness.gauntlet.update_challenge(&early, &harness.web, update).await.unwrap();
        assert_eq!((updated.failures, updated.instances[0].applied_revision), (Vec::new(), updated.challenge.revision));
        assert_eq!(harness.stored(ALICE).await.unwrap().until, Some(harness.call_at(1200 + INSTANCE_TIMEOUT).now));
    }
}

#[tokio::test]
async fn exited_instance_is_not_restarted_over_its_replacement() {
    let harness = Harness::with_instance().await;
    let (alice, before) = (harness.stored(ALICE).await.unwrap(), harness.create(BOB).await);
    harness.provisioner.exit(&alice.identity);
    harness.provisioner.exit(&before.identity);
    // The reconciler finds both exited. While it restarts the first, the second is replaced.
    let mut first = harness.provisioner.hold("update");
    let reconciled = harness.spawn(|gauntlet, call, _| async move { gauntlet.reconcile(&call).await });
    first.arrived().await;
    harness.delete(BOB).await.unwrap();
    let recreated = harness.create(BOB).await;
    assert_ne!(recreated.identity, before.identity);
    first.open();
    let done = within("the reconciliation ends", reconciled).await.unwrap().unwrap();
    assert_eq!((done.restarted, done.failures), (1, Vec::new()));
    assert_eq!(harness.stored(BOB).await, Some(recreated.clone()));
    assert_eq!(harness.provisioner.running(), [(alice.identity, digest(1)), (recreated.identity, digest(1))]);
}

#[tokio::test]
async fn only_the_reported_instance_is_restarted() {
    let harness = Harness::with_instance().await;
    let (alice, bob) = (harness.stored(ALICE).await.unwrap(), harness.create(BOB).await);
    harness.provisioner.exit(&alice.identity);
    harness.provisioner.exit(&bob.identity);
    // A generation above all others: the fake provisioner refuses to remove an instance for an older one.
    let exited = |identity: &Identity| ProvisionedInstance {
        challenge: harness.web.clone(),
        identity: identity.clone(),
        generation: u64::MAX,
        alive: false,
    };
    let done = harness.gauntlet.reconcile_instance(&harness.call_at(1), exited(&alice.identity)).await.unwrap();
    assert_eq!((done.restarted, done.failures), (1, Vec::new()));
    assert_eq!(harness.provisioner.running(), [(alice.identity, digest(1))]);
    // An instance that was deleted meanwhile is removed, not restarted.
    harness.delete(BOB).await.unwrap();
    let done = harness.gauntlet.reconcile_instance(&harness.call_at(2), exited(&bob.identity)).await.unwrap();
    assert_eq!((done.restarted, done.orphans_removed, done.failures), (0, 1, Vec::new()));
}

#[tokio::test]
async fn update_racing_a_replacement_leaves_one_instance() {
    let harness = Harness::with_instance().await;
    harness.create(BOB).await;
    let mut first = harness.provisioner.hold("update");
    let updated = harness.spawn(|gauntlet, call, web| async move {
        let update = ChallengeUpdate { scenario: Some(reference(2)), ..ChallengeUpdate::default() };
        gauntlet.update_challenge(&call, &web, update).await
    });
    first.arrived().await;
    harness.delete(BOB).await.unwrap();
    harness.create(BOB).await;
    first.open();
    assert_eq!(within("the update ends", updated).await.unwrap().unwrap().failures, []);
    let recorded = [harness.stored(ALICE).await.unwrap(), harness.stored(BOB).await.unwrap()];
    let mut recorded = recorded.map(|instance| (instance.identity, digest(2)));
    recorded.sort();
    assert_eq!(harness.provisioner.running(), recorded);
}

/// Spawns a deletion of the challenge and delays it: it has deleted the instances and waits for the challenge's lock, behind a deletion that
/// removes the challenge and behind the returned guard.
async fn delayed_deletion(harness: &Harness) -> (JoinHandle<gauntlet_domain::Result<()>>, gauntlet_domain::LockGuard) {
    let first = harness.lock(LockKind::Challenge).await.unwrap();
    let deleted = harness.spawn(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    harness.wait_for_queue(LockKind::Challenge, 2).await;
    // The deletion takes the lock twice. These two queue up in between.
    let other = harness.lock(LockKind::Challenge);
    harness.wait_for_queue(LockKind::Challenge, 3).await;
    let last = harness.lock(LockKind::Challenge);
    harness.wait_for_queue(LockKind::Challenge, 4).await;
    first.release().await.unwrap();
    let other = within("the lock is taken", other).await.unwrap();
    harness.wait_for_queue(LockKind::Rollout, 1).await;
    harness.wait_for_queue(LockKind::Challenge, 3).await;
    other.remove_challenge().await.unwrap();
    (deleted, within("the lock is taken", last).await.unwrap())
}

#[tokio::test]
async fn delayed_deletion_keeps_a_recreated_challenge() {
    let harness = Harness::with_challenge(0).await;
    let (deleted, last) = delayed_deletion(&harness).await;
    harness.create_challenge(0).await;
    last.release().await.unwrap();
    assert_eq!(within("the deletion ends", deleted).await.unwrap(), Ok(()));
    assert!(!harness.store.challenge(&harness.web).await.unwrap().unwrap().value.deleting);
}

#[tokio::test]
async fn deletion_that_finds_no_challenge_removes_none() {
    let harness = Harness::with_challenge(0).await;
    let (mut deleted, last) = delayed_deletion(&harness).await;
    let mut removal = harness.hold_removal();
    last.release().await.unwrap();
    // The deletion has found no challenge. If it removes the challenge all the same, it meets the one created now.
    let answered = tokio::select! {
        answered = &mut deleted => Some(answered.unwrap()),
        () = removal.arrived() => None,
    };
    harness.create_challenge(0).await;
    removal.open();
    let answered = match answered {
        Some(answered) => answered,
        None => within("the deletion ends", deleted).await.unwrap(),
    };
    assert_eq!(answered, Ok(()));
    assert!(harness.store.challenge(&harness.web).await.unwrap().is_some());
}

#[tokio::test]
async fn deletion_after_another_keeps_a_recreated_challenge() {
    let harness = Harness::with_challenge(0).await;
    let other = harness.lock(LockKind::Rollout).await.unwrap();
    let deleted = harness.spawn(|gauntlet, call, web| async move { gauntlet.delete_challenge(&call, &web).await });
    harness.wait_for_queue(LockKind::Rollout, 2).await;
    let guard = harness.lock(LockKind::Challenge).await.unwrap();
    guard.remove_challenge().await.unwrap();
    harness.create_challenge(0).await;
    let recreated = harness.create(ALICE).await;
    other.release().await.unwrap();
    assert_eq!(within("the deletion ends", deleted).await.unwrap(), Ok(()));
    assert_eq!(harness.stored(ALICE).await, Some(recreated.clone()));
    assert_eq!(harness.provisioner.running(), [(recreated.identity, digest(1))]);
}

#[tokio::test]
async fn update_does_not_revert_a_deletion() {
    let harness = Harness::with_instance().await;
    let mut down = harness.provisioner.hold("down");
    let deleted = harness
        .spawn(|gauntlet, call, web| async move { gauntlet.delete_instance(&call, &web, &source_id(ALICE)).await });
    down.arrived().await;
    // The owner of the deletion crashes.
    deleted.abort();
    assert!(within("the task ends", deleted).await.unwrap_err().is_cancelled());
    let update = ChallengeUpdate { scenario: Some(reference(2)), ..ChallengeUpdate::default() };
    let updated = harness.gauntlet.update_challenge(&harness.call, &harness.web, update);
    let updated = within("the update ends", updated).await.unwrap();
    assert_eq!((updated.failures, updated.challenge.rollout), (Vec::new(), None));
    assert_eq!(harness.stored(ALICE).await.unwrap().phase, Phase::Deleting);
    // The dropped guard is released in the background.
    let recovered = async {
        while harness.stored(ALICE).await.is_some() {
            harness.gauntlet.reconcile(&harness.call).await.unwrap();
        }
    };
    within("the deletion is recovered", recovered).await;
    assert_eq!(harness.provisioner.running(), []);
}

#[tokio::test]
async fn expired_deletion_keeps_a_renewed_or_recreated_instance() {
    let harness = Harness::with_instance().await;
    let alice = source_id(ALICE);
    let since = harness.stored(ALICE).await.unwrap().since;
    let (renewed, late) = (harness.call_at(1500), harness.call_at(1001 + INSTANCE_TIMEOUT));
    harness.gauntlet.renew_instance(&renewed, &harness.web, &alice).await.unwrap();
    let kept = harness.stored(ALICE).await;
    assert_eq!(harness.gauntlet.delete_expired_instance(&late, &harness.web, &alice, since).await, Ok(false));
    assert_eq!(harness.stored(ALICE).await, kept);

    harness.delete(ALICE).await.unwrap();
    let again = harness.gauntlet.create_instance(&renewed, &harness.web, &alice, Additional::new()).await.unwrap();
    let later = harness.call_at(1501 + INSTANCE_TIMEOUT);
    assert_eq!(harness.gauntlet.delete_expired_instance(&later, &harness.web, &alice, since).await, Ok(false));
    assert_eq!(harness.stored(ALICE).await, Some(again.clone()));

    assert_eq!(harness.gauntlet.delete_expired_instance(&later, &harness.web, &alice, again.since).await, Ok(true));
    assert_eq!((harness.stored(ALICE).await, harness.provisioner.running()), (None, Vec::new()));
    let gone = harness.gauntlet.delete_expired_instance(&later, &harness.web, &alice, again.since).await;
    assert_eq!(gone, Err(Error::InstanceNotFound(harness.web.clone(), alice)));
}

#[tokio::test]
async fn expired_deletion_keeps_an_instance_created_after_its_check() {
    let harness = Harness::with_instance().await;
    let alice = source_id(ALICE);
    let since = harness.stored(ALICE).await.unwrap().since;
    let (late, source) = (harness.call_at(1001 + INSTANCE_TIMEOUT), alice.clone());
    let mut checked = harness.hold_rewrite();
    let deleted = harness.spawn(move |gauntlet, _, web| async move {
        gauntlet.delete_expired_instance(&late, &web, &source, since).await
    });
    checked.arrived().await;
    harness.delete(ALICE).await.unwrap();
    let now = harness.call_at(1001 + INSTANCE_TIMEOUT);
    let recreated = harness.gauntlet.create_instance(&now, &harness.web, &alice, Additional::new()).await.unwrap();
    checked.open();
    assert_eq!(within("the deletion ends", deleted).await.unwrap(), Ok(false));
    assert_eq!(harness.stored(ALICE).await, Some(recreated.clone()));
    assert_eq!(harness.provisioner.running(), [(recreated.identity, digest(1))]);
}
