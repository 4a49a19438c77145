//! Records read from keys: of challenges, instances, and snapshots of both.

use gauntlet_domain::{Challenge, ChallengeId, Error, Instance, InstanceKey, Phase, Result, Snapshot, Stored, Version};

use crate::{
    core::Core,
    kv::{Get, KeyRange, KeyValue, Kv, Op, Txn, TxnResponse},
    records::{self, Unreadable},
    replica_cache::MAX_POOLED,
};

/// The number of keys of a pool that a snapshot reads. An instance may have two keys, and some instances are not ready.
const POOLED_KEYS: usize = 48;

impl<K: Kv> Core<K> {
    /// Runs reads at one revision.
    pub(crate) async fn read(&self, success: Vec<Op>) -> Result<TxnResponse> {
        let txn = Txn { success, ..Txn::default() };
        self.txn(txn).await.map_err(|error| self.error(error))
    }

    /// The reads of a snapshot for the source that `key` names.
    pub(crate) fn snapshot_ops(&self, key: &InstanceKey) -> [Op; 3] {
        let layout = &self.layout;
        [
            Op::get(KeyRange::key(layout.challenge(&key.challenge))),
            Op::get(layout.record_and_intent(key)),
            Op::Get(Get { range: layout.pooled_of(&key.challenge), limit: POOLED_KEYS, keys_only: false }),
        ]
    }

    /// The snapshot that [`Core::snapshot_ops`] read, and whether the pool may have more keys.
    pub(crate) fn read_snapshot(&self, key: &InstanceKey, response: &mut TxnResponse) -> Result<(Snapshot, bool)> {
        let challenge = self.read_challenge(&key.challenge, response.next_read())?;
        let instance = self.read_instance(key, &response.next_read())?;
        let listed = response.next_read();
        let more = listed.len() == POOLED_KEYS;
        let pooled = self.ready_instances(listed, more, MAX_POOLED);
        Ok((Snapshot { challenge, instance, pooled }, more))
    }

    /// Caches the state that a refused transaction found.
    pub(crate) fn refresh_cache(&self, key: &InstanceKey, snapshot: &Snapshot) {
        if snapshot.challenge.is_none() {
            self.cache.remove_challenge(&key.challenge);
        }
        if snapshot.instance.is_none() {
            self.cache.remove_instance(key);
        }
        self.cache.put_snapshot(snapshot);
    }

    /// The first `limit` ready instances of a list of keys. With `more`, the last instance is left out, as its intent may be missing.
    pub(crate) fn ready_instances(&self, listed: Vec<KeyValue>, more: bool, limit: usize) -> Vec<Stored<Instance>> {
        let mut groups: Vec<Vec<KeyValue>> = Vec::new();
        for kv in listed {
            match groups.last_mut() {
                Some(group) if self.layout.parse_instance(&kv.key).is_some_and(|(_, intent)| intent) => group.push(kv),
                _ => groups.push(vec![kv]),
            }
        }
        if more {
            groups.pop();
        }
        let ready = |stored: &Stored<Instance>| stored.value.phase == Phase::Ready;
        groups.iter().filter_map(|group| self.readable(group)).filter(ready).take(limit).collect()
    }

    /// The challenge that was read by its key.
    pub(crate) fn read_challenge(&self, id: &ChallengeId, kvs: Vec<KeyValue>) -> Result<Option<Stored<Challenge>>> {
        let Some(kv) = kvs.into_iter().next() else { return Ok(None) };
        let value = records::read_challenge(id.clone(), &kv.value).map_err(|problem| unreadable(&kv.key, &problem))?;
        Ok(Some(Stored { value, version: Version(kv.mod_revision) }))
    }

    /// The challenge of a listed key. Logged and left out if it cannot be read.
    pub(crate) fn readable_challenge(&self, kv: &KeyValue) -> Option<Stored<Challenge>> {
        let id =
            self.layout.parse_challenge(&kv.key).ok_or_else(|| Unreadable("the key names no challenge".to_owned()));
        match id.and_then(|id| records::read_challenge(id, &kv.value)) {
            Ok(value) => Some(Stored { value, version: Version(kv.mod_revision) }),
            Err(problem) => {
                self.log_unreadable(&kv.key, kv.mod_revision, &problem);
                None
            }
        }
    }

    /// The instance that was read by its key: a record, and an intent if it has one.
    pub(crate) fn read_instance(&self, key: &InstanceKey, kvs: &[KeyValue]) -> Result<Option<Stored<Instance>>> {
        if kvs.is_empty() {
            return Ok(None);
        }
        stored_instance(key, kvs).map(Some).map_err(|problem| unreadable(&self.layout.instance(key), &problem))
    }

    /// The instance of neighbouring keys in a list. Logged and left out if it cannot be read.
    pub(crate) fn readable(&self, kvs: &[KeyValue]) -> Option<Stored<Instance>> {
        let first = kvs.first()?;
        let revision = version_of(kvs).map_or(0, |version| version.0);
        self.parse(kvs).map_err(|problem| self.log_unreadable(&first.key, revision, &problem)).ok()
    }

    pub(crate) fn parse(&self, kvs: &[KeyValue]) -> Result<Stored<Instance>, Unreadable> {
        match kvs.first().and_then(|first| self.layout.parse_instance(&first.key)) {
            Some((key, false)) => stored_instance(&key, kvs),
            _ => Err(Unreadable("the key names no instance".to_owned())),
        }
    }
}

fn stored_instance(key: &InstanceKey, kvs: &[KeyValue]) -> Result<Stored<Instance>, Unreadable> {
    let (record, intent) = match kvs {
        [record] => (record, None),
        [record, intent] => (record, Some(intent)),
        _ => return Err(Unreadable("more keys than a record and an intent".to_owned())),
    };
    let mut value = records::read_instance(key.clone(), &record.value)?;
    if let Some(intent) = intent {
        records::apply_intent(&mut value, &intent.value)?;
    }
    Ok(Stored { value, version: version_of(kvs).unwrap_or(Version(0)) })
}

/// The version of what these keys hold: the revision of the latest put. `None` without keys.
pub(crate) fn version_of(kvs: &[KeyValue]) -> Option<Version> {
    kvs.iter().map(|kv| kv.mod_revision).max().map(Version)
}

/// The revision at which a record was written, if it is stored without an intent.
pub(crate) fn written_at(kvs: &[KeyValue], record: &[u8]) -> Option<u64> {
    match kvs {
        [kv] if kv.value == record => Some(kv.mod_revision),
        _ => None,
    }
}

/// The error for a record that was read by its key and does not parse.
pub(crate) fn unreadable(key: &str, problem: &Unreadable) -> Error {
    Error::Internal(format!("the record {key:?} cannot be read: {}", problem.0))
}
