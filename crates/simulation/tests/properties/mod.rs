//! The lock and the store against models of a few lines, in ten thousand histories each, on the modelled etcd.

mod locks;
mod records;

use std::{
    collections::VecDeque,
    env,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_coordination::{
    Coordination,
    kv::{Event, EventStream, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch},
};
use proptest::{
    prelude::ProptestConfig,
    test_runner::{RngAlgorithm, RngSeed},
};
use tokio::{runtime::Runtime, sync::mpsc, task::yield_now, time::Instant};

use crate::etcd::{Server, Snapshot};

const LEASE: Duration = Duration::from_secs(10);

/// Ten thousand, the same each time; `PROPTEST_CASES` and `PROPTEST_RNG_SEED` ask for others.
fn histories() -> ProptestConfig {
    let rng_algorithm = RngAlgorithm::XorShift;
    let mut config = ProptestConfig { failure_persistence: None, rng_algorithm, ..ProptestConfig::default() };
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 10_000;
    }
    if env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(4);
    }
    config
}

/// What happens to a write that is not answered.
#[derive(Debug, Clone, Copy)]
enum Unanswered {
    Done,
    NotDone,
}

/// One replica's client of the modelled etcd. It takes no time: a write stops once before it is done and once before it is answered.
#[derive(Clone)]
struct Direct {
    server: Arc<Mutex<Server>>,
    began: Instant,
    own: Arc<Mutex<Own>>,
}

/// What is a client's own.
#[derive(Default)]
struct Own {
    /// The lease granted last.
    lease: LeaseId,
    /// What becomes of the next writes.
    faults: VecDeque<Unanswered>,
}

impl Direct {
    fn new() -> Self {
        Self { server: Arc::default(), began: Instant::now(), own: Arc::default() }
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A replica, and its client.
    fn replica(&self, name: &str) -> (Self, Arc<Coordination<Self>>) {
        let client = Self { own: Arc::default(), ..self.clone() };
        (client.clone(), Arc::new(Coordination::new(client, "p/", LEASE, name.to_owned())))
    }

    /// Ends the lease behind the replica's back.
    fn lose_lease(&self) {
        let lease = self.own().lease;
        self.server().revoke(lease);
    }
}

/// Runs a history on simulated time, in the runtime of this thread.
fn run<T>(history: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(history))
}

/// Lets everything go on that can.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

impl Kv for Direct {
    type Snapshot = Snapshot;

    fn name(&self) -> &'static str {
        "etcd"
    }

    fn deadline(&self) -> Duration {
        Duration::from_secs(5)
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        if txn.is_read_only() {
            return self.server().txn(&txn).map(|(result, _)| result);
        }
        yield_now().await;
        let fault = self.own().faults.pop_front();
        let unknown = KvError::Ambiguous("injected".to_owned());
        if matches!(fault, Some(Unanswered::NotDone)) {
            return Err(unknown);
        }
        let result = self.server().txn(&txn).map(|(result, _)| result);
        yield_now().await;
        if fault.is_some() { Err(unknown) } else { result }
    }

    async fn page(&self, get: Get, at: Option<Snapshot>) -> KvResult<Page<Snapshot>> {
        self.server().page(&get, at.as_ref())
    }

    async fn count(&self, keys: KeyRange, at: Option<Snapshot>) -> KvResult<u64> {
        self.server().count(&keys, at.as_ref())
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (send, receive) = mpsc::unbounded_channel();
        let (revision, keys) = self.server().list_and_watch(&range, send);
        Ok(Watch { revision, keys, events: Box::new(Watching(receive)) })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        let lease = self.server().grant(self.began.elapsed(), ttl);
        self.own().lease = lease;
        Ok((lease, ttl))
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.server().keep_alive(self.began.elapsed(), lease)
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.server().revoke(lease);
        Ok(())
    }

    async fn close(&self) {}
}

struct Watching(mpsc::UnboundedReceiver<KvResult<Vec<Event>>>);

impl EventStream for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async { self.0.recv().await.unwrap_or_else(|| Err(KvError::Unavailable("ended".to_owned()))) }.boxed()
    }
}
