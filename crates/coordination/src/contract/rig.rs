//! The backends under test, each behind a count of calls and a source of faults.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{db::Database, instruments::Instruments};
use tempfile::TempDir;
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};

use super::model::{Server as Model, Snapshot};
use crate::{
    Coordination, Embedded, Etcd, EtcdConfig,
    kv::{Event, EventStream, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
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
    /// It is on its way until it is let go, and its caller waits for it.
    Held,
}

/// A revision, and how often history was compacted before it was read.
#[derive(Clone)]
pub(super) struct Dated<S> {
    at: S,
    compactions: usize,
}

/// A backend that counts and fails; clones share one store.
pub(super) struct Counted<K> {
    inner: Arc<K>,
    pub(super) calls: Mutex<BTreeMap<&'static str, usize>>,
    /// The most keys that one transaction read.
    largest: AtomicUsize,
    /// What each page was asked to be the beginning of.
    pub(super) asked: Mutex<Vec<KeyRange>>,
    pub(super) faults: Mutex<VecDeque<Fault>>,
    late: Mutex<Vec<Txn>>,
    deadline: Mutex<Duration>,
    compactions: AtomicUsize,
    /// One permit for each transaction that is let go.
    let_go: Semaphore,
    kept_alive: AtomicUsize,
    keep_alive_hangs: AtomicBool,
    revoke_fails: AtomicBool,
    revoke_hangs: AtomicBool,
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
    fn asked(&self) -> Vec<KeyRange>;
    /// The most keys that one transaction read since the last reset.
    fn largest(&self) -> usize;
    /// What was read before can be read no more.
    fn compact(&self);
    /// One that is held goes on.
    fn let_go(&self);
    /// How often a lease was to be kept alive.
    fn kept_alive(&self) -> usize;
    /// From now on no lease is kept alive: calls for that are never answered.
    fn hang_keep_alive(&self);
    /// From now on no lease is revoked: calls for that fail.
    fn fail_revoke(&self);
    /// From now on no lease is revoked: calls for that are never answered.
    fn hang_revoke(&self);
}

impl<K: Kv> Tested for Counted<K> {
    fn fail_next(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }

    fn reset(&self) {
        self.calls.lock().unwrap().clear();
        self.asked.lock().unwrap().clear();
        self.largest.store(0, Ordering::SeqCst);
    }

    fn asked(&self) -> Vec<KeyRange> {
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

    fn largest(&self) -> usize {
        self.largest.load(Ordering::SeqCst)
    }

    fn compact(&self) {
        self.compactions.fetch_add(1, Ordering::SeqCst);
    }

    fn let_go(&self) {
        self.let_go.add_permits(1);
    }

    fn kept_alive(&self) -> usize {
        self.kept_alive.load(Ordering::SeqCst)
    }

    fn hang_keep_alive(&self) {
        self.keep_alive_hangs.store(true, Ordering::SeqCst);
    }

    fn fail_revoke(&self) {
        self.revoke_fails.store(true, Ordering::SeqCst);
    }

    fn hang_revoke(&self) {
        self.revoke_hangs.store(true, Ordering::SeqCst);
    }
}

impl<K: Kv> Counted<K> {
    fn over(inner: &Arc<K>) -> Self {
        Self {
            deadline: Mutex::new(inner.deadline()),
            inner: inner.clone(),
            calls: Mutex::default(),
            largest: AtomicUsize::new(0),
            asked: Mutex::default(),
            faults: Mutex::default(),
            late: Mutex::default(),
            compactions: AtomicUsize::new(0),
            let_go: Semaphore::new(0),
            kept_alive: AtomicUsize::new(0),
            keep_alive_hangs: AtomicBool::new(false),
            revoke_fails: AtomicBool::new(false),
            revoke_hangs: AtomicBool::new(false),
        }
    }

    /// The inner snapshot of one that can still be read.
    fn readable(&self, at: Option<Dated<K::Snapshot>>) -> KvResult<Option<K::Snapshot>> {
        match at {
            Some(at) if at.compactions < self.compactions.load(Ordering::SeqCst) => Err(KvError::Compacted),
            at => Ok(at.map(|at| at.at)),
        }
    }

    fn count(&self, call: &'static str) {
        *self.calls.lock().unwrap().entry(call).or_default() += 1;
    }
}

impl<K: Kv> Kv for Counted<K> {
    type Snapshot = Dated<K::Snapshot>;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        *self.deadline.lock().unwrap()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        self.count("txn");
        let fault = self.faults.lock().unwrap().pop_front();
        match fault {
            None => {
                let result = self.inner.txn(txn).await?;
                self.largest.fetch_max(result.reads.iter().map(Vec::len).sum(), Ordering::SeqCst);
                Ok(result)
            }
            Some(Fault::LostAnswer) => {
                self.inner.txn(txn).await?;
                Err(KvError::Ambiguous("injected".to_owned()))
            }
            Some(Fault::LostRequest) => Err(KvError::Ambiguous("injected".to_owned())),
            Some(Fault::LateRequest) => {
                self.late.lock().unwrap().push(txn);
                Err(KvError::Ambiguous("injected".to_owned()))
            }
            Some(Fault::Held) => {
                self.let_go.acquire().await.unwrap().forget();
                self.inner.txn(txn).await
            }
        }
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        self.count("page");
        self.asked.lock().unwrap().push(get.range.clone());
        let at = self.readable(at)?;
        let Page { kvs, more, snapshot } = self.inner.page(get, at).await?;
        Ok(Page { kvs, more, snapshot: Dated { at: snapshot, compactions: self.compactions.load(Ordering::SeqCst) } })
    }

    async fn count(&self, keys: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        self.count("count");
        let at = self.readable(at)?;
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
        self.kept_alive.fetch_add(1, Ordering::SeqCst);
        if self.keep_alive_hangs.load(Ordering::SeqCst) {
            std::future::pending().await
        }
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        if self.revoke_hangs.load(Ordering::SeqCst) {
            std::future::pending().await
        }
        if self.revoke_fails.load(Ordering::SeqCst) {
            return Err(KvError::Unavailable("injected".to_owned()));
        }
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
        Coordination::new(Counted::over(&self.kv), crate::PREFIX, ttl, name.to_owned())
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
        Coordination::new(Counted::over(&self.kv), &self.prefix, ttl, name.to_owned())
    }
}

/// The model of etcd, in real time. It yields before each call, as one that takes its time.
pub(super) struct Simulated {
    server: Mutex<Model>,
    began: Instant,
}

impl Simulated {
    async fn call<T>(&self, call: impl FnOnce(&mut Model, Duration) -> T) -> T {
        tokio::task::yield_now().await;
        let now = self.began.elapsed();
        let mut server = self.server.lock().unwrap();
        for lease in server.overdue(now) {
            server.revoke(lease);
        }
        call(&mut server, now)
    }
}

impl Kv for Simulated {
    type Snapshot = Snapshot;

    fn name(&self) -> &'static str {
        "simulated"
    }

    fn deadline(&self) -> Duration {
        Duration::from_secs(60)
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        self.call(|server, _| server.txn(&txn)).await.map(|(result, _)| result)
    }

    async fn page(&self, get: Get, at: Option<Snapshot>) -> KvResult<Page<Snapshot>> {
        self.call(|server, _| server.page(&get, at.as_ref())).await
    }

    async fn count(&self, keys: KeyRange, at: Option<Snapshot>) -> KvResult<u64> {
        self.call(|server, _| server.count(&keys, at.as_ref())).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (events, receive) = mpsc::unbounded_channel();
        let (revision, keys) = self.call(|server, _| server.list_and_watch(&range, events)).await;
        Ok(Watch { revision, keys, events: Box::new(Watching(receive)) })
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

struct Watching(mpsc::UnboundedReceiver<KvResult<Vec<Event>>>);

impl EventStream for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async { self.0.recv().await.unwrap_or_else(|| Err(KvError::Unavailable("the watch ended".to_owned()))) }.boxed()
    }
}

pub(super) struct SimulatedRig(Arc<Simulated>);

impl SimulatedRig {
    pub(super) fn start() -> Self {
        let kv = Arc::new(Simulated { server: Mutex::default(), began: Instant::now() });
        let ticking = Arc::downgrade(&kv);
        // Leases run out while nobody asks for anything, too.
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

impl Rig for SimulatedRig {
    type K = Counted<Simulated>;

    fn replica_with(&self, name: &str, ttl: Duration) -> Coordination<Self::K> {
        Coordination::new(Counted::over(&self.0), crate::PREFIX, ttl, name.to_owned())
    }
}
