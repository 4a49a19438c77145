//! Keys under this replica's lease.

use crate::{
    key_slots::KeySlot,
    kv::{Compare, Op, Txn},
    session::Lease,
};

/// A key under the lease. Its value is unique to one acquisition.
#[derive(Debug, Clone)]
pub(crate) struct LiveKey {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
    pub(crate) lease: Lease,
    /// The reusable part of the key's name.
    pub(crate) slot: Option<KeySlot>,
}

impl LiveKey {
    pub(crate) fn put(&self) -> Op {
        Op::Put { key: self.key.clone(), value: self.value.clone(), lease: Some(self.lease.id) }
    }

    /// Lets another acquisition use the key's name. Call only after the key is confirmed absent.
    pub(crate) fn release_slot(&self) {
        if let Some(slot) = &self.slot {
            slot.release();
        }
    }

    /// Deletes the key if it is still this acquisition's.
    pub(crate) fn deletion(&self) -> Txn {
        Txn {
            compare: vec![Compare::value(&self.key, self.value.clone())],
            success: vec![Op::delete(&self.key)],
            failure: Vec::new(),
        }
    }
}
