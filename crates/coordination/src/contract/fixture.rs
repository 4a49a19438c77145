//! The stores that the contract suite runs on. Each fixture is a fresh store, shared by the replicas that a test starts on it.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{db::Database, instruments::Instruments};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::Instant};

use super::{
    faulty_kv::{FaultyKv, TestKv},
    model::{Server as Model, Snapshot},
};
use crate::{
    Coordination, Embedded, Etcd, EtcdConfig,
    kv::{Event, EventStream, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};

/// A fresh store for one test.
pub(super) trait Fixture {
    type K: TestKv;

    /// Starts a replica whose lease has the given time to live.
    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K>;

    /// Starts a replica with a lease that doesn't expire during a test.
    fn replica(&self, name: &str) -> Coordination<Self::K> {
        self.replica_with(name, Duration::from_secs(30))
    }
}

pub(super) struct EmbeddedFixture {
    kv: Arc<Embedded>,
    _dir: TempDir,
}

impl EmbeddedFixture {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { kv: Arc::new(Embedded::open(&dir.path().join("store")).unwrap()), _dir: dir }
    }
}

impl Fixture for EmbeddedFixture {
    type K = FaultyKv<Embedded>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::new(FaultyKv::new(&self.kv), crate::PREFIX, ttl, name.to_owned())
    }
}

/// One etcd server for all tests that run concurrently. Each test has its own key prefix.
struct SharedServer {
    server: Server,
    _dir: TempDir,
}

static SHARED: Mutex<Weak<SharedServer>> = Mutex::new(Weak::new());
static PREFIXES: AtomicUsize = AtomicUsize::new(0);

pub(super) struct EtcdFixture {
    kv: Arc<Etcd>,
    prefix: String,
    _shared: Arc<SharedServer>,
}

impl EtcdFixture {
    pub(super) fn start() -> Self {
        let shared = {
            let mut weak = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
            weak.upgrade().unwrap_or_else(|| {
                let dir = tempfile::tempdir().unwrap();
                let server = Server::start(PathBuf::from(dir.path())).expect("these tests need a real etcd");
                let shared = Arc::new(SharedServer { server, _dir: dir });
                *weak = Arc::downgrade(&shared);
                shared
            })
        };
        // The contract has no deadlines: a busy machine must not fail it. `etcd/tests.rs` covers a slow etcd.
        let config = EtcdConfig { deadline: Duration::from_secs(60), ..EtcdConfig::new([shared.server.url()]) };
        let kv = Arc::new(Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap());
        let prefix = format!("test-{}/", PREFIXES.fetch_add(1, Ordering::Relaxed));
        Self { kv, prefix, _shared: shared }
    }
}

impl Fixture for EtcdFixture {
    type K = FaultyKv<Etcd>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::new(FaultyKv::new(&self.kv), &self.prefix, ttl, name.to_owned())
    }
}

/// The simulation's model of etcd, in real time. It yields before each call, like a server that takes its time.
pub(super) struct SimulatedEtcd {
    server: Mutex<Model>,
    started: Instant,
}

impl SimulatedEtcd {
    async fn call<T>(&self, call: impl FnOnce(&mut Model, Duration) -> T) -> T {
        tokio::task::yield_now().await;
        let now = self.started.elapsed();
        let mut server = self.server.lock().unwrap();
        for lease in server.expired_leases(now) {
            server.revoke(lease);
        }
        call(&mut server, now)
    }
}

impl Kv for SimulatedEtcd {
    type Snapshot = Snapshot;

    fn name(&self) -> &'static str {
        "simulated"
    }

    fn deadline(&self) -> Duration {
        Duration::from_secs(60)
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        self.call(|server, _| server.txn(&txn)).await.map(|(response, _)| response)
    }

    async fn page(&self, get: Get, at: Option<Snapshot>) -> KvResult<Page<Snapshot>> {
        self.call(|server, _| server.page(&get, at.as_ref())).await
    }

    async fn count(&self, range: KeyRange, at: Option<Snapshot>) -> KvResult<u64> {
        self.call(|server, _| server.count(&range, at.as_ref())).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (events, receiver) = mpsc::unbounded_channel();
        let (revision, keys) = self.call(|server, _| server.list_and_watch(&range, events)).await;
        Ok(Watch { revision, keys, events: Box::new(SimulatedEvents(receiver)) })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        Ok((self.call(|server, now| server.grant(now, ttl)).await, ttl))
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.call(|server, now| server.keep_alive(now, lease)).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.call(|server, _| server.revoke(lease)).await;
        Ok(())
    }

    async fn close(&self) {}
}

struct SimulatedEvents(mpsc::UnboundedReceiver<KvResult<Vec<Event>>>);

impl EventStream for SimulatedEvents {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async { self.0.recv().await.unwrap_or_else(|| Err(KvError::Unavailable("the watch ended".to_owned()))) }.boxed()
    }
}

pub(super) struct SimulatedFixture(Arc<SimulatedEtcd>);

impl SimulatedFixture {
    pub(super) fn start() -> Self {
        let kv = Arc::new(SimulatedEtcd { server: Mutex::default(), started: Instant::now() });
        let ticking = Arc::downgrade(&kv);
        // Expires leases while no call arrives, too.
        tokio::spawn(async move {
            while let Some(kv) = ticking.upgrade() {
                kv.call(|_, _| ()).await;
                drop(kv);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self(kv)
    }
}

impl Fixture for SimulatedFixture {
    type K = FaultyKv<SimulatedEtcd>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::new(FaultyKv::new(&self.0), crate::PREFIX, ttl, name.to_owned())
    }
}
