//! Locks, first come first served, and waiting for whoever is ahead.
//!
//! Whoever wants a lock puts a key of its own beside the others; the key's revision of creation is its place in the queue. A writer waits for
//! all keys created before its own, a reader for the writers among them. Taking a free lock is one transaction.

use std::sync::Arc;

use gauntlet_domain::{By, ChallengeId, Error, Held, LockKind, LockMode, Result, Waited};
use tokio::time::{Instant, timeout_at};

use crate::{
    core::Core,
    kv::{Compare, KeyValue, Kv, Op, Txn},
    records::Owner,
    session::Lease,
    ticket::{Of, Ticket},
};

impl<K: Kv> Core<K> {
    /// Takes a lock. With no patience it never queues.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        kind: LockKind,
        id: &ChallengeId,
        mode: LockMode,
        by: &By,
    ) -> Result<Held> {
        let mut patience = Patience::new(by, || format!("the {} lock of {id:?}", kind.name()));
        let lease = self.lease().await?;
        let live = self.live_key(lease, by, |unique| self.layout.lock(kind, id, mode, unique));
        let blocking = match mode {
            LockMode::Write => self.layout.queue(kind, id),
            LockMode::Read => self.layout.queue_of(kind, id, LockMode::Write),
        };
        let queue = !by.patience.is_zero();
        let txn = Txn {
            when: vec![Compare::absent(blocking.clone())],
            then: vec![live.put()],
            or: queue.then(|| live.put()).into_iter().chain([Op::get(blocking)]).collect(),
        };
        let own = live.key.clone();
        let (ticket, mut result) = self.take(live, Of::Lock(kind, id.clone()), txn, queue).await?;
        let mut ahead = result.next_read();
        ahead.retain(|kv| kv.key != own);
        let Some(ticket) = ticket else { return Err(patience.over(ahead.len())) };
        if let Err(error) = patience.wait(self, &ticket.live.lease, ahead).await {
            // Before the answer, so that a queue left behind is never seen.
            let core = self.clone();
            self.detached(async move {
                if core.kv.txn(ticket.live.removal()).await.is_ok() {
                    ticket.spend();
                }
                Ok(())
            })
            .await?;
            return Err(error);
        }
        Ok(held(kind, ticket, patience))
    }
}

/// An ownership for the domain.
pub(crate) fn held(kind: LockKind, ticket: Ticket, patience: Patience) -> Held {
    Held::new(kind, ticket.fence, patience.waited, Box::new(ticket))
}

/// How long to wait for others, and what came of it.
pub(crate) struct Patience {
    started: Instant,
    ends: Instant,
    what: String,
    waited: Waited,
}

impl Patience {
    pub(crate) fn new(by: &By, what: impl FnOnce() -> String) -> Self {
        let started = Instant::now();
        // A patience past the end of the clock is a day.
        let ends = started.checked_add(by.patience).unwrap_or(started + std::time::Duration::from_secs(86_400));
        Self { started, ends, what: what(), waited: Waited::default() }
    }

    /// Waits until all these keys are gone. [`Error::Busy`] when patience ends first.
    pub(crate) async fn wait<K: Kv>(&mut self, core: &Core<K>, lease: &Lease, mut ahead: Vec<KeyValue>) -> Result<()> {
        ahead.sort_by_key(|kv| kv.created);
        let Some(last) = ahead.last() else { return Ok(()) };
        if !self.waited.contended {
            self.waited.contended = true;
            self.waited.queue_depth = ahead.len() as u64;
        }
        match Owner::read(&last.value) {
            Ok(owner) => self.waited.holder = owner.origin,
            Err(problem) => core.report(&last.key, last.modified, &problem),
        }
        for (gone, kv) in ahead.iter().enumerate() {
            let next = async {
                tokio::select! {
                    biased;
                    () = core.mirror.gone(&kv.key, kv.created) => Ok(()),
                    () = lease.lost() => Err(Error::Unavailable {
                        what: core.kv.name(),
                        detail: "the lease was lost while waiting".to_owned(),
                    }),
                }
            };
            match timeout_at(self.ends, next).await {
                Ok(result) => result?,
                Err(_) => return Err(self.over(ahead.len() - gone)),
            }
        }
        Ok(())
    }

    fn over(&self, ahead: usize) -> Error {
        let waited_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Error::Busy { what: self.what.clone(), waited_ms, ahead: ahead as u64 }
    }
}
