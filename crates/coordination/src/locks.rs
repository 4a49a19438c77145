//! Locks, first come first served, and waiting for whoever is ahead.
//!
//! Whoever wants a lock puts a key of its own beside the others; the key's revision of creation is its place in the queue. It waits for
//! all keys created before its own. Taking a free lock is one transaction. Between two calls of one replica that come one after the other
//! it is handed over at once, while the key of the first is being removed.

use std::sync::Arc;
use std::time::Duration;

use gauntlet_domain::{ChallengeId, Error, LockGuard, LockKind, LockOptions, Result, WaitStats};
use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};

use crate::{
    core::Core,
    kv::{Compare, Get, KeyRange, KeyValue, Kv, Op, Txn},
    records::Owner,
    session::Lease,
    ticket::{Of, Ticket},
    waits::{Behind, Entered, Holder, Seen, Waiting},
};

/// Of those ahead in a queue, how many are read: so that what a waiter costs does not grow with their number.
const SEEN: usize = 16;

impl<K: Kv> Core<K> {
    /// Takes a lock. With no patience it never queues.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        kind: LockKind,
        id: &ChallengeId,
        by: &LockOptions,
    ) -> Result<LockGuard> {
        let mut patience = Patience::new(by, kind, id, || format!("the {} lock of {id:?}", kind.name()));
        let lease = self.lease().await?;
        let queue = self.layout.queue(kind, id);
        let name = self.names.take(&queue.start, lease.id);
        let key = self.layout.lock(kind, id, &name.word());
        let live = self.live_key(lease, by, key, Some(name));
        let queues = !by.timeout.is_zero();
        let seen = Op::Get(Get { range: queue.clone(), limit: SEEN, keys_only: false });
        let txn = Txn {
            compare: vec![Compare::absent(queue.clone())],
            success: vec![live.put()],
            failure: queues.then(|| live.put()).into_iter().chain([seen]).collect(),
        };
        let own = live.key.clone();
        let (ticket, mut result) = self.take(live, Of::Lock(kind, id.clone()), txn, queues).await?;
        let mut ahead = result.next_read();
        let cut = ahead.len() == SEEN;
        ahead.retain(|kv| kv.key != own);
        let Some(ticket) = ticket else {
            let behind = Behind { queue: Some((queue, u64::MAX)), owner: None };
            let depth = ahead.len().max(if cut { self.mirror.ahead(&behind) } else { 0 });
            let holder = owners(self, ahead).first().map(|seen| (&seen.owner).into());
            return Err(patience.over(depth, holder.as_ref()));
        };
        if result.succeeded {
            return self.holding(kind, ticket, patience);
        }
        let behind = Behind { queue: Some((queue.clone(), ticket.token)), owner: None };
        let depth = ahead.len().max(if cut { self.mirror.ahead(&behind) } else { 0 });
        let entered = patience.enter(self, depth, ahead, behind.clone());
        let turn = self.mirror.turn(queue, ticket.token);
        let Some(result) = patience.until(self, &ticket.live.lease, turn).await else {
            // Where the watch has not come that far: as many as at first.
            let seen = self.mirror.holds(&ticket.live.key, ticket.token);
            let ahead = if seen { self.mirror.ahead(&behind).max(1) } else { depth };
            let over = patience.over(ahead, entered.holder(&self.mirror).as_ref());
            // Before the answer, so that a queue left behind is never seen.
            let core = self.clone();
            self.detached(async move {
                if core.kv.txn(ticket.removal()).await.is_ok() {
                    core.gone(&ticket);
                }
                Ok(())
            })
            .await?;
            return Err(over);
        };
        result?;
        drop(entered);
        self.holding(kind, ticket, patience)
    }

    /// A lock that was had; not if its lease may have run out by now, as it has where the process stood still meanwhile.
    fn holding(&self, kind: LockKind, ticket: Ticket, patience: Patience) -> Result<LockGuard> {
        if ticket.live.lease.is_lost() {
            return Err(lease_lost(self.kv.name()));
        }
        Ok(held(kind, ticket, patience))
    }
}

fn lease_lost(what: &'static str) -> Error {
    Error::Unavailable { what, detail: "the lease was lost while waiting".to_owned() }
}

/// An ownership for the domain.
pub(crate) fn held(kind: LockKind, ticket: Ticket, patience: Patience) -> LockGuard {
    LockGuard::new(kind, ticket.token, patience.waited, Box::new(ticket))
}

/// Whose these keys are, in order of creation; what cannot be read is reported and left out.
pub(crate) fn owners<K: Kv>(core: &Core<K>, mut keys: Vec<KeyValue>) -> Vec<Seen> {
    keys.sort_by_key(|kv| kv.create_revision);
    let read = |kv: KeyValue| match Owner::read(&kv.value) {
        Ok(owner) => Some(Seen { key: kv.key, created: kv.create_revision, owner }),
        Err(problem) => {
            core.report(&kv.key, kv.mod_revision, &problem);
            None
        }
    };
    keys.into_iter().filter_map(read).collect()
}

/// Who must be done before a call can go on.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Who owns the instance; one at most.
    owner: Vec<KeyValue>,
    /// The first of a queue, in order.
    first: Vec<KeyValue>,
    /// How many are in the queue.
    count: usize,
    /// The queue, as it was before that revision.
    queue: Option<(KeyRange, u64)>,
}

impl Ahead {
    /// Whoever owns an instance.
    pub(crate) fn owner(owner: Vec<KeyValue>) -> Self {
        Self { owner, ..Self::default() }
    }

    /// And a queue that was read by [`in_queue`] at that revision.
    pub(crate) fn and_queue(self, queue: KeyRange, (first, count): (Vec<KeyValue>, usize), revision: u64) -> Self {
        Self { first, count, queue: Some((queue, revision + 1)), ..self }
    }
}

/// Reads who is in a queue: the first of them, however many there are.
pub(crate) fn in_queue(queue: &KeyRange) -> Op {
    Op::Oldest { range: queue.clone(), limit: SEEN }
}

/// How long to wait for others, and what came of it.
pub(crate) struct Patience {
    started: Instant,
    ends: Instant,
    kind: LockKind,
    challenge: ChallengeId,
    what: String,
    waited: WaitStats,
}

impl Patience {
    pub(crate) fn new(
        by: &LockOptions,
        kind: LockKind,
        challenge: &ChallengeId,
        what: impl FnOnce() -> String,
    ) -> Self {
        let started = Instant::now();
        // A patience past the end of the clock is a day.
        let ends = started.checked_add(by.timeout).unwrap_or(started + Duration::from_secs(86_400));
        Self { started, ends, kind, challenge: challenge.clone(), what: what(), waited: WaitStats::default() }
    }

    /// Waits until whoever is ahead, of those that were read, is gone. [`Error::Busy`] when patience ends first.
    pub(crate) async fn wait<K: Kv>(&mut self, core: &Core<K>, ahead: Ahead) -> Result<()> {
        let Ahead { owner, first, count, queue } = ahead;
        let depth = count + owner.len();
        let mut keys = owner;
        let behind = Behind {
            owner: keys.first().map(|kv| (kv.key.clone(), kv.create_revision)),
            queue: queue.filter(|_| !first.is_empty()),
        };
        keys.extend(first);
        if keys.is_empty() {
            return Ok(());
        }
        let mut lease = core.lease().await?;
        keys.sort_by_key(|kv| kv.create_revision);
        let waits: Vec<_> = keys.iter().map(|kv| (kv.key.clone(), kv.create_revision)).collect();
        let entered = self.enter(core, depth, keys, behind);
        for (gone, (key, created)) in waits.iter().enumerate() {
            loop {
                match self.until(core, &lease, core.mirror.gone(key, *created)).await {
                    Some(Ok(())) => break,
                    // Nothing is owned under it yet: the wait goes on under the next, if one is granted.
                    Some(Err(_)) => lease = core.lease().await?,
                    None => return Err(self.over(depth.saturating_sub(gone), entered.holder(&core.mirror).as_ref())),
                }
            }
        }
        Ok(())
    }

    /// Takes note of who is ahead, and shows the wait to whoever asks for as long as the answer lives.
    fn enter<K: Kv>(&mut self, core: &Core<K>, depth: usize, ahead: Vec<KeyValue>, behind: Behind) -> Entered {
        let seen = owners(core, ahead);
        if !self.waited.contended {
            self.waited.contended = true;
            self.waited.queue_depth = depth as u64;
        }
        self.waited.holder = seen.last().and_then(|seen| seen.owner.origin.clone());
        let (kind, challenge) = (self.kind, self.challenge.clone());
        core.waits.enter(Waiting { kind, challenge, since: Timestamp::now(), behind, seen })
    }

    /// `None` when patience ends first.
    async fn until<K: Kv>(&self, core: &Core<K>, lease: &Lease, turn: impl Future<Output = ()>) -> Option<Result<()>> {
        let turn = async {
            tokio::select! {
                biased;
                () = turn => Ok(()),
                () = lease.lost() => Err(lease_lost(core.kv.name())),
            }
        };
        timeout_at(self.ends, turn).await.ok()
    }

    fn over(&self, ahead: usize, holder: Option<&Holder>) -> Error {
        let waited_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let held =
            holder.map_or(String::new(), |Holder { replica, since, .. }| format!(" (held by {replica} since {since})"));
        Error::Busy { what: format!("{}{held}", self.what), waited_ms, ahead: ahead as u64 }
    }
}
