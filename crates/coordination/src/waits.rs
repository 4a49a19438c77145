//! Who of this replica waits, for whom, and since when: for whoever asks, without asking the store.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use gauntlet_domain::{ChallengeId, LockKind};
use jiff::Timestamp;
use serde::Serialize;

use crate::{kv::KeyRange, mirror::Mirror, records::Owner};

/// Who holds something, or stands in its queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The replica's name.
    pub replica: String,
    /// Since when it has held it or waited for it, by its own clock.
    pub since: Timestamp,
    /// The trace of its call, in W3C traceparent form.
    pub origin: Option<String>,
}

impl From<&Owner> for Holder {
    fn from(owner: &Owner) -> Self {
        Self { replica: owner.replica.clone(), since: owner.since, origin: owner.origin.clone() }
    }
}

/// A call of this replica that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// What is waited for: `challenge`, `rollout` or `instance`.
    pub kind: &'static str,
    /// Of which challenge.
    pub challenge: String,
    /// How many are ahead, the holder included.
    pub position: usize,
    /// Since when it has waited.
    pub since: Timestamp,
    /// Who holds it, where that was among those seen when the wait began.
    pub holder: Option<Holder>,
}

/// Those who wait now.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    next: AtomicU64,
    waiting: Mutex<BTreeMap<u64, Waiting>>,
}

#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) kind: LockKind,
    pub(crate) challenge: ChallengeId,
    pub(crate) since: Timestamp,
    pub(crate) behind: Behind,
    /// Some who are ahead, in order.
    pub(crate) seen: Vec<Seen>,
}

/// A key that somebody owns.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) key: String,
    /// The revision at which it came to be.
    pub(crate) created: u64,
    pub(crate) owner: Owner,
}

/// What must go first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Behind {
    /// All in that range that came to be before this revision.
    pub(crate) queue: Option<(KeyRange, u64)>,
    /// A key, as it came to be at that revision.
    pub(crate) owner: Option<(String, u64)>,
}

impl Waits {
    /// Counts a wait for as long as the answer lives.
    pub(crate) fn enter(self: &Arc<Self>, waiting: Waiting) -> Entered {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, waiting);
        Entered { waits: self.clone(), number }
    }

    /// How many wait, and the first of them, at most so many.
    pub(crate) fn list(&self, mirror: &Mirror, most: usize) -> (usize, Vec<Wait>) {
        let waiting = self.lock();
        let listed = waiting.values().take(most).map(|waiting| Wait {
            kind: waiting.kind.name(),
            challenge: waiting.challenge.as_str().to_owned(),
            position: mirror.ahead(&waiting.behind),
            since: waiting.since,
            holder: holder(mirror, &waiting.seen),
        });
        (waiting.len(), listed.collect())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first of those seen who is still there.
fn holder(mirror: &Mirror, seen: &[Seen]) -> Option<Holder> {
    seen.iter().find(|seen| mirror.holds(&seen.key, seen.created)).map(|seen| (&seen.owner).into())
}

/// A wait under way.
#[derive(Debug)]
pub(crate) struct Entered {
    waits: Arc<Waits>,
    number: u64,
}

impl Entered {
    /// Who holds what is waited for.
    pub(crate) fn holder(&self, mirror: &Mirror) -> Option<Holder> {
        let waiting = self.waits.lock();
        let seen = &waiting.get(&self.number)?.seen;
        // The watch may not have come that far.
        holder(mirror, seen).or_else(|| seen.first().map(|seen| (&seen.owner).into()))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.waits.lock().remove(&self.number);
    }
}
