//! What this replica saw last of challenges, pools and instances. Good for a try: whatever is done on it compares versions, so that old
//! knowledge costs a transaction that fails (and reads how it stands), and is never acted on. Bounded; what was not used for long is
//! forgotten.

use std::{
    collections::HashMap,
    hash::Hash,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use gauntlet_domain::{
    Assignment, Challenge, ChallengeId, Instance, InstanceKey, Phase, Snapshot, SourceId, Stored, Version,
};

/// Of each kind, half of what is kept at most.
const GENERATION: usize = 8192;
/// Ready pooled instances remembered of a challenge.
pub(crate) const POOLED: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    challenges: Recent<ChallengeId, Seen>,
    instances: Recent<InstanceKey, Stored<Instance>>,
}

#[derive(Debug, Clone)]
struct Seen {
    challenge: Stored<Challenge>,
    pooled: Vec<Stored<Instance>>,
}

impl Memory {
    /// What a snapshot would answer, as far as it is known. A pool that was seen empty is not known: it may have been filled since.
    pub(crate) fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot> {
        let mut state = self.lock();
        let Seen { challenge, pooled } = state.challenges.get(id)?.clone();
        if challenge.value.bounds.min() > 0 && pooled.is_empty() {
            return None;
        }
        let key = InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) };
        let instance = state.instances.get(&key).cloned();
        Some(Snapshot { challenge: Some(challenge), instance, pooled })
    }

    pub(crate) fn snapshot(&self, snapshot: &Snapshot) {
        let Some(challenge) = &snapshot.challenge else { return };
        self.challenge(challenge);
        let mut state = self.lock();
        if let Some(seen) = state.challenges.get(&challenge.value.id) {
            seen.pooled.clone_from(&snapshot.pooled);
        }
        drop(state);
        if let Some(instance) = &snapshot.instance {
            self.instance(instance);
        }
    }

    pub(crate) fn challenge(&self, challenge: &Stored<Challenge>) {
        let mut state = self.lock();
        let id = &challenge.value.id;
        match state.challenges.get(id) {
            Some(seen) if seen.challenge.version.0 > challenge.version.0 => {}
            Some(seen) => seen.challenge = challenge.clone(),
            None => state.challenges.put(id.clone(), Seen { challenge: challenge.clone(), pooled: Vec::new() }),
        }
    }

    pub(crate) fn forget_challenge(&self, id: &ChallengeId) {
        self.lock().challenges.remove(id);
    }

    pub(crate) fn instance(&self, instance: &Stored<Instance>) {
        let mut state = self.lock();
        let key = &instance.value.key;
        if key.assignment.is_pooled() {
            let ready = instance.value.phase == Phase::Ready;
            if let Some(seen) = state.challenges.get(&key.challenge) {
                seen.pooled.retain(|pooled| pooled.value.key != *key);
                if ready && seen.pooled.len() < POOLED {
                    seen.pooled.push(instance.clone());
                }
            }
            return;
        }
        match state.instances.get(key) {
            Some(seen) if seen.version.0 > instance.version.0 => {}
            Some(seen) => seen.clone_from(instance),
            None => state.instances.put(key.clone(), instance.clone()),
        }
    }

    pub(crate) fn forget_instance(&self, key: &InstanceKey) {
        let mut state = self.lock();
        if key.assignment.is_pooled() {
            if let Some(seen) = state.challenges.get(&key.challenge) {
                seen.pooled.retain(|pooled| pooled.value.key != *key);
            }
        } else {
            state.instances.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entries used last: at least one generation of them, at most two.
#[derive(Debug)]
struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<K: Hash + Eq + Clone, V> Recent<K, V> {
    fn get(&mut self, key: &K) -> Option<&mut V> {
        if let Some((key, value)) = self.old.remove_entry(key) {
            self.put(key, value);
        }
        self.young.get_mut(key)
    }

    fn put(&mut self, key: K, value: V) {
        if self.young.len() >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    fn remove(&mut self, key: &K) {
        self.young.remove(key);
        self.old.remove(key);
    }
}

/// As written at that revision.
pub(crate) fn written<T>(value: T, revision: u64) -> Stored<T> {
    Stored { value, version: Version(revision) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_goes() {
        let mut recent = Recent::default();
        for n in 0..GENERATION * 10 {
            recent.put(n, n);
            assert_eq!(recent.get(&0), Some(&mut 0), "used all the time");
            assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
        }
        assert_eq!(recent.get(&1), None);
        recent.remove(&0);
        assert_eq!(recent.get(&0), None);
    }
}
