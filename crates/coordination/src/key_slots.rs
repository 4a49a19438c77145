//! Reusable names for the keys of lock queues.
//!
//! etcd keeps a deleted key in its index until the next compaction, and a range read walks over it. With a fresh name for each acquisition,
//! a lock would become slower with every use. Keys of the same name are told apart by their create revisions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use crate::kv::LeaseId;

/// The slots in use, by queue.
#[derive(Debug, Default)]
pub(crate) struct KeySlots {
    queues: Mutex<BTreeMap<String, QueueSlots>>,
}

#[derive(Debug)]
struct QueueSlots {
    lease: LeaseId,
    used: BTreeSet<u32>,
}

/// The name of one key in a queue. No other key of this replica has it until it is [released](KeySlot::release).
#[derive(Debug, Clone)]
pub(crate) struct KeySlot {
    slots: Arc<KeySlots>,
    queue: String,
    lease: LeaseId,
    number: u32,
}

impl KeySlots {
    /// Acquires the lowest slot of a queue that is free under a lease.
    pub(crate) fn acquire(self: &Arc<Self>, queue: &str, lease: LeaseId) -> KeySlot {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = queues.entry(queue.to_owned()).or_insert_with(|| QueueSlots { lease, used: BTreeSet::new() });
        if slots.lease != lease {
            // Keys of the previous lease have other names.
            *slots = QueueSlots { lease, used: BTreeSet::new() };
        }
        let number = (0..).find(|number| !slots.used.contains(number)).unwrap_or(u32::MAX);
        slots.used.insert(number);
        KeySlot { slots: self.clone(), queue: queue.to_owned(), lease, number }
    }
}

impl KeySlot {
    /// The slot as a word of a key.
    pub(crate) fn name(&self) -> String {
        format!("{:x}-{}", self.lease, self.number)
    }

    /// Frees the slot. Call once, after the key is confirmed absent.
    pub(crate) fn release(&self) {
        let mut queues = self.slots.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slots) = queues.get_mut(&self.queue)
            && slots.lease == self.lease
        {
            slots.used.remove(&self.number);
            if slots.used.is_empty() {
                queues.remove(&self.queue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_slot_is_reused() {
        let slots = Arc::new(KeySlots::default());
        let (one, two, other) = (slots.acquire("q", 0x2a), slots.acquire("q", 0x2a), slots.acquire("r", 0x2a));
        assert_eq!([one.name(), two.name(), other.name()], ["2a-0", "2a-1", "2a-0"]);
        one.release();
        assert_eq!(slots.acquire("q", 0x2a).name(), "2a-0");
        assert_eq!(slots.acquire("q", 0x2a).name(), "2a-2");
    }

    #[test]
    fn slots_of_different_leases_have_different_names() {
        let slots = Arc::new(KeySlots::default());
        let (before, after) = (slots.acquire("q", 1), slots.acquire("q", 2));
        assert_eq!([before.name(), after.name()], ["1-0", "2-0"]);
        before.release();
        assert_eq!(slots.acquire("q", 2).name(), "2-1", "a release under the old lease frees no slot of the new one");
    }

    #[test]
    fn queue_without_slots_is_removed() {
        let slots = Arc::new(KeySlots::default());
        slots.acquire("q", 1).release();
        assert!(slots.queues.lock().unwrap_or_else(PoisonError::into_inner).is_empty());
    }
}
