//! Locks: their kinds, how long a caller waits for one, and the guard of a lock that is held.

use std::{fmt, pin::pin, time::Duration};

use async_trait::async_trait;
use futures::future::{BoxFuture, Either, select};

use super::Outcome;
use crate::{Challenge, Error, Result};

/// What a lock protects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// A challenge's settings. No instance of the challenge is created or claimed while this lock is held.
    Challenge,
    /// The update or deletion of a challenge's instances.
    Rollout,
    /// One instance.
    Instance,
}

impl LockKind {
    /// The kind's name on spans and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Challenge => "challenge",
            Self::Rollout => "rollout",
            Self::Instance => "instance",
        }
    }
}

/// How to acquire a lock.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LockOptions {
    /// The caller's trace, in W3C traceparent form. It is stored with the lock, so that waiters can link to the holder's trace.
    pub traceparent: Option<String>,
    /// How long to wait for the current holder. Zero does not wait.
    pub timeout: Duration,
}

/// What an acquisition waited for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WaitStats {
    /// Whether the lock was held or had waiters at first.
    pub contended: bool,
    /// The number of holders and waiters ahead at first.
    pub queue_depth: u64,
    /// The trace of the last holder that was waited for, in W3C traceparent form.
    pub holder: Option<String>,
}

/// A lock that is held: one of a challenge's locks, or an instance's owner key.
///
/// A guard belongs to the store that issued it, and is consumed by releasing it. What a method writes is written in the transaction that
/// releases the lock. That transaction is refused with [`Error::Fenced`], and nothing is written, once the lock has been lost.
///
/// Dropping a guard releases the lock in the background.
///
/// # Cancel safety
/// A release that was polled once runs to its end even if its future is dropped.
pub struct LockGuard {
    /// What the lock protects.
    pub kind: LockKind,
    /// The fencing token: greater for every later acquisition in the store, and compared in every commit.
    pub token: u64,
    /// What the acquisition waited for.
    pub waited: WaitStats,
    ownership: Box<dyn Ownership>,
}

impl LockGuard {
    /// A guard over a store's own `ownership`.
    pub fn new(kind: LockKind, token: u64, waited: WaitStats, ownership: Box<dyn Ownership>) -> Self {
        Self { kind, token, waited, ownership }
    }

    /// Wraps the store's side of the guard, so that a decorator sees how the lock ends.
    #[must_use]
    pub fn wrap(self, wrap: impl FnOnce(Box<dyn Ownership>) -> Box<dyn Ownership>) -> Self {
        Self { ownership: wrap(self.ownership), ..self }
    }

    /// Resolves once the lock may have been lost.
    pub fn lost(&self) -> BoxFuture<'static, ()> {
        self.ownership.lost()
    }

    /// Runs `work`, but drops it and fails with [`Error::Fenced`] once the lock may have been lost.
    pub async fn run<T>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        match select(pin!(work), self.lost()).await {
            Either::Left((result, _)) => result,
            Either::Right(((), _)) => Err(Error::Fenced(format!("{} (token {})", self.kind.name(), self.token))),
        }
    }

    /// Releases the lock and writes nothing. Succeeds if the lock was lost.
    pub async fn release(self) -> Result<()> {
        self.ownership.commit(Change::None).await
    }

    /// Writes a challenge under its own lock. [`Error::ChallengeNotFound`] if the challenge is not stored.
    pub async fn update_challenge(self, challenge: &Challenge) -> Result<()> {
        self.ownership.commit(Change::UpdateChallenge(Box::new(challenge.clone()))).await
    }

    /// Removes the challenge that this guard locks. [`Error::Conflict`] if it has instances left.
    pub async fn remove_challenge(self) -> Result<()> {
        self.ownership.commit(Change::RemoveChallenge).await
    }

    /// Records the outcome of work on the instance that this guard owns.
    pub async fn commit(self, outcome: Outcome) -> Result<()> {
        self.ownership.commit(Change::Instance(outcome)).await
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard").field("kind", &self.kind).field("token", &self.token).finish_non_exhaustive()
    }
}

/// The store's side of a [`LockGuard`]. Dropping it releases the lock in the background.
#[async_trait]
pub trait Ownership: Send + Sync {
    /// Resolves once the lock may have been lost: the lease behind it was not renewed in time.
    fn lost(&self) -> BoxFuture<'static, ()>;

    /// Applies `change` and releases the lock, in one transaction. The methods of [`LockGuard`] say how it fails; [`Error::Internal`] if the
    /// change is not one that this lock protects.
    async fn commit(self: Box<Self>, change: Change) -> Result<()>;
}

/// What is written when a lock is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The locked challenge has these settings now.
    UpdateChallenge(Box<Challenge>),
    /// The locked challenge is removed.
    RemoveChallenge,
    /// The owned instance has this outcome.
    Instance(Outcome),
}
