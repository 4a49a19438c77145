//! Ending an ownership: the transaction that writes its outcome and gives it up.

use std::sync::Arc;

use gauntlet_domain::{ChallengeId, Error, LockGuard, LockKind, Result};

use crate::{
    core::Core,
    kv::{KeyValue, Kv, KvError, Txn, TxnResponse},
    ticket::{Of, Ticket},
};

impl<K: Kv> Core<K> {
    /// Runs the transaction that ends an ownership. If its outcome is unknown it is run once more, which is safe since it can succeed only
    /// once: if it is refused then, `applied` tells from what it read at which revision the first one had succeeded, if it had.
    pub(crate) async fn finish(
        self: &Arc<Self>,
        held: LockGuard,
        txn: Txn,
        applied: impl Fn(&[Vec<KeyValue>]) -> Option<u64> + Send + 'static,
    ) -> Result<TxnResponse> {
        if ticket(&held)?.live.lease.is_lost() {
            return Err(fenced(held.kind, held.token));
        }
        let core = self.clone();
        self.detached(async move {
            let result = match core.txn(txn.clone()).await {
                Err(KvError::Ambiguous(detail)) => {
                    tracing::warn!(detail, "the outcome of a commit is unknown, asking again");
                    core.txn(txn).await.map(|result| match applied(&result.reads) {
                        Some(revision) if !result.succeeded => TxnResponse { succeeded: true, revision, ..result },
                        _ => result,
                    })
                }
                result => result,
            };
            // Otherwise the reaper gets the key, and the work is found unfinished.
            let result = result.map_err(|error| core.error(error))?;
            if result.succeeded {
                core.gone(ticket(&held)?);
            }
            Ok(result)
        })
        .await
    }

    /// The ticket of a challenge's own lock.
    pub(crate) fn lock_on<'a>(&self, held: &'a LockGuard, id: &ChallengeId) -> Result<&'a Ticket> {
        let ticket = ticket(held)?;
        match &ticket.of {
            Of::Lock(LockKind::Challenge, locked) if locked == id => Ok(ticket),
            other => Err(Error::Internal(format!("an ownership of {other:?} is no lock on the challenge {id:?}"))),
        }
    }
}

/// Our side of an ownership.
pub(crate) fn ticket(held: &LockGuard) -> Result<&Ticket> {
    let ticket = held.grant().as_any().downcast_ref();
    ticket.ok_or_else(|| Error::Internal("the ownership is of another store".to_owned()))
}

/// The ownership was lost.
pub(crate) fn fenced(kind: LockKind, token: u64) -> Error {
    Error::Fenced(format!("{} (token {token})", kind.name()))
}
