//! The store against a model of a few lines, ten thousand histories, on the modelled etcd without faults.

mod records;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_coordination::{
    Coordination,
    kv::{Event, Events, Followed, Get, Keys, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResult},
};
use tokio::{sync::mpsc, time::Instant};

use crate::etcd::{Server, Snapshot};

const CASES: u32 = 10_000;
const LEASE: Duration = Duration::from_secs(10);

/// A client of the modelled etcd that is answered at once.
#[derive(Clone)]
struct Direct {
    server: Arc<Mutex<Server>>,
    began: Instant,
}

impl Direct {
    fn new() -> Self {
        Self { server: Arc::default(), began: Instant::now() }
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replica(&self, name: &str) -> Coordination<Self> {
        Coordination::over(self.clone(), "p/", LEASE, name.to_owned())
    }
}

/// Runs a history in a runtime of its own, on simulated time.
fn run<T>(history: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(history)
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

    async fn txn(&self, txn: Txn) -> KvResult<TxnResult> {
        self.server().txn(&txn).map(|(result, _)| result)
    }

    async fn page(&self, get: Get, at: Option<Snapshot>) -> KvResult<Page<Snapshot>> {
        self.server().page(&get, at.as_ref())
    }

    async fn count(&self, keys: Keys, at: Option<Snapshot>) -> KvResult<u64> {
        self.server().count(&keys, at.as_ref())
    }

    async fn follow(&self, keys: Keys) -> KvResult<Followed> {
        let (send, receive) = mpsc::unbounded_channel();
        let (revision, keys) = self.server().follow(&keys, send);
        Ok(Followed { revision, keys, events: Box::new(Watching(receive)) })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        Ok((self.server().grant(self.began.elapsed(), ttl), ttl))
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

impl Events for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async { self.0.recv().await.unwrap_or_else(|| Err(KvError::Unavailable("ended".to_owned()))) }.boxed()
    }
}
