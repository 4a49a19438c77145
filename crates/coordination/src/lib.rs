//! Records, owner keys, locks and indexes on etcd or one embedded store.
//!
//! [`Coordination`] implements the domain's [`Store`](gauntlet_domain::Store) once, over the narrow port [`kv::Kv`]: every promise of the
//! store is a transaction there, so that backends differ in how they keep keys and in nothing else.

// As the model of etcd names it, which is shared with the simulation.
#[cfg(test)]
extern crate self as gauntlet_coordination;

mod backoff;
#[cfg(test)]
mod contract;
mod core;
mod embedded;
mod ending;
mod etcd;
mod keys;
pub mod kv;
mod locks;
mod memory;
mod mirror;
mod names;
mod reads;
mod records;
mod session;
mod store;
mod ticket;
mod waits;

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
    memory::Memory,
    mirror::Mirror,
    session::Session,
    ticket::Reaper,
};
pub use crate::{
    embedded::Embedded,
    etcd::{Etcd, EtcdConfig, EtcdTls},
    waits::{Holder, Wait},
};

/// What every key begins with, unless told otherwise.
pub const PREFIX: &str = "gauntlet/";

/// How long a lease of the embedded store lives without being kept alive. Only a process that stood still that long loses one.
const EMBEDDED_TTL: Duration = Duration::from_secs(60);

/// How long [`Coordination::shutdown`] takes at most, and how much of that it waits for writes.
const SHUTDOWN: Duration = Duration::from_secs(5);
const SHUTDOWN_WRITES: Duration = Duration::from_millis(1500);

/// One replica's view of the coordinated store: records, ownership and locks. [`Coordination::shutdown`] gives up all it owns; dropping it
/// without that gives it up in the background, or when its lease runs out.
#[derive(Debug)]
pub struct Coordination<K: Kv> {
    core: Arc<Core<K>>,
    /// What runs in the background until `stop`.
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Coordination<Embedded> {
    /// Opens the store in one file, for one machine and one process; made if it is not there. `replica` is written beside each ownership.
    /// To be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if another process has the file open or it cannot be opened, [`Error::Internal`] if it is damaged.
    pub async fn embedded(path: &Path, replica: String) -> Result<Self> {
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || Embedded::open(&path)).await;
        let kv = opened.map_err(|error| Error::Internal(error.to_string()))??;
        Ok(Self::over(kv, PREFIX, EMBEDDED_TTL, replica))
    }
}

impl Coordination<Etcd> {
    /// On an etcd cluster, shared by replicas, each of a name of its own. Does not connect yet: while etcd is not reached, calls fail with
    /// [`Error::Unavailable`], and work as soon as it is. Every call to etcd is observed by `database`. To be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming what is wrong with the configuration.
    pub async fn etcd(config: EtcdConfig, replica: String, database: Database) -> Result<Self> {
        let prefix = config.prefix.clone();
        let ttl = config.lease_ttl;
        // Reads files.
        let made = tokio::task::spawn_blocking(move || Etcd::new(&config, database)).await;
        let kv = made.map_err(|error| Error::Internal(error.to_string()))??;
        kv.start_at(Jitter::new(&replica).next());
        Ok(Self::over(kv, &prefix, ttl, replica))
    }
}

impl<K: Kv> Coordination<K> {
    /// On any key-value store, all keys beginning with `prefix`. What it owns is lost to others `ttl` after it was last heard of. To be
    /// called within a Tokio runtime.
    pub fn over(kv: K, prefix: &str, ttl: Duration, replica: String) -> Self {
        let (this, background) = Self::with_background(kv, prefix, ttl, replica);
        tokio::spawn(background);
        this
    }

    /// The same, and what it does in the background, for the caller to run: it keeps the lease, removes what was given up, and watches. It
    /// ends after [`Coordination::shutdown`], which waits for it, or once the first is dropped.
    pub fn with_background(
        kv: K,
        prefix: &str,
        ttl: Duration,
        replica: String,
    ) -> (Self, impl Future<Output = ()> + Send + use<K>) {
        let (kv, layout) = (Arc::new(kv), Layout::new(prefix));
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let jitter = Arc::new(Jitter::new(&replica));
        let (session, keep) = Session::start(kv.clone(), ttl, jitter.clone(), stop.clone());
        let (reaper, reap) = Reaper::start(kv.clone(), jitter.clone(), stop.clone());
        let mirror = Arc::new(Mirror::default());
        let follow = mirror.clone().follow(kv.clone(), layout.live(), jitter, stop.clone());
        let background = tasks.track_future(async move {
            tokio::join!(keep, reap, follow);
        });
        let core = Core {
            kv,
            layout,
            session,
            mirror,
            memory: Memory::default(),
            names: Arc::default(),
            waits: Arc::default(),
            reaper,
            replica,
            seen: AtomicU64::new(0),
            writes: TaskTracker::new(),
            next: AtomicU64::new(0),
            reported: Mutex::new(HashMap::new()),
        };
        (Self { core: Arc::new(core), tasks, stop }, background)
    }

    /// Which store this is: a text that every replica reads and that stays for as long as the store does. `fresh` becomes it where there is
    /// none yet. One transaction.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the store does not answer; asking again is safe.
    pub async fn store_id(&self, fresh: &str) -> Result<String> {
        let key = self.core.layout.store();
        let txn = Txn {
            compare: vec![Compare::absent(KeyRange::key(&key))],
            success: vec![Op::put(&key, fresh)],
            failure: vec![Op::get(KeyRange::key(&key))],
        };
        let mut result = self.core.write(txn).await?;
        match result.next_read().into_iter().next() {
            None => Ok(fresh.to_owned()),
            Some(kv) => String::from_utf8(kv.value).map_err(|error| Error::Internal(format!("{key:?}: {error}"))),
        }
    }

    /// Who holds a challenge's lock and who waits for it, in order of asking, of every replica. Reads the store.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the store does not answer.
    pub async fn queue(&self, kind: LockKind, id: &ChallengeId) -> Result<Vec<Holder>> {
        let mut read = self.core.read(vec![Op::get(self.core.layout.queue(kind, id))]).await?;
        Ok(locks::owners(&self.core, read.next_read()).iter().map(|seen| (&seen.owner).into()).collect())
    }

    /// How many calls of this replica wait for a lock or an instance, and where those stand that have waited longest, at most `most`. Asks
    /// nobody and does not block: what it tells is as new as the watch.
    pub fn waits(&self, most: usize) -> (usize, Vec<Wait>) {
        self.core.waits.list(&self.core.mirror, most)
    }

    /// Waits for writes under way, then gives up everything owned, and closes the store; at most five seconds, of which the writes have one
    /// and a half. Nothing can be owned after it.
    pub async fn shutdown(&self) {
        self.core.writes.close();
        self.tasks.close();
        let ended = async {
            if timeout(SHUTDOWN_WRITES, self.core.writes.wait()).await.is_err() {
                tracing::warn!("writes did not end in time; their outcome is unknown");
            }
            self.stop.cancel();
            self.tasks.wait().await;
            self.core.kv.close().await;
        };
        if timeout(SHUTDOWN, ended).await.is_err() {
            tracing::warn!("the store did not shut down in time; what is owned goes with its lease");
        }
    }
}

impl<K: Kv> Drop for Coordination<K> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
