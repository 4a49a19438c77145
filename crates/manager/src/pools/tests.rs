#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_trait::async_trait;
use futures::{TryStreamExt as _, future::join_all};
use gauntlet_coordination::{
    Coordination, Embedded,
    kv::{Get, KeyRange, Kv, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{
    Additional, Call, Challenge, Fact, Facts, Identity, LaunchPlan, LaunchRequest, NewChallenge, Outputs, Pinned,
    Placement, PoolBounds, PortSpec, PreparedScenario, ProvisionedInstance, Provisioner, Result, Scenarios, Settings,
    SourceId, Store as _,
};
use tempfile::TempDir;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::*;
use crate::{observed::SignallingFacts, operations::Operations, reconciler::Reconciler, signals::Signals};

/// What takes longer has stopped for good.
const LONG: Duration = Duration::from_secs(120);

/// An embedded store that counts the calls to it.
struct Counted {
    inner: Embedded,
    calls: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

impl Counted {
    fn count(&self, call: &'static str) {
        *self.calls.lock().unwrap().entry(call).or_default() += 1;
    }
}

impl Kv for Counted {
    type Snapshot = <Embedded as Kv>::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        self.count("txn");
        self.inner.txn(txn).await
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        self.count("page");
        self.inner.page(get, at).await
    }

    async fn count(&self, keys: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        self.count("count");
        self.inner.count(keys, at).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        self.count("follow");
        self.inner.list_and_watch(range).await
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.revoke(lease).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// Where instances would run: those of some challenges do not become ready, those of others fail.
#[derive(Debug)]
struct Machine {
    slow: watch::Sender<BTreeSet<ChallengeId>>,
    fails: Mutex<BTreeSet<ChallengeId>>,
    /// By challenge: being brought up now, the most at once, and all in all.
    ups: Mutex<BTreeMap<ChallengeId, (usize, usize, usize)>>,
}

impl Machine {
    fn ups(&self, id: &ChallengeId) -> (usize, usize, usize) {
        self.ups.lock().unwrap().get(id).copied().unwrap_or_default()
    }
}

#[async_trait]
impl Provisioner for Machine {
    fn name(&self) -> &'static str {
        "machine"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        let of = &request.challenge;
        {
            let mut ups = self.ups.lock().unwrap();
            let (now, most, all) = ups.entry(of.clone()).or_default();
            (*now, *all) = (*now + 1, *all + 1);
            *most = (*most).max(*now);
        }
        self.slow.subscribe().wait_for(|slow| !slow.contains(of)).await.unwrap();
        self.ups.lock().unwrap().entry(of.clone()).or_default().0 -= 1;
        match self.fails.lock().unwrap().contains(of) {
            true => Err(Error::Unavailable { what: "machine", detail: "it fails".to_owned() }),
            false => Ok(Outputs { connection_info: "here".to_owned(), flags: Vec::new() }),
        }
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.up(request).await
    }

    async fn down(&self, _: &ChallengeId, _: &Identity, _: u64) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        Ok(Vec::new())
    }
}

#[derive(Debug)]
struct Library;

#[async_trait]
impl Scenarios for Library {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        Ok(Pinned { reference: reference.to_owned(), digest: format!("sha256:{}", "ab".repeat(32)) })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, _: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        Ok(LaunchPlan::default())
    }
}

struct Uncounted;

impl Facts for Uncounted {
    fn record(&self, _: Fact) {}
}

struct World {
    operations: Operations,
    gauntlet: Gauntlet,
    store: Arc<Coordination<Counted>>,
    machine: Arc<Machine>,
    calls: Arc<Mutex<BTreeMap<&'static str, usize>>>,
    pools: Arc<Pools>,
    tasks: Tasks,
    signals: Signals,
    _dir: TempDir,
}

fn id(name: &str) -> ChallengeId {
    ChallengeId::new(name).unwrap()
}

impl World {
    fn new(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let calls = Arc::default();
        let kv = Counted { inner: Embedded::open(&dir.path().join("store")).unwrap(), calls: Arc::clone(&calls) };
        let store = Arc::new(Coordination::new(kv, "test/", LONG, "a".to_owned()));
        let machine = Arc::new(Machine {
            slow: watch::Sender::new(BTreeSet::new()),
            fails: Mutex::default(),
            ups: Mutex::default(),
        });
        let signals = Signals::default();
        let facts = Arc::new(SignallingFacts { inner: Arc::new(Uncounted), signals: signals.clone() });
        let gauntlet = Gauntlet::new(store.clone(), machine.clone(), Arc::new(Library), facts, settings);
        let tasks = Tasks::default();
        let operations = Operations::new(gauntlet.clone(), tasks.clone(), signals.clone());
        let pools = signals.pools().clone();
        Self { operations, gauntlet, store, machine, calls, pools, tasks, signals, _dir: dir }
    }

    /// Whose pools are looked after; nothing else happens in the background.
    fn looking_after_pools(settings: Settings) -> Self {
        let world = Self::new(settings);
        world.pools.start(&world.tasks, &world.gauntlet);
        world
    }

    async fn challenge(&self, name: &str, min: i64, max: i64) -> ChallengeId {
        let scenario = "reg/web:v1".to_owned();
        let (timeout, until, additional) = (None, None, Additional::new());
        let new = NewChallenge { id: id(name), scenario, timeout, until, additional, min, max };
        self.operations.create_challenge(new).await.unwrap().id
    }

    async fn create(&self, challenge: &ChallengeId, source: &str) {
        let source = SourceId::new(source).unwrap();
        self.operations.create_instance(challenge.clone(), source, Additional::new()).await.unwrap();
    }

    async fn pooled(&self, challenge: &ChallengeId) -> usize {
        let all: Vec<_> = self.store.instances_of(challenge).try_collect().await.unwrap();
        all.iter().filter(|stored| stored.value.key.assignment.is_pooled()).count()
    }

    fn is_idle(&self) -> bool {
        let state = self.pools.lock();
        state.queue.is_empty() && state.looking.is_empty() && state.jobs == 0
    }

    /// Until nothing is asked for, looked at or done.
    async fn idle(&self) {
        eventually("the pools are idle", || std::future::ready(self.is_idle())).await;
    }

    fn spent(&self) -> BTreeMap<&'static str, usize> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let held = async {
        while !holds().await {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LONG, held).await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_create_costs_does_not_grow_with_the_instances_there_are() {
    let world = World::looking_after_pools(Settings::default());
    let none = world.challenge("none", 0, 0).await;
    let pool = world.challenge("pool", 3, 0).await;
    let bounded = world.challenge("bounded", 3, 1000).await;
    world.idle().await;
    for (from, to) in [(0, 10), (10, 1000)] {
        for some in (from..to).collect::<Vec<_>>().chunks(64) {
            let (world, none) = (&world, &none);
            let creates = some.iter().map(|n| {
                let (source, other) = (format!("team-{n}"), if n % 2 == 0 { &pool } else { &bounded });
                async move {
                    world.create(none, &source).await;
                    world.create(other, &source).await;
                }
            });
            join_all(creates).await;
            world.idle().await;
        }
        assert_eq!(world.pooled(&bounded).await, 3);
        world.spent();
        world.create(&none, &format!("one-of-{to}")).await;
        world.idle().await;
        assert_eq!(world.spent(), BTreeMap::from([("txn", 2)]), "begun and committed, with {to} there");
        for challenge in [&pool, &bounded] {
            world.create(challenge, &format!("one-of-{to}")).await;
            world.idle().await;
            let expected = BTreeMap::from([("txn", 5)]);
            assert_eq!(world.spent(), expected, "claimed; looked at in two, begun and committed, with {to} there");
        }
    }
    assert_eq!(world.pooled(&pool).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asking_often_is_asking_once() {
    let world = World::new(Settings::default());
    let web = world.challenge("web", 0, 0).await;
    world.spent();
    for _ in 0..1000 {
        world.pools.request(&web, None);
    }
    world.pools.start(&world.tasks, &world.gauntlet);
    world.idle().await;
    assert_eq!(world.spent(), BTreeMap::from([("txn", 2)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_that_are_slow_to_fill_hold_up_no_other() {
    let world = World::new(Settings::default());
    let slow: BTreeSet<_> = (0..10).map(|n| id(&format!("slow-{n}"))).collect();
    world.machine.slow.send_replace(slow.clone());
    for challenge in &slow {
        world.challenge(challenge.as_str(), 20, 0).await;
    }
    // The reconciler asks for them, too, and waits for none.
    world.pools.start(&world.tasks, &world.gauntlet);
    Reconciler::new(world.signals.clone()).start(&world.tasks, &world.gauntlet, Duration::from_millis(20));
    let all_wait = || std::future::ready(slow.iter().all(|challenge| world.machine.ups(challenge).0 == JOBS));
    eventually("the slow ones are all waited for", all_wait).await;
    let quick = world.challenge("quick", 20, 0).await;
    eventually("the quick one is full", || async { world.pooled(&quick).await == 20 }).await;
    world.create(&quick, "7").await;
    eventually("it is refilled", || async { world.machine.ups(&quick).2 == 21 }).await;
    for challenge in &slow {
        assert_eq!(world.machine.ups(challenge), (JOBS, JOBS, JOBS), "no more at once than that");
    }
    world.machine.slow.send_replace(BTreeSet::new());
    for challenge in &slow {
        eventually("all are filled in the end", || async { world.pooled(challenge).await == 20 }).await;
        assert!(world.machine.ups(challenge).1 <= JOBS, "{:?}", world.machine.ups(challenge));
    }
    assert_eq!(world.tasks.drain(LONG).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scenario_that_fails_is_not_brought_up_again_and_again() {
    let world = World::looking_after_pools(Settings::default());
    world.machine.fails.lock().unwrap().insert(id("web"));
    let web = world.challenge("web", 100, 0).await;
    world.idle().await;
    assert_eq!((world.machine.ups(&web).2, world.pooled(&web).await), (JOBS, 0));
    world.machine.fails.lock().unwrap().clear();
    world.pools.request(&web, None);
    eventually("it is filled", || async { world.pooled(&web).await == 100 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bound_from_before_there_was_a_limit_is_cut_to_it() {
    let world = World::looking_after_pools(Settings { pool_max: 20, ..Settings::default() });
    let web = world.challenge("web", 0, 0).await;
    let stored = world.store.challenge(&web).await.unwrap().unwrap().value;
    let old = Challenge { id: id("old"), bounds: PoolBounds::new(9_000_000_000_000_000_000, 0).unwrap(), ..stored };
    world.store.insert_challenge(&old).await.unwrap();
    world.pools.request(&old.id, None);
    // It is created from meanwhile.
    for n in 0..30 {
        timeout(LONG, world.create(&old.id, &n.to_string())).await.unwrap();
    }
    world.idle().await;
    assert_eq!(world.pooled(&old.id).await, 20);
    // An update of something else goes through.
    let update = gauntlet_domain::ChallengeUpdate { timeout: Some(Some(LONG)), ..Default::default() };
    world.operations.update_challenge(old.id.clone(), update).await.unwrap();
    let call: Call = call_now();
    let refused = gauntlet_domain::ChallengeUpdate { min: Some(21), ..Default::default() };
    let refused = world.gauntlet.update_challenge(&call, &old.id, refused).await.unwrap_err();
    assert_eq!(refused, Error::PoolOutOfBounds { min: 21, max: 0, limit: 20 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creates_and_looks_at_once_keep_a_pool_within_its_bounds() {
    let world = World::looking_after_pools(Settings::default());
    let web = world.challenge("web", 5, 12).await;
    let sources: Vec<_> = (0..10).map(|n| format!("team-{n}")).collect();
    join_all(sources.iter().map(|source| world.create(&web, source))).await;
    world.idle().await;
    assert_eq!(world.pooled(&web).await, 2, "ten claimed and two make twelve");
    for source in &sources {
        world.operations.delete_instance(web.clone(), SourceId::new(source.as_str()).unwrap()).await.unwrap();
    }
    world.pools.request(&web, None);
    world.idle().await;
    assert_eq!(world.pooled(&web).await, 5);
}
