#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{FutureExt as _, TryStreamExt as _, future::join_all};
use gauntlet_coordination::{
    Coordination, Embedded,
    kv::{Get, KeyRange, Kv, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{Additional, Challenge, ChallengeUpdate, NewChallenge, PoolBounds, Settings, Store as _};
use gauntlet_testing::{
    eventually,
    fakes::{FakeProvisioner, FakeScenarios, IgnoredFacts, LaunchCounts},
    fixtures::{challenge_id, new_challenge, source_id},
};
use tempfile::TempDir;
use tokio::{sync::watch, time::timeout};

use super::*;
use crate::{
    fixture::record, observed::SignallingFacts, operations::Operations, reconciler::Reconciler, signals::Signals,
};

/// Longer than anything takes on a busy machine: only a real hang reaches it.
const LONG: Duration = Duration::from_secs(120);

/// The calls of a store, by name.
type Calls = Arc<Mutex<BTreeMap<&'static str, usize>>>;

/// An embedded store that counts its calls.
struct Counted {
    inner: Embedded,
    calls: Calls,
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

struct Fixture {
    operations: Operations,
    gauntlet: Gauntlet,
    store: Arc<Coordination<Counted>>,
    provisioner: Arc<FakeProvisioner>,
    /// Challenges whose instances do not become ready.
    slow: watch::Sender<BTreeSet<ChallengeId>>,
    /// Challenges whose instances fail to launch.
    failing: Arc<Mutex<BTreeSet<ChallengeId>>>,
    calls: Calls,
    pools: Arc<Pools>,
    tasks: Tasks,
    signals: Signals,
    _dir: TempDir,
}

impl Fixture {
    fn new(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let calls = Calls::default();
        let kv = Counted { inner: Embedded::open(&dir.path().join("store")).unwrap(), calls: Arc::clone(&calls) };
        let store = Arc::new(Coordination::new(kv, "test/", LONG, "a".to_owned()));
        let slow = watch::Sender::new(BTreeSet::new());
        let failing = Arc::<Mutex<BTreeSet<ChallengeId>>>::default();
        let (all_slow, all_failing) = (slow.clone(), failing.clone());
        let provisioner = FakeProvisioner::default().before(move |call| {
            let (mut slow, failing) = (all_slow.subscribe(), all_failing.clone());
            async move {
                let Some(challenge) = call.challenge().filter(|_| call.operation == "up") else { return Ok(()) };
                slow.wait_for(|slow| !slow.contains(challenge)).await.unwrap();
                match failing.lock().unwrap().contains(challenge) {
                    true => Err(Error::Unavailable { what: "provisioner", detail: "the challenge fails".to_owned() }),
                    false => Ok(()),
                }
            }
            .boxed()
        });
        let provisioner = Arc::new(provisioner);
        let signals = Signals::default();
        let facts = Arc::new(SignallingFacts { inner: Arc::new(IgnoredFacts), signals: signals.clone() });
        let scenarios = Arc::new(FakeScenarios::default());
        let gauntlet = Gauntlet::new(store.clone(), provisioner.clone(), scenarios, facts, settings);
        let tasks = Tasks::default();
        let operations = Operations::new(gauntlet.clone(), tasks.clone(), signals.clone(), 100);
        let pools = signals.pools().clone();
        Self { operations, gauntlet, store, provisioner, slow, failing, calls, pools, tasks, signals, _dir: dir }
    }

    /// A fixture that maintains pools, and runs nothing else in the background.
    fn maintaining_pools(settings: Settings) -> Self {
        let fixture = Self::new(settings);
        fixture.pools.start(&fixture.tasks, &fixture.gauntlet);
        fixture
    }

    async fn challenge(&self, name: &str, min: i64, max: i64) -> ChallengeId {
        let new = NewChallenge { timeout: None, max, ..new_challenge(name, min) };
        self.operations.create_challenge(record(&new.id), new).await.unwrap().id
    }

    async fn create(&self, challenge: &ChallengeId, source: &str) {
        self.operations
            .create_instance(record(challenge), challenge.clone(), source_id(source), Additional::new())
            .await
            .unwrap();
    }

    fn launches(&self, challenge: &ChallengeId) -> LaunchCounts {
        self.provisioner.launches(challenge)
    }

    async fn pooled(&self, challenge: &ChallengeId) -> usize {
        let all: Vec<_> = self.store.instances_of(challenge).try_collect().await.unwrap();
        all.iter().filter(|stored| stored.value.key.assignment.is_pooled()).count()
    }

    /// Waits until no check is queued or running and no job runs.
    async fn wait_until_idle(&self) {
        let is_idle = async || {
            let state = self.pools.lock();
            state.queue.is_empty() && state.checking.is_empty() && state.jobs == 0
        };
        eventually("the pools to be idle", is_idle).await;
    }

    /// The calls to the store since the last call of this.
    fn take_calls(&self) -> BTreeMap<&'static str, usize> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cost_of_a_create_does_not_depend_on_the_number_of_instances() {
    let fixture = Fixture::maintaining_pools(Settings::default());
    let none = fixture.challenge("none", 0, 0).await;
    let pool = fixture.challenge("pool", 3, 0).await;
    let bounded = fixture.challenge("bounded", 3, 1000).await;
    fixture.wait_until_idle().await;
    for (from, to) in [(0, 10), (10, 1000)] {
        for numbers in (from..to).collect::<Vec<_>>().chunks(64) {
            let (fixture, none) = (&fixture, &none);
            let creates = numbers.iter().map(|n| {
                let (source, other) = (format!("team-{n}"), if n % 2 == 0 { &pool } else { &bounded });
                async move {
                    fixture.create(none, &source).await;
                    fixture.create(other, &source).await;
                }
            });
            join_all(creates).await;
            fixture.wait_until_idle().await;
        }
        assert_eq!(fixture.pooled(&bounded).await, 3);
        fixture.take_calls();
        fixture.create(&none, &format!("one-of-{to}")).await;
        fixture.wait_until_idle().await;
        assert_eq!(fixture.take_calls(), BTreeMap::from([("txn", 2)]), "intent and commit, beside {to} instances");
        for challenge in [&pool, &bounded] {
            fixture.create(challenge, &format!("one-of-{to}")).await;
            fixture.wait_until_idle().await;
            let expected = BTreeMap::from([("txn", 5)]);
            let calls = fixture.take_calls();
            assert_eq!(calls, expected, "claim, two for the check, intent and commit, beside {to} instances");
        }
    }
    assert_eq!(fixture.pooled(&pool).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_requests_are_one_check() {
    let fixture = Fixture::new(Settings::default());
    let web = fixture.challenge("web", 0, 0).await;
    fixture.take_calls();
    for _ in 0..1000 {
        fixture.pools.request_check(&web, None);
    }
    fixture.pools.start(&fixture.tasks, &fixture.gauntlet);
    fixture.wait_until_idle().await;
    assert_eq!(fixture.take_calls(), BTreeMap::from([("txn", 2)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_challenges_do_not_delay_others() {
    let fixture = Fixture::new(Settings::default());
    let slow: BTreeSet<_> = (0..10).map(|n| challenge_id(&format!("slow-{n}"))).collect();
    fixture.slow.send_replace(slow.clone());
    for challenge in &slow {
        fixture.challenge(challenge.as_str(), 20, 0).await;
    }
    fixture.pools.start(&fixture.tasks, &fixture.gauntlet);
    // The reconciler requests checks of their pools too, and waits for none.
    Reconciler::new(fixture.signals.clone()).start(&fixture.tasks, &fixture.gauntlet, Duration::from_millis(20));
    let all_wait = async || slow.iter().all(|challenge| fixture.launches(challenge).current == MAX_JOBS_PER_CHALLENGE);
    eventually("all slow challenges to have as many jobs as they may", all_wait).await;
    let quick = fixture.challenge("quick", 20, 0).await;
    eventually("the pool of the quick challenge to be full", async || fixture.pooled(&quick).await == 20).await;
    fixture.create(&quick, "7").await;
    eventually("the claimed instance to be replaced", async || fixture.launches(&quick).total == 21).await;
    let limit = MAX_JOBS_PER_CHALLENGE;
    for challenge in &slow {
        let counts = LaunchCounts { current: limit, peak: limit, total: limit };
        assert_eq!(fixture.launches(challenge), counts);
    }
    fixture.slow.send_replace(BTreeSet::new());
    for challenge in &slow {
        eventually("the pools of slow challenges to be full", async || fixture.pooled(challenge).await == 20).await;
        assert!(fixture.launches(challenge).peak <= limit, "{:?}", fixture.launches(challenge));
    }
    assert_eq!(fixture.tasks.drain(LONG).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_scenario_is_not_retried_at_once() {
    let fixture = Fixture::maintaining_pools(Settings::default());
    fixture.failing.lock().unwrap().insert(challenge_id("web"));
    let web = fixture.challenge("web", 100, 0).await;
    fixture.wait_until_idle().await;
    assert_eq!((fixture.launches(&web).total, fixture.pooled(&web).await), (MAX_JOBS_PER_CHALLENGE, 0));
    fixture.failing.lock().unwrap().clear();
    fixture.pools.request_check(&web, None);
    eventually("the pool to be full", async || fixture.pooled(&web).await == 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_bounds_above_the_limit_are_capped() {
    let fixture = Fixture::maintaining_pools(Settings { pool_max: 20, ..Settings::default() });
    let web = fixture.challenge("web", 0, 0).await;
    let stored = fixture.store.challenge(&web).await.unwrap().unwrap().value;
    let bounds = PoolBounds::new(9_000_000_000_000_000_000, 0).unwrap();
    let old = Challenge { id: challenge_id("old"), bounds, ..stored };
    fixture.store.insert_challenge(&old).await.unwrap();
    fixture.pools.request_check(&old.id, None);
    // Creates while the pool is filled.
    for n in 0..30 {
        timeout(LONG, fixture.create(&old.id, &n.to_string())).await.unwrap();
    }
    fixture.wait_until_idle().await;
    assert_eq!(fixture.pooled(&old.id).await, 20);
    // Updates of other fields succeed.
    let update = ChallengeUpdate { timeout: Some(Some(LONG)), ..ChallengeUpdate::default() };
    fixture.operations.update_challenge(record(&old.id), old.id.clone(), update).await.unwrap();
    let update = ChallengeUpdate { min: Some(21), ..ChallengeUpdate::default() };
    let refused = fixture.gauntlet.update_challenge(&call_now(), &old.id, update).await.unwrap_err();
    assert_eq!(refused, Error::PoolOutOfBounds { min: 21, max: 0, limit: 20 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_creates_and_checks_keep_a_pool_within_its_bounds() {
    let fixture = Fixture::maintaining_pools(Settings::default());
    let web = fixture.challenge("web", 5, 12).await;
    let sources: Vec<_> = (0..10).map(|n| format!("team-{n}")).collect();
    join_all(sources.iter().map(|source| fixture.create(&web, source))).await;
    fixture.wait_until_idle().await;
    assert_eq!(fixture.pooled(&web).await, 2, "10 claimed and 2 pooled instances are 12");
    for source in &sources {
        fixture.operations.delete_instance(record(&web), web.clone(), source_id(source)).await.unwrap();
    }
    fixture.pools.request_check(&web, None);
    fixture.wait_until_idle().await;
    assert_eq!(fixture.pooled(&web).await, 5);
}
