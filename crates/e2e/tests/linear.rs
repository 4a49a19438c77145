//! Concurrent calls for one instance are linearizable: some order of the calls explains every response, and in that order each call takes
//! effect between its start and its response.
//!
//! The tests record short histories over three replicas and check each. A call with an unknown outcome may take effect at any time after
//! its start, or never. Half of the histories run while requests and responses are lost, launches fail and leases expire.

pub(crate) mod model;
mod world;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use futures::StreamExt as _;
use gauntlet_coordination::kv::Kv;
use gauntlet_domain::{Additional, Assignment, ChallengeId, Error, Gauntlet, Instance, InstanceKey, Phase, SourceId};
use gauntlet_testing::eventually;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use self::{
    model::{History, Step},
    world::{CHALLENGES, World, call_at, call_number},
};
use crate::harness;

const HISTORIES: u64 = 500;
const CONCURRENT_HISTORIES: usize = 16;
const CLIENTS: u64 = 4;
const CALLS_PER_CLIENT: usize = 7;

/// The number of the next call. It is also the call's time, so the timestamps of an instance identify the calls that wrote them.
static NEXT_CALL: AtomicU64 = AtomicU64::new(1);

/// Makes a call that `dice` (0 to 99) selects, and returns the steps that its result implies.
async fn random_call(
    gauntlet: &Gauntlet,
    challenge: &ChallengeId,
    source: &SourceId,
    dice: u64,
    number: u64,
) -> Vec<Step> {
    let call = call_at(number);
    match dice {
        0..=29 => match gauntlet.create_instance(&call, challenge, source, Additional::new()).await {
            Ok(instance) => {
                assert_eq!(written_by(&instance), (number, number));
                vec![Step::Take(number), Step::Show(number, Some(number))]
            }
            Err(Error::InstanceExists(..)) => vec![Step::Taken],
            Err(Error::Provision { .. }) => vec![Step::Take(number), Step::GiveBack(number)],
            Err(error) => {
                possible_steps(error, &[Step::Take(number), Step::Show(number, Some(number)), Step::GiveBack(number)])
            }
        },
        30..=49 => match gauntlet.delete_instance(&call, challenge, source).await {
            Ok(()) => vec![Step::Remove],
            Err(Error::InstanceNotFound(..)) => vec![Step::Free],
            Err(error) => possible_steps(error, &[Step::Remove]),
        },
        50..=69 => match gauntlet.renew_instance(&call, challenge, source).await {
            Ok(instance) => vec![Step::Renew { number, saw: Some(written_by(&instance)) }],
            Err(Error::InstanceNotFound(..)) => vec![Step::NotShown],
            Err(error) => possible_steps(error, &[Step::Renew { number, saw: None }]),
        },
        _ => match gauntlet.retrieve_instance(challenge, source).await {
            Ok(instance) => vec![saw(&instance)],
            Err(Error::InstanceNotFound(..)) => vec![Step::NotShown],
            Err(error) => possible_steps(error, &[]),
        },
    }
}

/// Returns the steps of a failed call: none if it had no effect, or `steps` as possible ones if its outcome is unknown.
fn possible_steps(error: Error, steps: &[Step]) -> Vec<Step> {
    match error {
        // These calls fail before they write anything.
        Error::Busy { .. } | Error::Conflict => Vec::new(),
        Error::Unavailable { .. } | Error::Fenced(_) => {
            steps.iter().map(|step| Step::Maybe(Box::new(step.clone()))).collect()
        }
        error => panic!("{error}"),
    }
}

/// Returns the numbers of the calls that created and last renewed the instance.
fn written_by(instance: &Instance) -> (u64, u64) {
    (call_number(instance.since), call_number(instance.last_renew))
}

fn saw(instance: &Instance) -> Step {
    let (created, renewed) = written_by(instance);
    Step::Saw { created, renewed }
}

/// Records the calls that four clients make for one instance. Each client uses the replicas in turn.
async fn record<K: Kv>(world: &World<K>, number: u64) -> History {
    let challenge = ChallengeId::new(CHALLENGES[(number % 2) as usize]).unwrap();
    let source = SourceId::new(format!("source-{number}")).unwrap();
    let history = Mutex::new(History::default());
    let clients = (0..CLIENTS).map(|client| {
        let mut rng = SmallRng::seed_from_u64(number * CLIENTS + client);
        let (challenge, source, history) = (&challenge, &source, &history);
        async move {
            for turn in 0..CALLS_PER_CLIENT {
                let replica = &world.replicas[(client as usize + turn) % world.replicas.len()];
                let (dice, number) = (rng.random_range(0..100), NEXT_CALL.fetch_add(1, Ordering::Relaxed));
                history.lock().unwrap().called(number);
                let steps = random_call(&replica.gauntlet, challenge, source, dice, number).await;
                history.lock().unwrap().answered(number, steps);
            }
        }
    });
    futures::future::join_all(clients).await;
    // The last read comes after every operation has finished, so that a lost or duplicated write shows.
    let key = InstanceKey { challenge: challenge.clone(), assignment: Assignment::Source(source.clone()) };
    eventually("no operation on the instance is under way", async || {
        let stored = world.observer().store().instance(&key).await.unwrap();
        stored.is_none_or(|stored| stored.value.phase == Phase::Ready)
    })
    .await;
    let mut history = history.into_inner().unwrap();
    let number = NEXT_CALL.fetch_add(1, Ordering::Relaxed);
    history.called(number);
    let last = world.observer().retrieve_instance(&challenge, &source).await;
    history.answered(number, vec![last.as_ref().map_or(Step::NotShown, saw)]);
    if last.is_ok() {
        world.observer().delete_instance(&call_at(number), &challenge, &source).await.unwrap();
    }
    history
}

async fn assert_linearizable<K: Kv>(kv: Arc<K>) {
    let world = World::start(kv).await;
    let (mut recorded, mut unknown, mut overlaps) = (0, 0, 0);
    for faults in [false, true] {
        world.inject_faults(faults);
        let first = if faults { HISTORIES / 2 } else { 0 };
        // With faults, records more histories until at least one lease was lost.
        let is_needed = |number: &u64| *number < first + HISTORIES / 2 || faults && world.leases_lost() == 0;
        let mut histories = futures::stream::iter((first..).take_while(is_needed))
            .map(|number| {
                let world = &world;
                async move { (number, record(world, number).await) }
            })
            .buffer_unordered(CONCURRENT_HISTORIES);
        while let Some((number, history)) = histories.next().await {
            assert!(history.is_linearizable(), "no order of the calls explains history {number}:\n{history}");
            assert!(
                faults || history.unknown() == 0,
                "an outcome is unknown although no fault was injected:\n{history}"
            );
            unknown += history.unknown();
            overlaps += history.overlaps();
            recorded += 1;
        }
    }
    world.inject_faults(false);
    world.wait_until_consistent().await;
    eprintln!(
        "{recorded} histories of {} calls each are linearizable; {overlaps} calls began while another call for the same instance was under way; \
         {unknown} outcomes were unknown; {} leases were lost",
        CLIENTS as usize * CALLS_PER_CLIENT,
        world.leases_lost()
    );
    assert!(unknown > 0, "no fault affected a call");
    assert!(overlaps > HISTORIES as usize * CALLS_PER_CLIENT, "too few calls were concurrent");
    world.stop().await;
}

#[test]
fn histories_are_linearizable_embedded() {
    let world = harness::World::bare(harness::Backend::Embedded);
    let kv = Arc::new(gauntlet_coordination::Embedded::open(&world.path("store")).unwrap());
    world.runtime.block_on(assert_linearizable(kv));
}

#[test]
fn histories_are_linearizable_etcd() {
    use gauntlet_coordination::{Etcd, EtcdConfig};
    use gauntlet_telemetry::{Instruments, db::Database};
    let world = harness::World::bare(harness::Backend::Etcd);
    let config = EtcdConfig::new([world.etcd.as_ref().unwrap().url()]);
    let kv = Arc::new(Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap());
    world.runtime.block_on(assert_linearizable(kv));
}

/// Tests the checker: it accepts possible histories and rejects impossible ones.
#[test]
fn impossible_history_is_not_linearizable() {
    use Step::{Free, GiveBack, Maybe, NotShown, Remove, Renew, Renewed, RenewedUnseen, Saw, Show, Take, Taken};
    let is_linearizable = |calls: &[&[Step]]| {
        let mut history = History::default();
        for (number, steps) in calls.iter().enumerate() {
            history.called(number as u64);
            history.answered(number as u64, steps.to_vec());
        }
        history.is_linearizable()
    };
    let created = |number| vec![Take(number), Show(number, Some(number))];
    let saw = |created, renewed| Saw { created, renewed };
    assert!(is_linearizable(&[&created(0), &[Taken], &[saw(0, 0)], &[Remove], &[Free], &created(5), &[saw(5, 5)]]));
    assert!(!is_linearizable(&[&created(0), &created(1)]), "the instance is created twice");
    assert!(!is_linearizable(&[&created(0), &[NotShown]]), "an acknowledged create is lost");
    assert!(!is_linearizable(&[&created(0), &[Remove], &[saw(0, 0)]]), "a deleted instance is returned");
    assert!(!is_linearizable(&[&created(0), &[Remove], &[Remove]]), "an instance is deleted twice");
    let renewed = [Renew { number: 1, saw: Some((0, 1)) }];
    assert!(is_linearizable(&[&created(0), &renewed, &[saw(0, 1)]]));
    assert!(!is_linearizable(&[&created(0), &renewed, &[saw(0, 0)]]), "an acknowledged renewal is lost");
    assert!(
        !is_linearizable(&[&created(0), &[Renew { number: 2, saw: Some((0, 2)) }], &renewed]),
        "a late renewal overwrites a newer one"
    );
    assert!(
        !is_linearizable(&[&[Take(0), GiveBack(0)], &[saw(0, 0)]]),
        "an instance that failed to launch is returned"
    );
    let maybe = |step: Step| Maybe(Box::new(step));
    for after in [&[NotShown], &[saw(0, 0)]] {
        assert!(
            is_linearizable(&[&[maybe(Take(0)), maybe(Show(0, Some(0))), maybe(GiveBack(0))], after]),
            "an unknown outcome allows both reads"
        );
    }
    assert!(
        !is_linearizable(&[&[maybe(Take(0)), maybe(Show(0, Some(0)))], &[saw(0, 0)], &[NotShown]]),
        "an instance disappears without a delete"
    );
    // Renewals with the managers' own times.
    let renewed_at = |renewed| [Renewed { created: 0, renewed }];
    assert!(is_linearizable(&[&created(0), &renewed_at(5), &renewed_at(7), &[saw(0, 7)]]));
    assert!(!is_linearizable(&[&created(0), &renewed_at(7), &renewed_at(5)]), "a late renewal overwrites a newer one");
    assert!(!is_linearizable(&[&created(0), &renewed_at(7), &[saw(0, 5)]]), "an acknowledged renewal is lost");
    assert!(
        !is_linearizable(&[&created(0), &[Remove], &created(2), &renewed_at(7)]),
        "the renewal returns another instance"
    );
    let unseen = [maybe(RenewedUnseen)];
    assert!(is_linearizable(&[&created(0), &unseen, &[saw(0, 6)], &[saw(0, 6)]]));
    assert!(!is_linearizable(&[&created(0), &unseen, &[saw(0, 6)], &[saw(0, 7)]]), "one renewal has two times");
}
