//! What this replica read last of challenges, pools and instances.
//!
//! Entries may be stale. Every transaction that is based on one compares versions, so a stale entry costs a refused transaction (which reads
//! the current state) and is never acted on. The cache is bounded, and drops the entries that were not used for the longest time.

use std::{
    collections::HashMap,
    hash::Hash,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use gauntlet_domain::{
    Assignment, Challenge, ChallengeId, Instance, InstanceKey, Phase, Snapshot, SourceId, Stored, Version,
};

/// Half of the maximum number of entries of each kind.
const GENERATION: usize = 8192;
/// The maximum number of ready pooled instances that are kept of one challenge.
pub(crate) const MAX_POOLED: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct ReplicaCache {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    challenges: Recent<ChallengeId, CachedChallenge>,
    instances: Recent<InstanceKey, Stored<Instance>>,
}

#[derive(Debug, Clone)]
struct CachedChallenge {
    challenge: Stored<Challenge>,
    pooled: Vec<Stored<Instance>>,
}

impl ReplicaCache {
    /// The cached parts of a snapshot. `None` if the challenge is not cached, or its pool was empty and may have been filled since.
    pub(crate) fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot> {
        let mut state = self.lock();
        let CachedChallenge { challenge, pooled } = state.challenges.get(id)?.clone();
        if challenge.value.bounds.min() > 0 && pooled.is_empty() {
            return None;
        }
        let key = InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) };
        let instance = state.instances.get(&key).cloned();
        Some(Snapshot { challenge: Some(challenge), instance, pooled })
    }

    pub(crate) fn put_snapshot(&self, snapshot: &Snapshot) {
        let Some(challenge) = &snapshot.challenge else { return };
        self.put_challenge(challenge);
        let mut state = self.lock();
        if let Some(cached) = state.challenges.get(&challenge.value.id) {
            cached.pooled.clone_from(&snapshot.pooled);
        }
        drop(state);
        if let Some(instance) = &snapshot.instance {
            self.put_instance(instance);
        }
    }

    pub(crate) fn put_challenge(&self, challenge: &Stored<Challenge>) {
        let mut state = self.lock();
        let id = &challenge.value.id;
        match state.challenges.get(id) {
            Some(cached) if cached.challenge.version.0 > challenge.version.0 => {}
            Some(cached) => cached.challenge = challenge.clone(),
            None => {
                let cached = CachedChallenge { challenge: challenge.clone(), pooled: Vec::new() };
                state.challenges.insert(id.clone(), cached);
            }
        }
    }

    pub(crate) fn remove_challenge(&self, id: &ChallengeId) {
        self.lock().challenges.remove(id);
    }

    pub(crate) fn put_instance(&self, instance: &Stored<Instance>) {
        let mut state = self.lock();
        let key = &instance.value.key;
        if key.assignment.is_pooled() {
            let ready = instance.value.phase == Phase::Ready;
            if let Some(cached) = state.challenges.get(&key.challenge) {
                cached.pooled.retain(|pooled| pooled.value.key != *key);
                if ready && cached.pooled.len() < MAX_POOLED {
                    cached.pooled.push(instance.clone());
                }
            }
            return;
        }
        match state.instances.get(key) {
            Some(cached) if cached.version.0 > instance.version.0 => {}
            Some(cached) => cached.clone_from(instance),
            None => state.instances.insert(key.clone(), instance.clone()),
        }
    }

    pub(crate) fn remove_instance(&self, key: &InstanceKey) {
        let mut state = self.lock();
        if key.assignment.is_pooled() {
            if let Some(cached) = state.challenges.get(&key.challenge) {
                cached.pooled.retain(|pooled| pooled.value.key != *key);
            }
        } else {
            state.instances.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A map of the entries that were used last, at least one generation of them and at most two.
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
            self.insert(key, value);
        }
        self.young.get_mut(key)
    }

    fn insert(&mut self, key: K, value: V) {
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

/// A record that was written at `revision`.
pub(crate) fn written<T>(value: T, revision: u64) -> Stored<T> {
    Stored { value, version: Version(revision) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_entry_stays_and_unused_entries_are_dropped() {
        let mut recent = Recent::default();
        for n in 0..GENERATION * 10 {
            recent.insert(n, n);
            assert_eq!(recent.get(&0), Some(&mut 0), "used all the time");
            assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
        }
        assert_eq!(recent.get(&1), None);
        recent.remove(&0);
        assert_eq!(recent.get(&0), None);
    }
}
