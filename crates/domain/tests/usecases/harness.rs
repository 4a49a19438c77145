//! The use cases over an embedded store with faults, and over fakes of the other ports.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, TryStreamExt as _};
use gauntlet_coordination::{
    Coordination, Embedded,
    kv::{Condition, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{
    Additional, Call, ChallengeId, ChallengeUpdate, Error, Gauntlet, Instance, LockGuard, LockKind, LockOptions,
    NewChallenge, Result, Settings, Store as _, Strategy,
};
use gauntlet_testing::{
    call::{ManualClock, call},
    eventually,
    fakes::{FakeProvisioner, FakeScenarios, ProvisionerCall, RecordedFacts},
    fixtures::{self, challenge_id, source_id, source_key, timestamp},
    gate::{self, Gate, Gates},
};
use tempfile::TempDir;
use tokio::task::JoinHandle;

pub const ALICE: &str = "alice";
pub const BOB: &str = "bob";

/// Longer than anything takes here, unless it hangs.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a call waits for locks. Longer than [`TEST_TIMEOUT`], so that only the manual clock ends such a wait.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(70);
/// How long an instance lives, in seconds.
pub const INSTANCE_TIMEOUT: i64 = 1000;

/// Awaits a future, and fails the test if it hangs.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    gate::within(TEST_TIMEOUT, what, future).await
}

/// The reference of a version of the scenario.
pub fn reference(version: u8) -> String {
    format!("registry.test/web:{version}")
}

/// The digest to which [`reference`] resolves.
pub fn digest(version: u8) -> String {
    fixtures::digest(&reference(version))
}

/// What the store does besides its work.
#[derive(Debug, Default)]
struct StoreFaults {
    gates: Gates,
    /// Reads of nothing but a challenge fail.
    challenges_unreadable: AtomicBool,
    /// Every key that a write compares by revision is rewritten just before.
    always_conflict: AtomicBool,
}

const REMOVE_CHALLENGE: &str = "remove a challenge";
const REWRITE_INSTANCE: &str = "rewrite an instance";

/// An embedded store with faults.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Embedded,
    faults: Arc<StoreFaults>,
}

impl Kv for FaultyStore {
    type Snapshot = <Embedded as Kv>::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let removes = |op: &Op| matches!(op, Op::Delete(keys) if keys.start.contains("/challenges "));
        if txn.success.iter().any(removes) {
            self.faults.gates.pass(REMOVE_CHALLENGE).await;
        }
        if txn.compare.iter().any(|compare| matches!(compare.condition, Condition::ModRevisionAtMost(_))) {
            self.faults.gates.pass(REWRITE_INSTANCE).await;
        }
        let reads_challenge = |op: &Op| matches!(op, Op::Get(get) if get.range.start.contains("/challenges "));
        if self.faults.challenges_unreadable.load(Ordering::Relaxed) && txn.success.iter().all(reads_challenge) {
            return Err(KvError::Unavailable("reading a challenge is refused".to_owned()));
        }
        if self.faults.always_conflict.load(Ordering::Relaxed) {
            let by_revision = txn.compare.iter().filter(|compare| {
                matches!(compare.condition, Condition::ModRevision(_) | Condition::ModRevisionAtMost(_))
            });
            for compare in by_revision {
                let get = Get { range: compare.range.clone(), limit: 0, keys_only: false };
                let page = self.inner.page(get, None).await?;
                let success = page.kvs.into_iter().map(|kv| Op::put(kv.key, kv.value)).collect();
                self.inner.txn(Txn { success, ..Txn::default() }).await?;
            }
        }
        self.inner.txn(txn).await
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        self.inner.page(get, at).await
    }

    async fn count(&self, keys: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        self.inner.count(keys, at).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
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

/// Ports that other programs take.
#[derive(Debug, Default)]
pub struct Ports {
    to_take: AtomicU64,
    reservations: AtomicU64,
}

impl Ports {
    /// Makes the next `launches` fail because another program has taken a port.
    pub fn take(&self, launches: u64) {
        self.to_take.store(launches, Ordering::Relaxed);
    }

    /// How many reservations were made since the last call of this.
    pub fn take_reservations(&self) -> u64 {
        self.reservations.swap(0, Ordering::Relaxed)
    }

    fn admit(&self, call: &ProvisionerCall) -> Result<()> {
        match call.operation {
            "reserve" => {
                self.reservations.fetch_add(1, Ordering::Relaxed);
            }
            "up" | "update" => {
                let to_take = self.to_take.load(Ordering::Relaxed);
                self.to_take.store(to_take.saturating_sub(1), Ordering::Relaxed);
                if to_take > 0 {
                    return Err(Error::PortTaken { port: 20_000, detail: "address in use".to_owned() });
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The use cases, their ports, and one challenge.
pub struct Harness {
    pub gauntlet: Gauntlet,
    pub store: Arc<Coordination<FaultyStore>>,
    pub provisioner: Arc<FakeProvisioner>,
    /// The ports that the provisioner reserves.
    pub ports: Arc<Ports>,
    pub scenarios: Arc<FakeScenarios>,
    pub facts: Arc<RecordedFacts>,
    pub call: Call,
    /// The clock of `call`.
    pub clock: Arc<ManualClock>,
    /// The challenge.
    pub web: ChallengeId,
    faults: Arc<StoreFaults>,
    _dir: TempDir,
}

impl Harness {
    /// With a challenge whose pool keeps at least `min` instances.
    pub async fn with_challenge(min: i64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let faults = Arc::new(StoreFaults::default());
        let inner = Embedded::open(&dir.path().join("store")).unwrap();
        let kv = FaultyStore { inner, faults: faults.clone() };
        let store = Arc::new(Coordination::new(kv, "test/", TEST_TIMEOUT, "a".to_owned()));
        let ports = Arc::new(Ports::default());
        let provisioner = FakeProvisioner::default().before({
            let ports = ports.clone();
            move |call| std::future::ready(ports.admit(&call)).boxed()
        });
        let provisioner = Arc::new(provisioner);
        let facts = Arc::new(RecordedFacts::default());
        // One instance after the other, so that tests can hold the first.
        let settings = Settings { concurrency: 1, lock_timeout: LOCK_TIMEOUT, ..Settings::default() };
        let scenarios = Arc::new(FakeScenarios::default());
        let gauntlet = Gauntlet::new(store.clone(), provisioner.clone(), scenarios.clone(), facts.clone(), settings);
        let clock = Arc::new(ManualClock::default());
        let call = Call { clock: clock.clone(), ..call() };
        let web = challenge_id("web");
        let harness =
            Self { gauntlet, store, provisioner, ports, scenarios, facts, call, clock, web, faults, _dir: dir };
        harness.create_challenge(min).await;
        harness
    }

    /// With a challenge and an instance of it for [`ALICE`].
    pub async fn with_instance() -> Self {
        let harness = Self::with_challenge(0).await;
        harness.create(ALICE).await;
        harness
    }

    pub async fn create_challenge(&self, min: i64) {
        let challenge = NewChallenge {
            scenario: reference(1),
            timeout: Some(Duration::from_secs(INSTANCE_TIMEOUT.unsigned_abs())),
            ..fixtures::new_challenge(self.web.as_str(), min)
        };
        self.gauntlet.create_challenge(&self.call, challenge).await.unwrap();
    }

    pub async fn try_create(&self, source: &str) -> Result<Instance> {
        self.gauntlet.create_instance(&self.call, &self.web, &source_id(source), Additional::new()).await
    }

    pub async fn create(&self, source: &str) -> Instance {
        self.try_create(source).await.unwrap()
    }

    pub async fn delete(&self, source: &str) -> Result<()> {
        self.gauntlet.delete_instance(&self.call, &self.web, &source_id(source)).await
    }

    pub async fn maintain_pool(&self) {
        gauntlet_testing::maintain_pool(&self.gauntlet, &self.call, &self.web).await.unwrap();
    }

    /// A call that happens at `second`.
    pub fn call_at(&self, second: i64) -> Call {
        Call { now: timestamp(second), ..self.call.clone() }
    }

    /// The stored instance of a source.
    pub async fn stored(&self, source: &str) -> Option<Instance> {
        let key = source_key(self.web.as_str(), source);
        self.store.instance(&key).await.unwrap().map(|stored| stored.value)
    }

    /// The stored instances of the pool.
    pub async fn pooled(&self) -> Vec<Instance> {
        let all: Vec<_> = self.store.instances_of(&self.web).try_collect().await.unwrap();
        all.into_iter().map(|stored| stored.value).filter(|instance| instance.key.assignment.is_pooled()).collect()
    }

    /// Runs a use case in a task of its own.
    pub fn spawn<T, F>(&self, work: impl FnOnce(Gauntlet, Call, ChallengeId) -> F) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        tokio::spawn(work(self.gauntlet.clone(), self.call.clone(), self.web.clone()))
    }

    /// Takes a lock of the challenge in a task of its own.
    pub fn lock(&self, kind: LockKind) -> JoinHandle<LockGuard> {
        let (store, web) = (self.store.clone(), self.web.clone());
        let options = LockOptions { timeout: TEST_TIMEOUT, ..LockOptions::default() };
        tokio::spawn(async move { store.lock(kind, &web, &options).await.unwrap() })
    }

    /// Waits until the queue of a lock, its holder included, has this length.
    pub async fn wait_for_queue(&self, kind: LockKind, length: usize) {
        eventually("the queue has the expected length", async || {
            self.store.queue(kind, &self.web).await.unwrap().len() == length
        })
        .await;
    }

    /// Makes every write that compares a revision conflict from now on, or no longer.
    pub fn always_conflict(&self, always: bool) {
        self.faults.always_conflict.store(always, Ordering::Relaxed);
    }

    /// Stops the next removal of a challenge until the gate is opened.
    pub fn hold_removal(&self) -> Gate {
        self.faults.gates.close(REMOVE_CHALLENGE)
    }

    /// Stops the next conditional write of an instance until the gate is opened.
    pub fn hold_rewrite(&self) -> Gate {
        self.faults.gates.close(REWRITE_INSTANCE)
    }

    /// Makes reads of nothing but a challenge fail from now on.
    pub fn make_challenges_unreadable(&self) {
        self.faults.challenges_unreadable.store(true, Ordering::Relaxed);
    }
}

/// An update to another version of the scenario.
pub fn update(version: u8, strategy: Strategy) -> ChallengeUpdate {
    ChallengeUpdate { scenario: Some(reference(version)), strategy, ..ChallengeUpdate::default() }
}
