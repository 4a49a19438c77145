//! Live keys that are in the store: held locks, places in a lock's queue, and owner keys of instances.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};

use gauntlet_domain::{ChallengeId, Instance, LockKind};

use crate::{
    kv::{Compare, Op, Txn},
    live_key::LiveKey,
    reaper::Reaper,
};

/// What an owned key protects.
#[derive(Debug, Clone)]
pub(crate) enum Subject {
    /// A challenge, by a lock or a place in its queue.
    Lock(LockKind, ChallengeId),
    /// An instance, with its record at the time it was acquired, from which its index keys follow.
    Instance(Box<Instance>),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lock(kind, id) => write!(f, "the {} lock of {id:?}", kind.name()),
            Self::Instance(instance) => {
                write!(f, "the owner key of the instance {:?} of {:?}", instance.key.assignment, instance.key.challenge)
            }
        }
    }
}

/// A live key that is in the store. Dropping it hands the key to the reaper.
#[derive(Debug)]
pub(crate) struct OwnedKey {
    pub(crate) live: LiveKey,
    /// The key's create revision, which is the fencing token.
    pub(crate) token: u64,
    pub(crate) subject: Subject,
    reaper: Reaper,
    deleted: AtomicBool,
    /// Whether a transaction was built that compares this key. It may still be in flight when its caller has given up.
    compared: AtomicBool,
}

impl OwnedKey {
    pub(crate) fn new(live: LiveKey, token: u64, subject: Subject, reaper: Reaper) -> Self {
        Self { live, token, subject, reaper, deleted: AtomicBool::new(false), compared: AtomicBool::new(false) }
    }

    /// Notes that the key is gone, so that nothing is left to delete.
    pub(crate) fn mark_deleted(&self) {
        if !self.deleted.swap(true, Ordering::AcqRel) {
            self.live.release_slot();
        }
    }

    /// Holds in the store as long as this acquisition owns the key.
    pub(crate) fn still_owned(&self) -> Compare {
        self.compared.store(true, Ordering::Release);
        Compare::create_revision(&self.live.key, self.token)
    }

    /// Whether no transaction can depend on this key.
    pub(crate) fn is_unused(&self) -> bool {
        !self.compared.load(Ordering::Acquire)
    }

    /// Deletes the key, whatever was written under it.
    pub(crate) fn deletion(&self) -> Txn {
        Txn {
            compare: vec![Compare::create_revision(&self.live.key, self.token)],
            success: vec![Op::delete(&self.live.key)],
            failure: Vec::new(),
        }
    }
}

impl Drop for OwnedKey {
    fn drop(&mut self) {
        if !self.deleted.load(Ordering::Acquire) {
            self.reaper.delete(self.live.clone());
        }
    }
}
