//! Property tests: the lock and the store against small models, ten thousand histories each, on the modelled etcd.

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

/// Ten thousand cases, the same in every run. `PROPTEST_CASES` and `PROPTEST_RNG_SEED` override that.
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

/// Whether a write whose response is lost took effect.
#[derive(Debug, Clone, Copy)]
enum Unanswered {
    Done,
    NotDone,
}

/// The etcd client of one replica. Calls take no time. A write yields once before its effect and once before its response.
#[derive(Clone)]
struct Direct {
    server: Arc<Mutex<Server>>,
    began: Instant,
    own: Arc<Mutex<Own>>,
}

/// The state of one client.
#[derive(Default)]
struct Own {
    /// The last granted lease.
    lease: LeaseId,
    /// The faults of the next writes.
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

    /// Creates a replica and its client.
    fn replica(&self, name: &str) -> (Self, Arc<Coordination<Self>>) {
        let client = Self { own: Arc::default(), ..self.clone() };
        (client.clone(), Arc::new(Coordination::new(client, "p/", LEASE, name.to_owned())))
    }

    /// Revokes the lease without notifying the replica.
    fn lose_lease(&self) {
        let lease = self.own().lease;
        self.server().revoke(lease);
    }
}

/// Runs a history on simulated time, on a runtime of this thread.
fn run<T>(history: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(history))
}

/// Runs all tasks until none can make progress.
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
