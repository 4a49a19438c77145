//! What the parts share: one replica's store, its lease, its mirror of what is owned, and its reaper.

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
    keys::Layout,
    kv::{Kv, KvError, KvResult, Txn, TxnResponse},
    memory::Memory,
    mirror::Mirror,
    names::{Name, Names},
    records::{Owner, Unreadable},
    session::{Lease, Session},
    ticket::{LiveKey, Of, Reaper, Ticket},
    waits::Waits,
};

/// Unreadable records remembered as reported.
const REPORTED: usize = 1024;

#[derive(Debug)]
pub(crate) struct Core<K> {
    pub(crate) kv: Arc<K>,
    pub(crate) layout: Layout,
    pub(crate) session: Session,
    pub(crate) mirror: Arc<Mirror>,
    pub(crate) memory: Memory,
    pub(crate) names: Arc<Names>,
    pub(crate) waits: Arc<Waits>,
    pub(crate) reaper: Reaper,
    pub(crate) replica: String,
    /// The latest revision of the store that a transaction of this replica has seen.
    pub(crate) seen: AtomicU64,
    /// Writes under way.
    pub(crate) writes: TaskTracker,
    pub(crate) next: AtomicU64,
    pub(crate) reported: Mutex<HashMap<String, u64>>,
}

impl<K: Kv> Core<K> {
    /// The domain's error for one of the store.
    pub(crate) fn error(&self, error: KvError) -> Error {
        match error {
            KvError::Permanent(detail) => Error::Internal(detail),
            error => Error::Unavailable { what: self.kv.name(), detail: error.to_string() },
        }
    }

    /// Runs a transaction.
    pub(crate) async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let result = self.kv.txn(txn).await?;
        self.seen.fetch_max(result.revision, Ordering::Relaxed);
        Ok(result)
    }

    /// Runs a write to its end, even if whoever asked stops waiting: so its outcome is always known to somebody.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        write: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        Finishing { write: Some(Box::pin(write)), writes: self.writes.clone(), _counted: self.writes.token() }.await
    }

    /// A write that takes no ownership.
    pub(crate) async fn write(self: &Arc<Self>, txn: Txn) -> Result<TxnResponse> {
        let core = self.clone();
        self.detached(async move { core.txn(txn).await.map_err(|error| core.error(error)) }).await
    }

    /// The lease to own by; waits no longer than a call may take.
    pub(crate) async fn lease(&self) -> Result<Lease> {
        let lease = timeout(self.kv.deadline(), self.session.lease()).await;
        let lease = lease.unwrap_or_else(|_| Err(KvError::Unavailable("no lease was granted in time".to_owned())));
        lease.map_err(|error| self.error(error))
    }

    /// A key under the lease; its value is told apart from every other acquisition's.
    pub(crate) fn live_key(&self, lease: Lease, by: &LockOptions, key: String, name: Option<Name>) -> LiveKey {
        let unique = format!("{:x}-{}", lease.id, self.next.fetch_add(1, Ordering::Relaxed));
        let owner =
            Owner { replica: self.replica.clone(), origin: by.traceparent.clone(), since: Timestamp::now(), unique };
        LiveKey { key, value: owner.write(), lease, name }
    }

    /// Runs a transaction that puts `live` if its compares hold (or, with `queue`, in any case). Where the lease turns out to be gone, nothing
    /// has happened: it is run once more under the next one.
    pub(crate) async fn take(
        self: &Arc<Self>,
        mut live: LiveKey,
        of: Of,
        txn: Txn,
        queue: bool,
    ) -> Result<(Option<Ticket>, TxnResponse)> {
        let core = self.clone();
        self.detached(async move {
            let mut answer = core.txn(txn.clone()).await;
            if answer == Err(KvError::LeaseNotFound) {
                live.lease.lose();
                let before = live.lease.id;
                live.lease = core.lease().await?;
                answer = core.txn(txn.with_lease(before, live.lease.id)).await;
            }
            match answer {
                Ok(result) => {
                    if !result.succeeded && !queue {
                        live.absent();
                        return Ok((None, result));
                    }
                    Ok((Some(Ticket::new(live, result.revision, of, core.reaper.clone())), result))
                }
                Err(error) => {
                    match &error {
                        KvError::Ambiguous(_) => core.reaper.give(live, true),
                        KvError::LeaseNotFound => live.lease.lose(),
                        KvError::Unavailable(_) | KvError::Compacted | KvError::Permanent(_) => live.absent(),
                    }
                    Err(core.error(error))
                }
            }
        })
        .await
    }

    /// Its key is gone: nothing is left to remove, and who waits for it here goes on.
    pub(crate) fn gone(&self, ticket: &Ticket) {
        ticket.spend();
        self.mirror.removed(&ticket.live.key, ticket.token);
    }

    /// Reports a record that cannot be read, once for each time it was written.
    pub(crate) fn report(&self, key: &str, modified: u64, unreadable: &Unreadable) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.get(key) == Some(&modified) {
            return;
        }
        if reported.len() >= REPORTED {
            reported.clear();
        }
        reported.insert(key.to_owned(), modified);
        tracing::warn!(key, revision = modified, problem = unreadable.0, "a record cannot be read and is left out");
    }
}

/// A write that its caller runs, and that becomes a task of its own when the caller stops waiting.
struct Finishing<T: Send + 'static> {
    write: Option<BoxFuture<'static, Result<T>>>,
    writes: TaskTracker,
    /// Shutting down waits for it either way.
    _counted: TaskTrackerToken,
}

impl<T: Send + 'static> Future for Finishing<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        // Taken, so that one that panics is not run on.
        let Some(mut write) = self.write.take() else {
            return Poll::Ready(Err(Error::Internal("a write was asked for its outcome twice".to_owned())));
        };
        let polled = write.as_mut().poll(context);
        if polled.is_pending() {
            self.write = Some(write);
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Finishing<T> {
    fn drop(&mut self) {
        if let Some(write) = self.write.take()
            && let Ok(runtime) = Handle::try_current()
        {
            self.writes.spawn_on(write.in_current_span(), &runtime);
        }
    }
}

/// The error for a record that was asked for by name and cannot be read.
pub(crate) fn unreadable(key: &str, problem: &Unreadable) -> Error {
    Error::Internal(format!("the record {key:?} cannot be read: {}", problem.0))
}
