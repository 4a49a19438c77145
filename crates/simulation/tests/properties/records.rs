//! The store is a map from seats to instances, beside a challenge; its indexes follow.

use std::{collections::BTreeMap, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, Begin, Bounds, By, Challenge, ChallengeId, Commit, Error, Identity, Instance, LockKind, Phase, Pinned,
    Seat, Slot, SourceId, Store as _, Stranded,
};
use jiff::Timestamp;
use proptest::prelude::*;

use super::{Direct, histories, run, settle};

#[derive(Debug, Clone)]
enum Command {
    /// Begun and committed, or begun and dropped.
    Create {
        seat: usize,
        finished: bool,
    },
    Delete {
        seat: usize,
        finished: bool,
    },
    Renew {
        seat: usize,
        second: i64,
    },
    Claim {
        pool: usize,
        seat: usize,
    },
    Recover {
        seat: usize,
    },
    Change,
}

/// Seats 0 to 2 are of sources, 3 and 4 of the pool.
fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        4 => (0..5usize, any::<bool>()).prop_map(|(seat, finished)| Command::Create { seat, finished }),
        2 => (0..5usize, any::<bool>()).prop_map(|(seat, finished)| Command::Delete { seat, finished }),
        2 => (0..3usize, 100..200i64).prop_map(|(seat, second)| Command::Renew { seat, second }),
        2 => (3..5usize, 0..3usize).prop_map(|(pool, seat)| Command::Claim { pool, seat }),
        1 => (0..5usize).prop_map(|seat| Command::Recover { seat }),
        1 => Just(Command::Change),
    ]
}

/// An instance, as the model knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    phase: &'static str,
    until: Option<i64>,
}

fn slot(id: &ChallengeId, seat: usize) -> Slot {
    let seat = match seat {
        0..3 => Seat::Source(SourceId::new(format!("s{seat}")).unwrap()),
        _ => Seat::Pool(Identity::from_bits(seat as u64)),
    };
    Slot { challenge: id.clone(), seat }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn instance(slot: Slot, phase: Phase, number: usize) -> Instance {
    let identity = match &slot.seat {
        Seat::Pool(identity) => identity.clone(),
        Seat::Source(_) => Identity::from_bits(100 + number as u64),
    };
    let until = (!slot.seat.is_pool()).then(|| at(50));
    Instance {
        slot,
        identity,
        phase,
        since: at(1),
        last_renew: at(1),
        until,
        scenario: Pinned { reference: "r".to_owned(), digest: "d".to_owned() },
        applied: 1,
        additional: Additional::new(),
        connection_info: String::new(),
        flags: Vec::new(),
        target: None,
        origin: None,
    }
}

fn name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Provisioning => "provisioning",
        Phase::Ready => "ready",
        Phase::Updating => "updating",
        Phase::Deleting => "deleting",
        Phase::Failed(_) => "failed",
    }
}

async fn history(commands: Vec<Command>) {
    let (etcd, by) = (Direct::new(), By { origin: None, patience: Duration::from_secs(5) });
    let (_, store) = etcd.replica("r");
    let id = ChallengeId::new("c").unwrap();
    store
        .insert_challenge(&Challenge {
            id: id.clone(),
            scenario: Pinned { reference: "r".to_owned(), digest: "d".to_owned() },
            timeout: None,
            until: None,
            additional: Additional::new(),
            bounds: Bounds::default(),
            revision: 1,
            content: 1,
            rollout: None,
            closing: false,
            origin: None,
        })
        .await
        .unwrap();
    let mut model: BTreeMap<Slot, Known> = BTreeMap::new();
    let mut revision = 1;
    for (number, command) in commands.into_iter().enumerate() {
        let stored = store.challenge(&id).await.unwrap().unwrap();
        match command {
            Command::Create { seat, finished } => {
                let slot = slot(&id, seat);
                let intent = instance(slot.clone(), Phase::Provisioning, number);
                let until = intent.until.map(Timestamp::as_second);
                match store.begin_create(&stored, &intent, None, &by).await {
                    Err(Error::Conflict) => assert!(model.contains_key(&slot)),
                    Err(error) => panic!("{error}"),
                    Ok(held) => {
                        assert!(!model.contains_key(&slot));
                        let phase = if finished { "ready" } else { "provisioning" };
                        if finished {
                            let ready = Instance { phase: Phase::Ready, ..intent };
                            store.commit(held, &slot, Commit::Put(Box::new(ready))).await.unwrap();
                        }
                        model.insert(slot, Known { phase, until });
                    }
                }
            }
            Command::Delete { seat, finished } => {
                let slot = slot(&id, seat);
                match store.begin(&slot, Begin::Delete, &by).await {
                    Err(Error::Conflict) => assert!(!model.contains_key(&slot)),
                    Err(error) => panic!("{error}"),
                    Ok((held, begun)) => {
                        assert_eq!(begun.phase, Phase::Deleting);
                        model.get_mut(&slot).unwrap().phase = "deleting";
                        if finished {
                            store.commit(held, &slot, Commit::Remove).await.unwrap();
                            model.remove(&slot);
                        }
                    }
                }
            }
            Command::Renew { seat, second } => {
                let slot = slot(&id, seat);
                let Some(read) = store.instance(&slot).await.unwrap() else {
                    assert!(!model.contains_key(&slot));
                    continue;
                };
                let renewed = Instance { until: Some(at(second)), ..read.value.clone() };
                store.rewrite(&read, &renewed, &by).await.unwrap();
                // What was read first is of yesterday now.
                assert_eq!(store.rewrite(&read, &renewed, &by).await, Err(Error::Conflict));
                model.get_mut(&slot).unwrap().until = Some(second);
            }
            Command::Claim { pool, seat } => {
                let (from, to) = (slot(&id, pool), slot(&id, seat));
                let Some(pooled) = store.instance(&from).await.unwrap().filter(|read| read.value.phase == Phase::Ready)
                else {
                    assert!(model.get(&from).is_none_or(|known| known.phase != "ready"));
                    continue;
                };
                let claimed =
                    Instance { identity: pooled.value.identity.clone(), ..instance(to.clone(), Phase::Ready, number) };
                match store.claim(&stored, &pooled, &claimed, &by).await {
                    Err(Error::Conflict) => assert!(model.contains_key(&to)),
                    Err(error) => panic!("{error}"),
                    Ok(held) => {
                        assert!(held.is_none());
                        model.remove(&from).unwrap();
                        assert!(model.insert(to, Known { phase: "ready", until: Some(50) }).is_none());
                    }
                }
            }
            Command::Recover { seat } => {
                let slot = slot(&id, seat);
                match store.begin(&slot, Begin::Recover, &By::default()).await {
                    Err(Error::Conflict) => assert!(model.get(&slot).is_none_or(|known| known.phase == "ready")),
                    Err(error) => panic!("{error}"),
                    Ok((held, begun)) => {
                        let known = model.get_mut(&slot).unwrap();
                        assert_eq!(name(&begun.phase), known.phase);
                        let ready = Instance { phase: Phase::Ready, ..begun };
                        store.commit(held, &slot, Commit::Put(Box::new(ready))).await.unwrap();
                        known.phase = "ready";
                    }
                }
            }
            Command::Change => {
                let held = store.lock(LockKind::Challenge, &id, &by).await.unwrap();
                revision += 1;
                store.update_challenge(held, &Challenge { revision, ..stored.value.clone() }).await.unwrap();
                // What goes by the old settings is told so.
                let intent = instance(slot(&id, 0), Phase::Provisioning, number);
                assert_eq!(store.begin_create(&stored, &intent, None, &by).await.err(), Some(Error::Conflict));
            }
        }
        // What was dropped is given up by now.
        settle().await;
    }
    compare(&store, &id, &model, revision).await;
}

async fn compare(
    store: &gauntlet_coordination::Coordination<Direct>,
    id: &ChallengeId,
    model: &BTreeMap<Slot, Known>,
    revision: u64,
) {
    let known =
        |instance: &Instance| Known { phase: name(&instance.phase), until: instance.until.map(Timestamp::as_second) };
    let all: Vec<_> = store.instances_of(id).try_collect().await.unwrap();
    let all: BTreeMap<Slot, Known> =
        all.iter().map(|stored| (stored.value.slot.clone(), known(&stored.value))).collect();
    assert_eq!(all, *model);
    assert_eq!(store.challenge(id).await.unwrap().unwrap().value.revision, revision);
    for seat in 0..3 {
        let slot = slot(id, seat);
        let source = slot.seat.source().unwrap();
        let own: Vec<Instance> = store.instances_by_source(Some(source)).try_collect().await.unwrap();
        assert_eq!(
            own.iter().map(known).collect::<Vec<_>>(),
            model.get(&slot).cloned().into_iter().collect::<Vec<_>>()
        );
    }
    let stranded = store.stranded(at(0)).await.unwrap();
    let working: Vec<Stranded> = model
        .iter()
        .filter(|(_, known)| known.phase != "ready")
        .map(|(slot, _)| Stranded::Instance(slot.clone()))
        .collect();
    assert_eq!(stranded.len(), working.len());
    assert!(working.iter().all(|one| stranded.contains(one)), "{stranded:?} {working:?}");
    let pooled = model.keys().any(|slot| slot.seat.is_pool());
    assert_eq!(store.pools().await.unwrap().is_empty(), !pooled);
    let census = store.census(at(100)).await.unwrap();
    assert_eq!(census.instances.values().sum::<u64>(), model.len() as u64);
    let overdue = model.values().filter(|known| known.until.is_some_and(|until| until <= 100)).count();
    assert_eq!(census.overdue, overdue as u64);
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn the_store_is_a_map(commands in proptest::collection::vec(command(), 1..9)) {
        run(history(commands));
    }
}
