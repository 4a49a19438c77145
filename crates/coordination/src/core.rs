//! One replica's state, shared by all modules, and the writes that outlive their callers.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use gauntlet_domain::{Error, LockOptions, Result};
use jiff::Timestamp;
use tokio::{runtime::Handle, time::timeout};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use tracing::Instrument as _;

use crate::{
    key_slots::{KeySlot, KeySlots},
    keys::Layout,
    kv::{Kv, KvError, KvResult, Txn, TxnResponse},
    live_key::LiveKey,
    owned_key::{OwnedKey, Subject},
    reaper::Reaper,
    records::{Owner, Unreadable},
    replica_cache::ReplicaCache,
    session::{Lease, Session},
    waits::Waits,
    watch_cache::WatchCache,
};

/// The number of unreadable records that are known to have been logged.
const MAX_LOGGED: usize = 1024;

#[derive(Debug)]
pub(crate) struct Core<K> {
    pub(crate) kv: Arc<K>,
    pub(crate) layout: Layout,
    pub(crate) session: Session,
    pub(crate) watch_cache: Arc<WatchCache>,
    pub(crate) cache: ReplicaCache,
    pub(crate) key_slots: Arc<KeySlots>,
    pub(crate) waits: Arc<Waits>,
    pub(crate) reaper: Reaper,
    pub(crate) replica: String,
    /// The latest revision that a transaction of this replica has returned.
    pub(crate) last_revision: AtomicU64,
    /// The writes that are running.
    pub(crate) writes: TaskTracker,
    /// Numbers the acquisitions of this replica.
    pub(crate) next_acquisition: AtomicU64,
    /// Unreadable records that were logged, each with its revision.
    pub(crate) logged: Mutex<HashMap<String, u64>>,
}

impl<K: Kv> Core<K> {
    /// The domain's error for an error of the key-value store.
    pub(crate) fn error(&self, error: KvError) -> Error {
        match error {
            KvError::Permanent(detail) => Error::Internal(detail),
            error => Error::Unavailable { what: self.kv.name(), detail: error.to_string() },
        }
    }

    /// Runs a transaction.
    pub(crate) async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let response = self.kv.txn(txn).await?;
        self.last_revision.fetch_max(response.revision, Ordering::Relaxed);
        Ok(response)
    }

    /// Runs a write to its end even if the returned future is dropped, so that its outcome never goes unnoticed.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        write: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        Detached { write: Some(Box::pin(write)), writes: self.writes.clone(), _running: self.writes.token() }.await
    }

    /// Runs a write that acquires nothing.
    pub(crate) async fn write(self: &Arc<Self>, txn: Txn) -> Result<TxnResponse> {
        let core = self.clone();
        self.detached(async move { core.txn(txn).await.map_err(|error| core.error(error)) }).await
    }

    /// The current lease. Waits for one no longer than the deadline of a call.
    pub(crate) async fn lease(&self) -> Result<Lease> {
        let lease = timeout(self.kv.deadline(), self.session.lease()).await;
        let lease = lease.unwrap_or_else(|_| Err(KvError::Unavailable("no lease was granted in time".to_owned())));
        lease.map_err(|error| self.error(error))
    }

    /// A key under the lease, with a value that no other acquisition has.
    pub(crate) fn live_key(&self, lease: Lease, options: &LockOptions, key: String, slot: Option<KeySlot>) -> LiveKey {
        let unique = format!("{:x}-{}", lease.id, self.next_acquisition.fetch_add(1, Ordering::Relaxed));
        let owner = Owner {
            replica: self.replica.clone(),
            origin: options.traceparent.clone(),
            since: Timestamp::now(),
            unique,
        };
        LiveKey { key, value: owner.write(), lease, slot }
    }

    /// Runs a transaction whose success branch puts `live`; with `enqueue`, its failure branch puts it too. If the lease has expired, nothing
    /// has happened, and the transaction is run once more under the next lease.
    pub(crate) async fn put_live(
        self: &Arc<Self>,
        mut live: LiveKey,
        subject: Subject,
        txn: Txn,
        enqueue: bool,
    ) -> Result<(Option<OwnedKey>, TxnResponse)> {
        let core = self.clone();
        self.detached(async move {
            let mut result = core.txn(txn.clone()).await;
            if result == Err(KvError::LeaseNotFound) {
                live.lease.give_up();
                let expired = live.lease.id;
                live.lease = core.lease().await?;
                result = core.txn(txn.with_lease(expired, live.lease.id)).await;
            }
            match result {
                Ok(response) => {
                    if !response.succeeded && !enqueue {
                        live.release_slot();
                        return Ok((None, response));
                    }
                    Ok((Some(OwnedKey::new(live, response.revision, subject, core.reaper.clone())), response))
                }
                Err(error) => {
                    match &error {
                        KvError::Ambiguous(_) => core.reaper.delete_pending(live),
                        KvError::LeaseNotFound => live.lease.give_up(),
                        KvError::Unavailable(_) | KvError::Compacted | KvError::Permanent(_) => live.release_slot(),
                    }
                    Err(core.error(error))
                }
            }
        })
        .await
    }

    /// Notes that an owned key is deleted, and wakes the waiters of this replica.
    pub(crate) fn mark_deleted(&self, owned: &OwnedKey) {
        owned.mark_deleted();
        self.watch_cache.mark_deleted(&owned.live.key, owned.token);
    }

    /// Logs a record that cannot be read, once for each time it was written.
    pub(crate) fn log_unreadable(&self, key: &str, mod_revision: u64, unreadable: &Unreadable) {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.get(key) == Some(&mod_revision) {
            return;
        }
        if logged.len() >= MAX_LOGGED {
            logged.clear();
        }
        logged.insert(key.to_owned(), mod_revision);
        tracing::warn!(key, revision = mod_revision, problem = unreadable.0, "cannot read a record, leaving it out");
    }
}

/// A write that its caller polls, and that is spawned as a task if the caller drops it.
struct Detached<T: Send + 'static> {
    write: Option<BoxFuture<'static, Result<T>>>,
    writes: TaskTracker,
    /// Shutdown waits for this token, regardless of which task polls the write.
    _running: TaskTrackerToken,
}

impl<T: Send + 'static> Future for Detached<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        // Taken out, so that a write that panics is not spawned.
        let Some(mut write) = self.write.take() else {
            return Poll::Ready(Err(Error::Internal("a finished write was polled again".to_owned())));
        };
        let polled = write.as_mut().poll(context);
        if polled.is_pending() {
            self.write = Some(write);
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Detached<T> {
    fn drop(&mut self) {
        if let Some(write) = self.write.take()
            && let Ok(runtime) = Handle::try_current()
        {
            self.writes.spawn_on(write.in_current_span(), &runtime);
        }
    }
}
