//! Names for the keys of queues, used again and again.
//!
//! What is deleted stays in etcd's index until it is compacted, and a range walks over it. Were each acquisition's name a new one, taking a
//! lock would cost the more the more often it had been taken. Keys are told apart by their revision of creation, not by name.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use crate::kv::LeaseId;

/// The names that this replica uses, by queue.
#[derive(Debug, Default)]
pub(crate) struct Names {
    used: Mutex<BTreeMap<String, Used>>,
}

#[derive(Debug)]
struct Used {
    lease: LeaseId,
    numbers: BTreeSet<u32>,
}

/// A name that no other key of ours has. Unless it is [freed](Name::free), it is not given again under its lease.
#[derive(Debug, Clone)]
pub(crate) struct Name {
    names: Arc<Names>,
    queue: String,
    lease: LeaseId,
    number: u32,
}

impl Names {
    /// The first name of that queue that is not in use under that lease.
    pub(crate) fn take(self: &Arc<Self>, queue: &str, lease: LeaseId) -> Name {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let used = used.entry(queue.to_owned()).or_insert_with(|| Used { lease, numbers: BTreeSet::new() });
        if used.lease != lease {
            // What was under the last one is gone, or has another name.
            *used = Used { lease, numbers: BTreeSet::new() };
        }
        let number = (0..).find(|number| !used.numbers.contains(number)).unwrap_or(u32::MAX);
        used.numbers.insert(number);
        Name { names: self.clone(), queue: queue.to_owned(), lease, number }
    }
}

impl Name {
    /// As a word of a key.
    pub(crate) fn word(&self) -> String {
        format!("{:x}-{}", self.lease, self.number)
    }

    /// Makes it free for others. To be called once, by who knows that no key has it.
    pub(crate) fn free(&self) {
        let mut all = self.names.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = all.get_mut(&self.queue)
            && used.lease == self.lease
        {
            used.numbers.remove(&self.number);
            if used.numbers.is_empty() {
                all.remove(&self.queue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_used_again_once_it_is_free() {
        let names = Arc::new(Names::default());
        let word = |name: &Name| name.word();
        let (one, two, elsewhere) = (names.take("q", 0x2a), names.take("q", 0x2a), names.take("r", 0x2a));
        assert_eq!([word(&one), word(&two), word(&elsewhere)], ["2a-0", "2a-1", "2a-0"]);
        one.free();
        assert_eq!(word(&names.take("q", 0x2a)), "2a-0");
        assert_eq!(word(&names.take("q", 0x2a)), "2a-2");
    }

    #[test]
    fn a_name_of_another_lease_is_another() {
        let names = Arc::new(Names::default());
        let (before, after) = (names.take("q", 1), names.take("q", 2));
        assert_eq!([before.word(), after.word()], ["1-0", "2-0"]);
        before.free();
        assert_eq!(names.take("q", 2).word(), "2-1", "freeing the old one frees no other");
    }

    #[test]
    fn queues_without_names_are_forgotten() {
        let names = Arc::new(Names::default());
        let name = names.take("q", 1);
        name.free();
        assert!(names.used.lock().unwrap_or_else(PoisonError::into_inner).is_empty());
    }
}
