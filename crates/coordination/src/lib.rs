//! Records, owner keys, locks and indexes on etcd or one embedded store.
//!
//! [`Coordination`] implements the domain's [`Store`](gauntlet_domain::Store) once, over the key-value port [`kv::Kv`]. A backend only keeps
//! keys; every guarantee of the store is a transaction on the port.

// The tests share a model of etcd with the simulation, which names this crate.
#[cfg(test)]
extern crate self as gauntlet_coordination;

mod backoff;
mod begin;
mod commit;
#[cfg(test)]
mod contract;
mod core;
mod decode;
mod embedded;
mod etcd;
mod key_slots;
mod keys;
pub mod kv;
mod live_key;
mod locks;
mod owned_key;
mod reaper;
mod records;
mod replica_cache;
mod scan;
mod session;
mod store;
mod waits;
mod watch_cache;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use gauntlet_domain::{ChallengeId, Error, LockKind, Result};
use gauntlet_telemetry::db::Database;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    backoff::Jitter,
    core::Core,
    keys::Layout,
    kv::{Compare, KeyRange, Kv, Op, Txn},
    reaper::Reaper,
    replica_cache::ReplicaCache,
    session::Session,
    watch_cache::WatchCache,
};
pub use crate::{
    embedded::Embedded,
    etcd::{Etcd, EtcdConfig, EtcdTls},
    waits::{Holder, Wait},
};

/// The default prefix of all keys.
pub const PREFIX: &str = "gauntlet/";

/// The time to live of the embedded store's lease. Only a process that is paused for that long loses it.
const EMBEDDED_TTL: Duration = Duration::from_secs(60);

/// The maximum duration of [`Coordination::shutdown`].
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of it running writes may take.
const SHUTDOWN_WRITES_TIMEOUT: Duration = Duration::from_millis(1500);

/// One replica's connection to the coordinated store of records and locks. [`Coordination::shutdown`] releases all its locks; without that
/// they are released in the background after it is dropped, or when its lease expires.
#[derive(Debug)]
pub struct Coordination<K: Kv> {
    core: Arc<Core<K>>,
    /// The background tasks, which run until `stop`.
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Coordination<Embedded> {
    /// Opens the embedded store, one file that serves one process, and creates it if it does not exist. `replica` is stored with each lock. Call
    /// within a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the file cannot be opened or is open in another process, [`Error::Internal`] if it is damaged.
    pub async fn embedded(path: &Path, replica: String) -> Result<Self> {
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || Embedded::open(&path)).await;
        let kv = opened.map_err(|error| Error::Internal(error.to_string()))??;
        Ok(Self::new(kv, PREFIX, EMBEDDED_TTL, replica))
    }
}

impl Coordination<Etcd> {
    /// Uses an etcd cluster that replicas share, each under its own name. Does not connect yet: while etcd is not reachable, calls fail with
    /// [`Error::Unavailable`]. `database` observes every call to etcd. Call within a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the configuration is wrong.
    pub async fn etcd(config: EtcdConfig, replica: String, database: Database) -> Result<Self> {
        let prefix = config.prefix.clone();
        let ttl = config.lease_ttl;
        // Blocking, because it reads certificates.
        let etcd = tokio::task::spawn_blocking(move || Etcd::new(&config, database)).await;
        let kv = etcd.map_err(|error| Error::Internal(error.to_string()))??;
        kv.start_at(Jitter::new(&replica).next());
        Ok(Self::new(kv, &prefix, ttl, replica))
    }
}

impl<K: Kv> Coordination<K> {
    /// Uses any key-value store, with keys under `prefix`. Locks are lost `ttl` after the store last heard from this replica. Call within a
    /// Tokio runtime.
    pub fn new(kv: K, prefix: &str, ttl: Duration, replica: String) -> Self {
        let (this, background) = Self::with_background(kv, prefix, ttl, replica);
        tokio::spawn(background);
        this
    }

    /// Like [`Coordination::new`], but leaves it to the caller to run the background work: renewing the lease, deleting the keys of dropped
    /// locks, and watching. It ends after [`Coordination::shutdown`], which waits for it, or when the store is dropped.
    pub fn with_background(
        kv: K,
        prefix: &str,
        ttl: Duration,
        replica: String,
    ) -> (Self, impl Future<Output = ()> + Send + use<K>) {
        let (kv, layout) = (Arc::new(kv), Layout::new(prefix));
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let jitter = Arc::new(Jitter::new(&replica));
        let (session, maintain_lease) = Session::start(kv.clone(), ttl, jitter.clone(), stop.clone());
        let (reaper, reap) = Reaper::start(kv.clone(), jitter.clone(), stop.clone());
        let watch_cache = Arc::new(WatchCache::default());
        let watch = watch_cache.clone().run(kv.clone(), layout.live(), jitter, stop.clone());
        let background = tasks.track_future(async move {
            tokio::join!(maintain_lease, reap, watch);
        });
        let core = Core {
            kv,
            layout,
            session,
            watch_cache,
            cache: ReplicaCache::default(),
            key_slots: Arc::default(),
            waits: Arc::default(),
            reaper,
            replica,
            last_revision: AtomicU64::new(0),
            writes: TaskTracker::new(),
            next_acquisition: AtomicU64::new(0),
            logged: Mutex::new(HashMap::new()),
        };
        (Self { core: Arc::new(core), tasks, stop }, background)
    }

    /// Returns the store's permanent id, which is the same for every replica. Stores `fresh` as the id of a new store. One transaction.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the store does not respond. A retry is safe.
    pub async fn store_id(&self, fresh: &str) -> Result<String> {
        let key = self.core.layout.store();
        let txn = Txn {
            compare: vec![Compare::absent(KeyRange::key(&key))],
            success: vec![Op::put(&key, fresh)],
            failure: vec![Op::get(KeyRange::key(&key))],
        };
        let mut response = self.core.write(txn).await?;
        match response.next_read().into_iter().next() {
            None => Ok(fresh.to_owned()),
            Some(kv) => String::from_utf8(kv.value).map_err(|error| Error::Internal(format!("{key:?}: {error}"))),
        }
    }

    /// Reads the holder of a challenge's lock and its waiters from the store, in queue order, across replicas.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the store does not respond.
    pub async fn queue(&self, kind: LockKind, id: &ChallengeId) -> Result<Vec<Holder>> {
        let mut response = self.core.read(vec![Op::get(self.core.layout.queue(kind, id))]).await?;
        Ok(locks::owners(&self.core, response.next_read()).iter().map(|queued| (&queued.owner).into()).collect())
    }

    /// Returns the number of calls of this replica that wait for a lock or an instance, and the `limit` oldest of these waits. Makes no request
    /// and does not block; the result is as recent as the watch.
    pub fn waits(&self, limit: usize) -> (usize, Vec<Wait>) {
        self.core.waits.list(&self.core.watch_cache, limit)
    }

    /// Waits for running writes, releases all locks and closes the store. Takes five seconds at most, of which writes get one and a half. No
    /// lock can be acquired afterwards.
    pub async fn shutdown(&self) {
        self.core.writes.close();
        self.tasks.close();
        let shutdown = async {
            if timeout(SHUTDOWN_WRITES_TIMEOUT, self.core.writes.wait()).await.is_err() {
                tracing::warn!("shutdown: writes did not finish in time, their outcome is unknown");
            }
            self.stop.cancel();
            self.tasks.wait().await;
            self.core.kv.close().await;
        };
        if timeout(SHUTDOWN_TIMEOUT, shutdown).await.is_err() {
            tracing::warn!("the store did not shut down in time, its locks are released when the lease expires");
        }
    }
}

impl<K: Kv> Drop for Coordination<K> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
