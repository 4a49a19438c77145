//! The use cases on a real store and on a machine that refuses when told to.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use gauntlet_coordination::{Coordination, Embedded};
use gauntlet_domain::{
    Additional, Call, ChallengeId, ChallengeUpdate, Entropy, Error, Fact, Facts, Found, Gauntlet, Identity, Instance,
    NewChallenge, Operation, Order, Outputs, Phase, Pinned, Place, Plan, PortSpec, Provisioner, Result, Scenarios,
    Seat, Settings, Slot, SourceId, Store as _, Strategy, Workload,
};
use jiff::Timestamp;
use tempfile::TempDir;

/// Where instances would run.
#[derive(Debug, Default)]
struct Machine {
    /// What runs, and the digest of its scenario.
    running: Mutex<BTreeMap<Identity, String>>,
    /// What is refused.
    refused: Mutex<BTreeSet<&'static str>>,
}

impl Machine {
    fn refuse(&self, operations: impl IntoIterator<Item = &'static str>) {
        *self.refused.lock().unwrap() = operations.into_iter().collect();
    }

    fn ask(&self, operation: &'static str) -> Result<()> {
        match self.refused.lock().unwrap().contains(operation) {
            true => Err(Error::Unavailable { what: "machine", detail: format!("{operation} is refused") }),
            false => Ok(()),
        }
    }

    fn running(&self) -> Vec<(Identity, String)> {
        self.running.lock().unwrap().clone().into_iter().collect()
    }
}

#[async_trait]
impl Provisioner for Machine {
    fn name(&self) -> &'static str {
        "machine"
    }

    async fn up(&self, order: &Order) -> Result<Outputs> {
        self.ask("up")?;
        self.running.lock().unwrap().insert(order.identity.clone(), order.digest.clone());
        Ok(Outputs { connection_info: format!("http://{}.test", order.identity), flags: vec!["flag".to_owned()] })
    }

    async fn update(&self, order: &Order) -> Result<Outputs> {
        self.ask("update")?;
        self.up(order).await
    }

    async fn down(&self, _: &ChallengeId, identity: &Identity, _: u64) -> Result<()> {
        self.ask("down")?;
        self.running.lock().unwrap().remove(identity);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let running = self.running();
        let found = |(identity, _)| Found { challenge: id("web"), identity, generation: 1, alive: true };
        Ok(running.into_iter().map(found).collect())
    }
}

/// Scenarios named by a digit, which their digest repeats.
#[derive(Debug)]
struct Library;

fn digest(reference: &str) -> String {
    format!("sha256:{}", reference[reference.len() - 1..].repeat(64))
}

#[async_trait]
impl Scenarios for Library {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        Ok(Pinned { reference: reference.to_owned(), digest: digest(reference) })
    }

    async fn plan(&self, _: &Pinned, _: &Identity, _: &Additional) -> Result<Arc<dyn Plan>> {
        Ok(Arc::new(Self))
    }
}

impl Plan for Library {
    fn ports(&self) -> &[PortSpec] {
        &[]
    }

    fn render(&self, _: &Place) -> Result<Workload> {
        unreachable!("the machine looks at the digest alone")
    }
}

struct Unnoted;

impl Facts for Unnoted {
    fn note(&self, _: Fact) {}
}

#[derive(Default)]
struct Counter(AtomicU64);

impl Entropy for Counter {
    fn bits(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

fn id(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

struct World {
    gauntlet: Gauntlet,
    store: Arc<Coordination<Embedded>>,
    machine: Arc<Machine>,
    call: Call,
    web: ChallengeId,
    alice: SourceId,
    _dir: TempDir,
}

impl World {
    /// A challenge, and an instance of it for one source.
    async fn with_an_instance() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap());
        let machine = Arc::new(Machine::default());
        let (scenarios, facts) = (Arc::new(Library), Arc::new(Unnoted));
        let gauntlet = Gauntlet::new(store.clone(), machine.clone(), scenarios, facts, Settings::default());
        let call =
            Call { now: Timestamp::from_second(1000).unwrap(), origin: None, entropy: Arc::new(Counter::default()) };
        let (web, alice) = (id("web"), SourceId::new("alice").unwrap());
        let challenge = NewChallenge {
            id: web.clone(),
            scenario: "registry.test/web:1".to_owned(),
            timeout: None,
            until: None,
            additional: Additional::new(),
            min: 0,
            max: 0,
        };
        gauntlet.create_challenge(&call, challenge).await.unwrap();
        gauntlet.create_instance(&call, &web, &alice, Additional::new()).await.unwrap();
        Self { gauntlet, store, machine, call, web, alice, _dir: dir }
    }

    async fn stored(&self) -> Option<Instance> {
        let slot = Slot { challenge: self.web.clone(), seat: Seat::Source(self.alice.clone()) };
        self.store.instance(&slot).await.unwrap().map(|stored| stored.value)
    }

    async fn delete(&self) -> Result<()> {
        self.gauntlet.delete_instance(&self.call, &self.web, &self.alice).await
    }
}

#[tokio::test]
async fn what_cannot_be_taken_down_is_kept_and_tried_again() {
    let world = World::with_an_instance().await;
    let before = world.stored().await.unwrap();
    world.machine.refuse(["down"]);
    assert!(matches!(world.delete().await, Err(Error::Unavailable { .. })));
    let kept = world.stored().await.unwrap();
    let Phase::Failed(failure) = &kept.phase else { panic!("{kept:?}") };
    assert_eq!((failure.during, kept.identity.clone()), (Operation::Delete, before.identity));
    assert!(failure.reason.contains("down is refused"), "{failure:?}");
    assert_eq!(world.machine.running().len(), 1);
    // Not before it is due, and then for as often as it takes.
    assert_eq!(world.gauntlet.reconcile(&world.call).await.unwrap().recovered, 0);
    let due = Call { now: failure.retry_at, ..world.call.clone() };
    assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().failures.len(), 1);
    let Some(Phase::Failed(again)) = world.stored().await.map(|kept| kept.phase) else { panic!("it is kept") };
    assert_eq!((again.attempts, again.since), (2, failure.since));
    world.machine.refuse([]);
    let due = Call { now: again.retry_at, ..due };
    assert_eq!(world.gauntlet.reconcile(&due).await.unwrap().recovered, 1);
    assert_eq!((world.stored().await, world.machine.running()), (None, Vec::new()));
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing() {
    let world = World::with_an_instance().await;
    world.delete().await.unwrap();
    world.machine.refuse(["up"]);
    let refused = world.gauntlet.create_instance(&world.call, &world.web, &world.alice, Additional::new()).await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })));
    assert_eq!((world.stored().await, world.machine.running()), (None, Vec::new()));
}

#[tokio::test]
async fn an_update_that_fails_keeps_what_ran() {
    let world = World::with_an_instance().await;
    let before = world.stored().await.unwrap();
    let update = |strategy| ChallengeUpdate {
        scenario: Some("registry.test/web:2".to_owned()),
        strategy,
        ..ChallengeUpdate::default()
    };
    world.machine.refuse(["up"]);
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, update(Strategy::BlueGreen)).await.unwrap();
    assert_eq!(updated.failures.len(), 1);
    assert_eq!(updated.challenge.scenario.digest, digest("2"));
    let kept = world.stored().await.unwrap();
    assert_eq!(kept.phase, Phase::Ready);
    assert_eq!((&kept.identity, &kept.scenario), (&before.identity, &before.scenario));
    assert_eq!(world.machine.running(), [(before.identity.clone(), digest("1"))]);
    // The next one gets there, and takes the old one down.
    world.machine.refuse([]);
    let updated = world.gauntlet.update_challenge(&world.call, &world.web, update(Strategy::Recreate)).await.unwrap();
    assert_eq!(updated.failures, []);
    let after = world.stored().await.unwrap();
    assert_eq!((&after.phase, &after.scenario), (&Phase::Ready, &updated.challenge.scenario));
    assert_eq!(world.machine.running(), [(after.identity.clone(), digest("2"))]);
    world.delete().await.unwrap();
    assert_eq!(world.machine.running(), []);
}
