//! Three replicas of the use cases on one store in this process, with injected faults and a provisioner in memory.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::TryStreamExt as _;
use gauntlet_coordination::{
    Coordination,
    kv::{Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{
    Additional, Call, ChallengeId, Clock, Entropy, Error, Fact, Facts, Gauntlet, Identity, LaunchPlan, LaunchRequest,
    NewChallenge, Outputs, Pinned, Placement, PortSpec, PreparedScenario, ProvisionedInstance, Provisioner, Result,
    Scenarios, Settings, Store,
};
use jiff::Timestamp;
use tokio::task::JoinHandle;

/// A challenge without a pool, and one with a pool.
pub(super) const CHALLENGES: [&str; 2] = ["plain", "pooled"];
const POOL: i64 = 2;
/// The time of call 0, in microseconds since 1970. It is in the past.
const EPOCH: i64 = 1_700_000_000_000_000;

/// Returns a call whose time is given by its number.
pub(super) fn call(number: u64) -> Call {
    let now = Timestamp::from_microsecond(EPOCH + number as i64).unwrap();
    Call { now, traceparent: None, entropy: Arc::new(Random), clock: Arc::new(Random) }
}

#[async_trait]
impl Clock for Random {
    fn elapsed(&self) -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    async fn sleep(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}

/// Returns the number of the call with this time.
pub(super) fn at(time: Timestamp) -> u64 {
    (time.as_microsecond() - EPOCH) as u64
}

struct Random;

impl Entropy for Random {
    fn next_u64(&self) -> u64 {
        rand::random()
    }
}

/// Returns true with a probability of `1 / n`.
fn one_in(n: u64) -> bool {
    rand::random::<u64>().is_multiple_of(n)
}

/// Switches fault injection on and off, and counts lost leases.
#[derive(Default)]
struct Faults {
    on: AtomicBool,
    leases_lost: AtomicU64,
}

impl Faults {
    fn strikes(&self, one_of: u64) -> bool {
        self.on.load(Ordering::Relaxed) && one_in(one_of)
    }
}

/// A store that loses requests, answers and leases.
pub(super) struct Faulty<K> {
    inner: Arc<K>,
    faults: Arc<Faults>,
}

impl<K: Kv> Kv for Faulty<K> {
    type Snapshot = K::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let writes = !txn.is_read_only();
        if writes && self.faults.strikes(50) {
            return Err(KvError::Ambiguous("the request was lost".to_owned()));
        }
        let answer = self.inner.txn(txn).await?;
        if writes && self.faults.strikes(50) {
            return Err(KvError::Ambiguous("the answer was lost".to_owned()));
        }
        if !writes && self.faults.strikes(100) {
            return Err(KvError::Unavailable("the store was not reached".to_owned()));
        }
        Ok(answer)
    }

    async fn page(&self, get: Get, at: Option<K::Snapshot>) -> KvResult<Page<K::Snapshot>> {
        self.inner.page(get, at).await
    }

    async fn count(&self, keys: KeyRange, at: Option<K::Snapshot>) -> KvResult<u64> {
        self.inner.count(keys, at).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        self.inner.list_and_watch(range).await
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        if self.faults.strikes(2) {
            self.faults.leases_lost.fetch_add(1, Ordering::Relaxed);
            self.inner.revoke(lease).await?;
        }
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.revoke(lease).await
    }

    /// The replicas share the inner store, so it stays open.
    async fn close(&self) {}
}

/// A provisioner that records in memory which instances run.
#[derive(Default)]
struct MemoryProvisioner {
    /// The generation of each instance, and whether it runs. Removed instances stay, so that older requests are rejected.
    instances: Mutex<BTreeMap<(ChallengeId, Identity), (u64, bool)>>,
    faults: Arc<Faults>,
}

impl MemoryProvisioner {
    fn set(&self, challenge: &ChallengeId, identity: &Identity, generation: u64, up: bool) -> Result<()> {
        let mut instances = self.instances.lock().unwrap();
        let entry = instances.entry((challenge.clone(), identity.clone())).or_insert((generation, false));
        if entry.0 > generation {
            return Err(Error::Fenced(format!("instance {identity}")));
        }
        *entry = (generation, up);
        Ok(())
    }

    async fn random_delay(&self) {
        tokio::time::sleep(Duration::from_micros(rand::random::<u64>() % 3000)).await;
    }
}

#[async_trait]
impl Provisioner for MemoryProvisioner {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.random_delay().await;
        self.set(&request.challenge, &request.identity, request.generation, true)?;
        self.random_delay().await;
        if self.faults.strikes(10) {
            return Err(Error::Provision { step: "up", detail: "injected".to_owned() });
        }
        Ok(Outputs { connection_info: request.identity.to_string(), flags: Vec::new() })
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.up(request).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        self.random_delay().await;
        self.set(challenge, identity, generation, false)
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        let instances = self.instances.lock().unwrap();
        let up = instances.iter().filter(|(_, (_, up))| *up);
        let found = up.map(|((challenge, identity), (generation, _))| ProvisionedInstance {
            challenge: challenge.clone(),
            identity: identity.clone(),
            generation: *generation,
            alive: true,
        });
        Ok(found.collect())
    }
}

#[derive(Debug)]
struct Nothing;

#[async_trait]
impl Scenarios for Nothing {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        Ok(Pinned { reference: reference.to_owned(), digest: format!("sha256:{:064}", 0) })
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

impl Facts for Nothing {
    fn record(&self, _: Fact) {}
}

/// A replica with its reconcile loop.
pub(super) struct Replica<K: Kv> {
    pub(super) gauntlet: Gauntlet,
    store: Arc<Coordination<Faulty<K>>>,
    reconciler: JoinHandle<()>,
}

/// The replicas, and an observer that is not subject to faults.
pub(super) struct World<K: Kv> {
    pub(super) replicas: Vec<Replica<K>>,
    observer: Replica<K>,
    provisioner: Arc<MemoryProvisioner>,
    faults: Arc<Faults>,
}

impl<K: Kv> World<K> {
    /// Starts the replicas. Call it within a runtime.
    pub(super) async fn start(kv: Arc<K>) -> Self {
        let faults = Arc::new(Faults::default());
        let provisioner = Arc::new(MemoryProvisioner { faults: faults.clone(), ..MemoryProvisioner::default() });
        let replica = |name: &str, faults: Arc<Faults>| {
            let faulty = Faulty { inner: kv.clone(), faults };
            let store = Arc::new(Coordination::new(faulty, "linear/", Duration::from_secs(2), name.to_owned()));
            let settings = Settings { lock_timeout: Duration::from_secs(10), ..Settings::default() };
            let gauntlet =
                Gauntlet::new(store.clone(), provisioner.clone(), Arc::new(Nothing), Arc::new(Nothing), settings);
            let reconciler = tokio::spawn(reconcile(gauntlet.clone()));
            Replica { gauntlet, store, reconciler }
        };
        let replicas = ["a", "b", "c"].map(|name| replica(name, faults.clone())).into();
        let observer = replica("observer", Arc::default());
        for (id, min) in CHALLENGES.into_iter().zip([0, POOL]) {
            let new = NewChallenge {
                id: ChallengeId::new(id).unwrap(),
                scenario: "nothing".to_owned(),
                timeout: Some(Duration::from_secs(1_000_000_000)),
                until: None,
                additional: Additional::new(),
                min,
                max: 0,
            };
            observer.gauntlet.create_challenge(&call(0), new).await.unwrap();
        }
        Self { replicas, observer, provisioner, faults }
    }

    pub(super) fn set_faults(&self, on: bool) {
        self.faults.on.store(on, Ordering::Relaxed);
    }

    pub(super) fn leases_lost(&self) -> u64 {
        self.faults.leases_lost.load(Ordering::Relaxed)
    }

    /// Returns the use cases of the observer.
    pub(super) fn observer(&self) -> &Gauntlet {
        &self.observer.gauntlet
    }

    pub(super) async fn wait_until<F: Future<Output = bool>>(&self, what: &str, mut condition: impl FnMut() -> F) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition().await {
            assert!(Instant::now() < deadline, "timed out waiting for {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until exactly the stored instances run, and only the pool is stored.
    pub(super) async fn wait_until_settled(&self) {
        self.wait_until("exactly the stored instances to run, and the pool to be full", || async {
            let mut stored = Vec::new();
            for id in CHALLENGES {
                let id = ChallengeId::new(id).unwrap();
                let store: &dyn Store = self.observer().store();
                let instances: Vec<_> = store.instances_of(&id).try_collect().await.unwrap();
                stored.extend(instances.into_iter().map(|instance| (id.clone(), instance.value.identity)));
            }
            stored.sort();
            let mut up = self.provisioner.list().await.unwrap();
            up.sort_by(|a, b| (&a.challenge, &a.identity).cmp(&(&b.challenge, &b.identity)));
            let up: Vec<_> = up.into_iter().map(|found| (found.challenge, found.identity)).collect();
            up == stored && stored.len() == POOL as usize
        })
        .await;
    }

    pub(super) async fn stop(self) {
        for replica in self.replicas.iter().chain([&self.observer]) {
            replica.reconciler.abort();
            replica.store.shutdown().await;
        }
    }
}

async fn reconcile(gauntlet: Gauntlet) {
    loop {
        // The next pass retries what failed in this one.
        let done = gauntlet.reconcile(&call(0)).await;
        for id in done.into_iter().flat_map(|done| done.pools) {
            let _ = gauntlet_testing::maintain_pool(&gauntlet, &call(0), &id).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
