//! Three replicas over one store in this process, with injected faults between them and the store, and a fake provisioner.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, TryStreamExt as _};
use gauntlet_coordination::{
    Coordination,
    kv::{Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};
use gauntlet_domain::{Additional, Call, ChallengeId, Error, Gauntlet, NewChallenge, Settings, Store};
use gauntlet_testing::{
    call::{SeededEntropy, SystemClock},
    eventually,
    fakes::{FakeProvisioner, FakeScenarios, IgnoredFacts},
    fixtures::REFERENCE,
    maintain_pool,
};
use jiff::Timestamp;
use tokio::task::JoinHandle;

/// A challenge without a pool, and one with.
pub(super) const CHALLENGES: [&str; 2] = ["plain", "pooled"];
const POOL: i64 = 2;
/// The time of call 0, in microseconds since 1970. It is in the past, as are the times of all calls of a test.
const EPOCH: i64 = 1_700_000_000_000_000;

/// Returns a call whose time is its number of microseconds after [`EPOCH`].
pub(super) fn call_at(number: u64) -> Call {
    let now = Timestamp::from_microsecond(EPOCH + number as i64).unwrap();
    let entropy = Arc::new(SeededEntropy::new(rand::random()));
    Call { now, traceparent: None, entropy, clock: Arc::new(SystemClock) }
}

/// Returns the number of the call with this time.
pub(super) fn call_number(time: Timestamp) -> u64 {
    (time.as_microsecond() - EPOCH) as u64
}

/// Decides which operations fail, and counts the leases that were lost.
#[derive(Default)]
struct Faults {
    enabled: AtomicBool,
    leases_lost: AtomicU64,
}

impl Faults {
    /// Returns true for one of `n` operations, at random, while faults are enabled.
    fn one_in(&self, n: u64) -> bool {
        self.enabled.load(Ordering::Relaxed) && rand::random::<u64>().is_multiple_of(n)
    }
}

/// A store that loses requests, responses and leases.
pub(super) struct FaultyKv<K> {
    inner: Arc<K>,
    faults: Arc<Faults>,
}

impl<K: Kv> Kv for FaultyKv<K> {
    type Snapshot = K::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let writes = !txn.is_read_only();
        if writes && self.faults.one_in(50) {
            return Err(KvError::Ambiguous("the request was lost".to_owned()));
        }
        let response = self.inner.txn(txn).await?;
        if writes && self.faults.one_in(50) {
            return Err(KvError::Ambiguous("the response was lost".to_owned()));
        }
        if !writes && self.faults.one_in(100) {
            return Err(KvError::Unavailable("the store was not reached".to_owned()));
        }
        Ok(response)
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
        if self.faults.one_in(2) {
            self.faults.leases_lost.fetch_add(1, Ordering::Relaxed);
            self.inner.revoke(lease).await?;
        }
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.inner.revoke(lease).await
    }

    /// Does nothing: the replicas share the store.
    async fn close(&self) {}
}

/// Returns a provisioner that takes up to 3 ms before and after each step, and fails one of ten launches while faults are enabled.
fn provisioner(faults: Arc<Faults>) -> FakeProvisioner {
    let delay = || tokio::time::sleep(Duration::from_micros(rand::random::<u64>() % 3000));
    FakeProvisioner::default()
        .before(move |call| {
            async move {
                if matches!(call.operation, "up" | "update" | "down") {
                    delay().await;
                }
                Ok(())
            }
            .boxed()
        })
        .after(move |call| {
            let faults = faults.clone();
            async move {
                if matches!(call.operation, "up" | "update") {
                    delay().await;
                    if faults.one_in(10) {
                        return Err(Error::Provision { step: "up", detail: "injected".to_owned() });
                    }
                }
                Ok(())
            }
            .boxed()
        })
}

pub(super) struct Replica<K: Kv> {
    pub(super) gauntlet: Gauntlet,
    store: Arc<Coordination<FaultyKv<K>>>,
    reconciler: JoinHandle<()>,
}

/// Three replicas with faults, and a fourth without faults through which the test observes the store.
pub(super) struct World<K: Kv> {
    pub(super) replicas: Vec<Replica<K>>,
    observer: Replica<K>,
    provisioner: Arc<FakeProvisioner>,
    faults: Arc<Faults>,
}

impl<K: Kv> World<K> {
    /// Starts the replicas and their reconcilers, and creates the challenges.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) async fn start(kv: Arc<K>) -> Self {
        let faults = Arc::new(Faults::default());
        let provisioner = Arc::new(provisioner(faults.clone()));
        let replica = |name: &str, faults: Arc<Faults>| {
            let faulty = FaultyKv { inner: kv.clone(), faults };
            let store = Arc::new(Coordination::new(faulty, "linear/", Duration::from_secs(2), name.to_owned()));
            let settings = Settings { lock_timeout: Duration::from_secs(10), ..Settings::default() };
            let gauntlet = Gauntlet::new(
                store.clone(),
                provisioner.clone(),
                Arc::new(FakeScenarios::default()),
                Arc::new(IgnoredFacts),
                settings,
            );
            let reconciler = tokio::spawn(reconcile(gauntlet.clone()));
            Replica { gauntlet, store, reconciler }
        };
        let replicas = ["a", "b", "c"].map(|name| replica(name, faults.clone())).into();
        let observer = replica("observer", Arc::default());
        for (id, min) in CHALLENGES.into_iter().zip([0, POOL]) {
            let new = NewChallenge {
                id: ChallengeId::new(id).unwrap(),
                scenario: REFERENCE.to_owned(),
                timeout: Some(Duration::from_secs(1_000_000_000)),
                until: None,
                additional: Additional::new(),
                min,
                max: 0,
            };
            observer.gauntlet.create_challenge(&call_at(0), new).await.unwrap();
        }
        Self { replicas, observer, provisioner, faults }
    }

    pub(super) fn inject_faults(&self, enabled: bool) {
        self.faults.enabled.store(enabled, Ordering::Relaxed);
    }

    pub(super) fn leases_lost(&self) -> u64 {
        self.faults.leases_lost.load(Ordering::Relaxed)
    }

    /// Returns the replica without faults.
    pub(super) fn observer(&self) -> &Gauntlet {
        &self.observer.gauntlet
    }

    /// Waits until the instances that run are those in the store, and these are a full pool and no other.
    pub(super) async fn wait_until_consistent(&self) {
        eventually("the running instances are those stored, and the pool is full", async || {
            let mut stored = Vec::new();
            for id in CHALLENGES {
                let id = ChallengeId::new(id).unwrap();
                let store: &dyn Store = self.observer().store();
                let instances: Vec<_> = store.instances_of(&id).try_collect().await.unwrap();
                stored.extend(instances.into_iter().map(|instance| (id.clone(), instance.value.identity)));
            }
            stored.sort();
            let running: Vec<_> = self.provisioner.instances().into_keys().collect();
            running == stored && stored.len() == POOL as usize
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
        // The next pass retries what failed.
        let reconciled = gauntlet.reconcile(&call_at(0)).await;
        for id in reconciled.into_iter().flat_map(|reconciled| reconciled.pools) {
            let _ = maintain_pool(&gauntlet, &call_at(0), &id).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
