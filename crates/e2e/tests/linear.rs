//! Concurrent calls for one instance are linearizable: one order of the calls explains every answer, and each call takes effect between its
//! request and its answer.
//!
//! Records and checks short histories over three replicas. A call whose outcome is unknown may take effect at any time after its request, or
//! never. Half of the histories run while requests and answers are lost, provisioning fails and leases are lost.

pub(crate) mod model;
mod world;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use futures::StreamExt as _;
use gauntlet_coordination::kv::Kv;
use gauntlet_domain::{Additional, Assignment, ChallengeId, Error, Gauntlet, Instance, InstanceKey, Phase, SourceId};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use self::{
    model::{History, Step},
    world::{CHALLENGES, World, at, call},
};
use crate::harness;

const HISTORIES: u64 = 500;
const CONCURRENT_HISTORIES: usize = 16;
const CLIENTS: u64 = 4;
const CALLS: usize = 7;

/// Numbers the calls. The number is also the time of the call, so that readers know which call wrote what they see.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Makes one call and returns the steps that its answer implies.
async fn act(gauntlet: &Gauntlet, challenge: &ChallengeId, source: &SourceId, choice: u64, number: u64) -> Vec<Step> {
    let call = call(number);
    match choice {
        0..=29 => match gauntlet.create_instance(&call, challenge, source, Additional::new()).await {
            Ok(instance) => {
                assert_eq!(seen(&instance), (number, number));
                vec![Step::Take(number), Step::Show(number, Some(number))]
            }
            Err(Error::InstanceExists(..)) => vec![Step::Taken],
            Err(Error::Provision { .. }) => vec![Step::Take(number), Step::GiveBack(number)],
            Err(error) => {
                unknown(error, &[Step::Take(number), Step::Show(number, Some(number)), Step::GiveBack(number)])
            }
        },
        30..=49 => match gauntlet.delete_instance(&call, challenge, source).await {
            Ok(()) => vec![Step::Remove],
            Err(Error::InstanceNotFound(..)) => vec![Step::Free],
            Err(error) => unknown(error, &[Step::Remove]),
        },
        50..=69 => match gauntlet.renew_instance(&call, challenge, source).await {
            Ok(instance) => vec![Step::Renew { number, saw: Some(seen(&instance)) }],
            Err(Error::InstanceNotFound(..)) => vec![Step::NotShown],
            Err(error) => unknown(error, &[Step::Renew { number, saw: None }]),
        },
        _ => match gauntlet.retrieve_instance(challenge, source).await {
            Ok(instance) => vec![saw(&instance)],
            Err(Error::InstanceNotFound(..)) => vec![Step::NotShown],
            Err(error) => unknown(error, &[]),
        },
    }
}

fn unknown(error: Error, steps: &[Step]) -> Vec<Step> {
    match error {
        // The call gave up before it wrote anything.
        Error::Busy { .. } | Error::Conflict => Vec::new(),
        Error::Unavailable { .. } | Error::Fenced(_) => {
            steps.iter().map(|step| Step::Maybe(Box::new(step.clone()))).collect()
        }
        error => panic!("{error}"),
    }
}

/// Returns the calls that created the instance and last renewed it.
fn seen(instance: &Instance) -> (u64, u64) {
    (at(instance.since), at(instance.last_renew))
}

fn saw(instance: &Instance) -> Step {
    let (created, renewed) = seen(instance);
    Step::Saw { created, renewed }
}

/// Records a history: several clients call for one instance, each using the replicas in turn.
async fn record<K: Kv>(world: &World<K>, number: u64) -> History {
    let challenge = ChallengeId::new(CHALLENGES[(number % 2) as usize]).unwrap();
    let source = SourceId::new(format!("source-{number}")).unwrap();
    let history = Mutex::new(History::default());
    let clients = (0..CLIENTS).map(|client| {
        let mut rng = SmallRng::seed_from_u64(number * CLIENTS + client);
        let (challenge, source, history) = (&challenge, &source, &history);
        async move {
            for turn in 0..CALLS {
                let replica = &world.replicas[(client as usize + turn) % world.replicas.len()];
                let (choice, number) = (rng.random_range(0..100), NEXT.fetch_add(1, Ordering::Relaxed));
                history.lock().unwrap().called(number);
                let steps = act(&replica.gauntlet, challenge, source, choice, number).await;
                history.lock().unwrap().answered(number, steps);
            }
        }
    });
    futures::future::join_all(clients).await;
    // The last read fixes the final state, after unfinished work has been completed.
    let key = InstanceKey { challenge: challenge.clone(), assignment: Assignment::Source(source.clone()) };
    world
        .wait_until("the instance to settle", || async {
            let stored = world.observer().store().instance(&key).await.unwrap();
            stored.is_none_or(|stored| stored.value.phase == Phase::Ready)
        })
        .await;
    let mut history = history.into_inner().unwrap();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    history.called(number);
    let last = world.observer().retrieve_instance(&challenge, &source).await;
    history.answered(number, vec![last.as_ref().map_or(Step::NotShown, saw)]);
    if last.is_ok() {
        world.observer().delete_instance(&call(number), &challenge, &source).await.unwrap();
    }
    history
}

async fn all_are_linearizable<K: Kv>(kv: Arc<K>) {
    let world = World::start(kv).await;
    let (mut recorded, mut unknown, mut overlaps) = (0, 0, 0);
    for faults in [false, true] {
        world.set_faults(faults);
        let first = if faults { HISTORIES / 2 } else { 0 };
        // With faults, continues until a lease was lost.
        let more = |number: &u64| *number < first + HISTORIES / 2 || faults && world.leases_lost() == 0;
        let mut histories = futures::stream::iter((first..).take_while(more))
            .map(|number| {
                let world = &world;
                async move { (number, record(world, number).await) }
            })
            .buffer_unordered(CONCURRENT_HISTORIES);
        while let Some((number, history)) = histories.next().await {
            assert!(history.is_linearizable(), "history {number} has no order that explains it:\n{history}");
            assert!(faults || history.unknown() == 0, "outcomes are unknown although there was no fault:\n{history}");
            unknown += history.unknown();
            overlaps += history.overlaps();
            recorded += 1;
        }
    }
    world.set_faults(false);
    world.wait_until_settled().await;
    eprintln!(
        "{recorded} histories of {} calls each are linearizable; {overlaps} calls overlapped another call for the same instance; \
         {unknown} outcomes were unknown, {} leases were lost",
        CLIENTS as usize * CALLS,
        world.leases_lost()
    );
    assert!(unknown > 0, "no fault affected a call");
    assert!(overlaps > HISTORIES as usize * CALLS, "too few calls overlapped");
    world.stop().await;
}

#[test]
fn histories_are_linearizable_embedded() {
    let world = harness::World::bare(harness::Backend::Embedded);
    let kv = Arc::new(gauntlet_coordination::Embedded::open(&world.path("store")).unwrap());
    world.runtime.block_on(all_are_linearizable(kv));
}

#[test]
fn histories_are_linearizable_etcd() {
    use gauntlet_coordination::{Etcd, EtcdConfig};
    use gauntlet_telemetry::{Instruments, db::Database};
    let world = harness::World::bare(harness::Backend::Etcd);
    let config = EtcdConfig::new([world.etcd.as_ref().unwrap().url()]);
    let kv = Arc::new(Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap());
    world.runtime.block_on(all_are_linearizable(kv));
}

/// Tests the checker itself.
#[test]
fn impossible_history_is_not_linearizable() {
    use Step::{Free, GiveBack, Maybe, NotShown, Remove, Renew, Renewed, RenewedUnseen, Saw, Show, Take, Taken};
    let sequence = |calls: &[&[Step]]| {
        let mut history = History::default();
        for (number, steps) in calls.iter().enumerate() {
            history.called(number as u64);
            history.answered(number as u64, steps.to_vec());
        }
        history.is_linearizable()
    };
    let created = |number| vec![Take(number), Show(number, Some(number))];
    let saw = |created, renewed| Saw { created, renewed };
    assert!(sequence(&[&created(0), &[Taken], &[saw(0, 0)], &[Remove], &[Free], &created(5), &[saw(5, 5)]]));
    assert!(!sequence(&[&created(0), &created(1)]), "an instance was created twice");
    assert!(!sequence(&[&created(0), &[NotShown]]), "an acknowledged create was lost");
    assert!(!sequence(&[&created(0), &[Remove], &[saw(0, 0)]]), "a deleted instance was read");
    assert!(!sequence(&[&created(0), &[Remove], &[Remove]]), "an instance was deleted twice");
    let renewed = [Renew { number: 1, saw: Some((0, 1)) }];
    assert!(sequence(&[&created(0), &renewed, &[saw(0, 1)]]));
    assert!(!sequence(&[&created(0), &renewed, &[saw(0, 0)]]), "an acknowledged renewal was lost");
    assert!(
        !sequence(&[&created(0), &[Renew { number: 2, saw: Some((0, 2)) }], &renewed]),
        "a delayed renewal shortened a later one"
    );
    assert!(!sequence(&[&[Take(0), GiveBack(0)], &[saw(0, 0)]]), "a failed instance was read");
    let maybe = |step: Step| Maybe(Box::new(step));
    for after in [&[NotShown], &[saw(0, 0)]] {
        assert!(
            sequence(&[&[maybe(Take(0)), maybe(Show(0, Some(0))), maybe(GiveBack(0))], after]),
            "either outcome is possible"
        );
    }
    assert!(
        !sequence(&[&[maybe(Take(0)), maybe(Show(0, Some(0)))], &[saw(0, 0)], &[NotShown]]),
        "both outcomes were seen"
    );
    // The managers chose the renewal times.
    let at = |renewed| [Renewed { created: 0, renewed }];
    assert!(sequence(&[&created(0), &at(5), &at(7), &[saw(0, 7)]]));
    assert!(!sequence(&[&created(0), &at(7), &at(5)]), "a delayed renewal shortened a later one");
    assert!(!sequence(&[&created(0), &at(7), &[saw(0, 5)]]), "an acknowledged renewal was lost");
    assert!(!sequence(&[&created(0), &[Remove], &created(2), &at(7)]), "a renewal returned another instance");
    let unseen = [maybe(RenewedUnseen)];
    assert!(sequence(&[&created(0), &unseen, &[saw(0, 6)], &[saw(0, 6)]]));
    assert!(!sequence(&[&created(0), &unseen, &[saw(0, 6)], &[saw(0, 7)]]), "one renewal has two times");
}
