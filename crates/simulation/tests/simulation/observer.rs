//! Checks mutual exclusion as the managers see it: a manager counts as holding a lock from the time it gets the guard until it releases the
//! guard, or until the guard reports that the lock may be lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::{Acquired, ChallengeId, Change, LockGuard, LockKind, LockLayer, Ownership, Result};

use super::{
    coverage::Event,
    process::Process,
    world::{State, World},
};
use crate::etcd::{Change as EtcdChange, Server};

/// A manager that has the guard of a lock.
struct Holder {
    lock: (&'static str, ChallengeId),
    process: Arc<Process>,
    /// Resolves when the guard reports that the lock may be lost.
    lost: Mutex<BoxFuture<'static, ()>>,
}

/// The holders of locks, as the managers see them.
#[derive(Default)]
pub struct Observer {
    /// By fencing token.
    holders: BTreeMap<u64, Holder>,
    /// The last token that was issued for each lock.
    last: BTreeMap<(&'static str, ChallengeId), u64>,
    /// Tokens whose lease etcd lost early, which their holders cannot know yet.
    lost_early: BTreeSet<u64>,
}

impl Observer {
    /// Records that a manager acquires a guard. Returns whether an earlier holder is paused or has ended, so that
    /// it can't notice that its lease has expired.
    fn acquired(&mut self, etcd: &Server, token: u64, holder: Holder) -> std::result::Result<bool, String> {
        let exists = |token: u64| {
            etcd.entries().any(|(key, entry)| entry.create_revision == token && key.contains("live locks"))
        };
        if self.lost_early.contains(&token) {
            return Ok(false);
        }
        let name = &holder.process.name;
        if !exists(token) {
            return Err(format!("{name} acquires {:?} ({token}), but its key does not exist", holder.lock));
        }
        let last = self.last.insert(holder.lock.clone(), token).unwrap_or(0);
        if last >= token {
            return Err(format!("{:?}: token {token} is issued after {last}", holder.lock));
        }
        let (mut ended, mut after_paused) = (Vec::new(), false);
        for (before, other) in self.holders.iter().filter(|(_, other)| other.lock == holder.lock) {
            ended.push(*before);
            let knows = other.lost.lock().unwrap().as_mut().now_or_never().is_some();
            let other_name = &other.process.name;
            if knows || self.lost_early.contains(before) {
                continue;
            }
            if other.process.runs() && !other.process.resumed_now() {
                return Err(format!("{:?} is held by {name} ({token}) and by {other_name} ({before})", holder.lock));
            }
            // A paused manager cannot learn anything, but its lease must have expired.
            if exists(*before) {
                let lock = &holder.lock;
                return Err(format!(
                    "{lock:?}: {name} ({token}) acquires it while the key of {other_name} ({before}) exists"
                ));
            }
            after_paused = true;
        }
        ended.iter().for_each(|token| self.released(*token));
        self.holders.insert(token, holder);
        Ok(after_paused)
    }

    /// Records that a manager starts to release a lock.
    fn released(&mut self, token: u64) {
        self.holders.remove(&token);
    }

    /// Records that etcd lost a lease early and deleted these keys.
    pub fn lost_early(&mut self, deleted: &[EtcdChange]) {
        self.lost_early.extend(deleted.iter().filter_map(|change| Some(change.before.as_ref()?.create_revision)));
    }
}

/// Reports the challenge locks of one manager to the observer.
pub struct ObservedLocks(pub Arc<Process>);

impl LockLayer for ObservedLocks {
    async fn acquire<T: Acquired>(
        &self,
        kind: LockKind,
        challenge: &ChallengeId,
        acquisition: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let acquired = acquisition.await?;
        match kind {
            LockKind::Instance => Ok(acquired),
            LockKind::Challenge | LockKind::Rollout => Ok(acquired.map_guard(|guard| self.observe(challenge, guard))),
        }
    }
}

impl ObservedLocks {
    fn observe(&self, challenge: &ChallengeId, guard: LockGuard) -> LockGuard {
        let (world, token) = (&self.0.world, guard.token);
        let holder = Holder {
            lock: (guard.kind.name(), challenge.clone()),
            process: self.0.clone(),
            lost: Mutex::new(guard.lost()),
        };
        let acquired = {
            let mut state = world.lock();
            let State { observer, etcd, .. } = &mut *state;
            let acquired = observer.acquired(etcd, token, holder);
            state.count(Event::Acquired);
            if acquired == Ok(true) {
                state.count(Event::AcquiredBehind);
            }
            acquired
        };
        world.check(acquired.map(|_| ()).map_err(|problem| format!("exclusion: {problem}")));
        let holding = Holding(world.clone(), token);
        guard.wrap(|inner| Box::new(ObservedOwnership { inner, holding }))
    }
}

struct ObservedOwnership {
    inner: Box<dyn Ownership>,
    holding: Holding,
}

#[async_trait]
impl Ownership for ObservedOwnership {
    fn lost(&self) -> BoxFuture<'static, ()> {
        self.inner.lost()
    }

    async fn commit(self: Box<Self>, change: Change) -> Result<()> {
        let Self { inner, holding } = *self;
        // The next holder may get the lock before this one gets the response.
        drop(holding);
        inner.commit(change).await
    }
}

/// Dropped when the manager starts to release the lock.
struct Holding(Arc<World>, u64);

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.lock().observer.released(self.1);
    }
}
