//! The backends under test, each behind a count of calls and a source of faults.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{db::Database, instruments::Instruments};
use tempfile::TempDir;

use crate::{
    Coordination, Embedded, Etcd, EtcdConfig,
    kv::{Followed, Get, Keys, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResult},
};

/// What happens to a transaction that changes something.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// It is done, and the answer is lost.
    LostAnswer,
    /// It is lost, and nobody knows.
    LostRequest,
    /// It is on its way until it is delivered, and nobody knows.
    LateRequest,
}

/// A backend that counts and fails; clones share one store.
pub(super) struct Counted<K> {
    inner: Arc<K>,
    pub(super) calls: Mutex<BTreeMap<&'static str, usize>>,
    /// What each page was asked to be the beginning of.
    pub(super) asked: Mutex<Vec<Keys>>,
    pub(super) faults: Mutex<VecDeque<Fault>>,
    late: Mutex<Vec<Txn>>,
    deadline: Mutex<Duration>,
}

/// What tests know of their backend.
pub(super) trait Tested: Kv {
    fn fail_next(&self, fault: Fault);
    fn reset(&self);
    fn calls(&self) -> BTreeMap<&'static str, usize>;
    /// From now on calls are said to take no longer than that.
    fn hurry(&self, deadline: Duration);
    /// What was late arrives.
    fn deliver(&self) -> impl Future<Output = ()> + Send;
    fn asked(&self) -> Vec<Keys>;
}

impl<K: Kv> Tested for Counted<K> {
    fn fail_next(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }

    fn reset(&self) {
        self.calls.lock().unwrap().clear();
        self.asked.lock().unwrap().clear();
    }

    fn asked(&self) -> Vec<Keys> {
        self.asked.lock().unwrap().clone()
    }

    fn calls(&self) -> BTreeMap<&'static str, usize> {
        self.calls.lock().unwrap().clone()
    }

    fn hurry(&self, deadline: Duration) {
        *self.deadline.lock().unwrap() = deadline;
    }

    async fn deliver(&self) {
        let late = std::mem::take(&mut *self.late.lock().unwrap());
        for txn in late {
            self.inner.txn(txn).await.unwrap();
        }
    }
}

impl<K: Kv> Counted<K> {
    fn over(inner: &Arc<K>) -> Self {
        Self {
            deadline: Mutex::new(inner.deadline()),
            inner: inner.clone(),
            calls: Mutex::default(),
            asked: Mutex::default(),
            faults: Mutex::default(),
            late: Mutex::default(),
        }
    }

    fn count(&self, call: &'static str) {
        *self.calls.lock().unwrap().entry(call).or_default() += 1;
    }
}

impl<K: Kv> Kv for Counted<K> {
    type Snapshot = K::Snapshot;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        *self.deadline.lock().unwrap()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResult> {
        self.count("txn");
        let fault = self.faults.lock().unwrap().pop_front();
        match fault {
            None => self.inner.txn(txn).await,
            Some(Fault::LostAnswer) => {
                self.inner.txn(txn).await?;
                Err(KvError::Ambiguous("injected".to_owned()))
            }
            Some(Fault::LostRequest) => Err(KvError::Ambiguous("injected".to_owned())),
            Some(Fault::LateRequest) => {
                self.late.lock().unwrap().push(txn);
                Err(KvError::Ambiguous("injected".to_owned()))
            }
        }
    }

    async fn page(&self, get: Get, at: Option<K::Snapshot>) -> KvResult<Page<K::Snapshot>> {
        self.count("page");
        self.asked.lock().unwrap().push(get.keys.clone());
        self.inner.page(get, at).await
    }

    async fn count(&self, keys: Keys, at: Option<K::Snapshot>) -> KvResult<u64> {
        self.count("count");
        self.inner.count(keys, at).await
    }

    async fn follow(&self, keys: Keys) -> KvResult<Followed> {
        self.count("follow");
        self.inner.follow(keys).await
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

    /// The store is the rig's.
    async fn close(&self) {}
}

/// One store of its own for a test.
pub(super) trait Rig {
    type K: Tested;

    /// Another replica on the store, whose lease lives that long.
    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K>;

    fn replica(&self, name: &str) -> Coordination<Self::K> {
        self.replica_with(name, Duration::from_secs(30))
    }
}

pub(super) struct EmbeddedRig {
    kv: Arc<Embedded>,
    _dir: TempDir,
}

impl EmbeddedRig {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { kv: Arc::new(Embedded::open(&dir.path().join("store")).unwrap()), _dir: dir }
    }
}

impl Rig for EmbeddedRig {
    type K = Counted<Embedded>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::over(Counted::over(&self.kv), crate::PREFIX, ttl, name.to_owned())
    }
}

/// An etcd for all tests that run at the same time, each under a prefix of its own.
pub(super) struct Shared {
    pub(super) server: Server,
    _dir: TempDir,
}

static SHARED: Mutex<Weak<Shared>> = Mutex::new(Weak::new());
static PREFIXES: AtomicUsize = AtomicUsize::new(0);

pub(super) struct EtcdRig {
    kv: Arc<Etcd>,
    prefix: String,
    _shared: Arc<Shared>,
}

impl EtcdRig {
    pub(super) fn start() -> Self {
        let shared = {
            let mut weak = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            weak.upgrade().unwrap_or_else(|| {
                let dir = tempfile::tempdir().unwrap();
                let server = Server::start(PathBuf::from(dir.path())).expect("these tests need a real etcd");
                let shared = Arc::new(Shared { server, _dir: dir });
                *weak = Arc::downgrade(&shared);
                shared
            })
        };
        // What comes of an etcd that is slow is tested elsewhere; here it may be as slow as the machine.
        let config = EtcdConfig { deadline: Duration::from_secs(60), ..EtcdConfig::new([shared.server.url()]) };
        let kv = Arc::new(Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap());
        let prefix = format!("test-{}/", PREFIXES.fetch_add(1, Ordering::Relaxed));
        Self { kv, prefix, _shared: shared }
    }
}

impl Rig for EtcdRig {
    type K = Counted<Etcd>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::over(Counted::over(&self.kv), &self.prefix, ttl, name.to_owned())
    }
}
