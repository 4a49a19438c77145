//! A model of etcd: one map with revisions, leases, watches and compaction. Callers pass the time and inject the faults.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use gauntlet_coordination::kv::{
    Compare, Event, Get, KeyRange, KeyValue, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse,
};
use tokio::sync::mpsc::UnboundedSender;

/// The value of a key, with its revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub create_revision: u64,
    pub mod_revision: u64,
    pub value: Arc<[u8]>,
    pub lease: Option<LeaseId>,
}

type Map = BTreeMap<Arc<str>, Entry>;

/// The change of one key.
#[derive(Debug, Clone)]
pub struct Change {
    pub key: Arc<str>,
    pub before: Option<Entry>,
    pub after: Option<Entry>,
}

/// The map at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot {
    map: Arc<Map>,
    revision: u64,
}

struct Lease {
    ttl: Duration,
    expires: Duration,
    keys: BTreeSet<Arc<str>>,
}

struct Watcher {
    range: KeyRange,
    events: UnboundedSender<KvResult<Vec<Event>>>,
}

/// The state of the modelled server.
#[derive(Default)]
pub struct Server {
    map: Arc<Map>,
    revision: u64,
    compacted: u64,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: LeaseId,
    watchers: Vec<Watcher>,
}

impl Server {
    /// Runs a transaction, publishes its changes to the watches, and returns them.
    pub fn txn(&mut self, txn: &Txn) -> KvResult<(TxnResponse, Vec<Change>)> {
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let branch = if succeeded { &txn.success } else { &txn.failure };
        let is_missing = |lease: &LeaseId| !self.leases.contains_key(lease);
        if branch.iter().any(|op| matches!(op, Op::Put { lease: Some(lease), .. } if is_missing(lease))) {
            return Err(KvError::LeaseNotFound);
        }
        let (mut reads, mut counts, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        let next = self.revision + 1;
        for op in branch {
            match op {
                Op::Put { key, value, lease } => changes.push(self.put(key, value, *lease, next)),
                Op::Delete(range) => {
                    let keys: Vec<Arc<str>> = self.range(range).map(|(key, _)| key.clone()).collect();
                    changes.extend(keys.iter().map(|key| self.remove(key)));
                }
                Op::Get(get) => reads.push(read(&self.map, get).0),
                Op::Oldest { range, limit } => {
                    let all = Get { range: range.clone(), limit: 0, keys_only: false };
                    let mut all = read(&self.map, &all).0;
                    all.sort_by_key(|kv| kv.create_revision);
                    counts.push(all.len());
                    all.truncate(*limit);
                    reads.push(all);
                }
            }
        }
        self.publish(&changes);
        Ok((TxnResponse { succeeded, revision: self.revision, reads, counts }, changes))
    }

    /// Reads a page of the range, at `at` or at the current revision.
    pub fn page(&self, get: &Get, at: Option<&Snapshot>) -> KvResult<Page<Snapshot>> {
        let at = self.at(at)?;
        let (kvs, more) = read(&at.map, get);
        Ok(Page { kvs, more, snapshot: at })
    }

    /// Counts the keys of the range, at `at` or at the current revision.
    pub fn count(&self, keys: &KeyRange, at: Option<&Snapshot>) -> KvResult<u64> {
        Ok(range(&self.at(at)?.map, keys).count() as u64)
    }

    /// Lists a range, and sends later changes to the channel.
    pub fn list_and_watch(
        &mut self,
        range: &KeyRange,
        events: UnboundedSender<KvResult<Vec<Event>>>,
    ) -> (u64, BTreeMap<String, u64>) {
        let listed = self.range(range).map(|(key, entry)| (key.to_string(), entry.create_revision)).collect();
        self.watchers.push(Watcher { range: range.clone(), events });
        (self.revision, listed)
    }

    pub fn grant(&mut self, now: Duration, ttl: Duration) -> LeaseId {
        self.last_lease += 1;
        self.leases.insert(self.last_lease, Lease { ttl, expires: now + ttl, keys: BTreeSet::new() });
        self.last_lease
    }

    pub fn keep_alive(&mut self, now: Duration, lease: LeaseId) -> KvResult<()> {
        let lease = self.leases.get_mut(&lease).ok_or(KvError::LeaseNotFound)?;
        lease.expires = now + lease.ttl;
        Ok(())
    }

    /// Revokes a lease and deletes its keys at one revision.
    pub fn revoke(&mut self, lease: LeaseId) -> Vec<Change> {
        let Some(lease) = self.leases.remove(&lease) else { return Vec::new() };
        let changes: Vec<Change> = lease.keys.iter().map(|key| self.remove(key)).collect();
        self.publish(&changes);
        changes
    }

    /// Returns the expired leases. They stay until they are revoked.
    pub fn expired_leases(&self, now: Duration) -> Vec<LeaseId> {
        self.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect()
    }

    /// Returns the leases that are not revoked.
    pub fn leases(&self) -> Vec<LeaseId> {
        self.leases.keys().copied().collect()
    }

    /// Elects a new leader, which extends every lease by its full TTL. Returns how many watches end.
    pub fn change_leader(&mut self, now: Duration) -> u64 {
        for lease in self.leases.values_mut() {
            lease.expires = now + lease.ttl;
        }
        self.break_watches("the leader changed")
    }

    /// Compacts the history: older snapshots become unreadable and watches end. Returns how many watches end.
    pub fn compact(&mut self) -> u64 {
        self.compacted = self.revision;
        self.break_watches("the required revision has been compacted")
    }

    fn break_watches(&mut self, why: &str) -> u64 {
        let watchers = std::mem::take(&mut self.watchers).into_iter();
        let notified =
            watchers.filter(|watcher| watcher.events.send(Err(KvError::Unavailable(why.to_owned()))).is_ok());
        notified.count() as u64
    }

    /// Returns all entries, ordered by key.
    pub fn entries(&self) -> impl Iterator<Item = (&Arc<str>, &Entry)> {
        self.map.iter()
    }

    pub fn range(&self, keys: &KeyRange) -> impl Iterator<Item = (&Arc<str>, &Entry)> {
        range(&self.map, keys)
    }

    /// Whether the comparison is true now.
    pub fn holds(&self, compare: &Compare) -> bool {
        let Compare { range, condition } = compare;
        let holds = |entry: &Entry| condition.holds_for(entry.create_revision, entry.mod_revision, &entry.value);
        let mut entries = self.range(range).map(|(_, entry)| holds(entry)).peekable();
        // As in etcd, an empty range satisfies every condition; an absent key has revisions of 0 and no value.
        if range.end.is_none() && entries.peek().is_none() {
            condition.holds_if_absent()
        } else {
            entries.all(|holds| holds)
        }
    }

    fn at(&self, at: Option<&Snapshot>) -> KvResult<Snapshot> {
        match at {
            None => Ok(Snapshot { map: self.map.clone(), revision: self.revision }),
            Some(at) if at.revision < self.compacted => Err(KvError::Compacted),
            Some(at) => Ok(at.clone()),
        }
    }

    fn put(&mut self, key: &str, value: &[u8], lease: Option<LeaseId>, revision: u64) -> Change {
        let before = self.map.get(key).cloned();
        if let Some(lease) = before.as_ref().and_then(|entry| entry.lease) {
            self.leases.get_mut(&lease).map(|lease| lease.keys.remove(key));
        }
        let key: Arc<str> = Arc::from(key);
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.keys.insert(key.clone());
        }
        let create_revision = before.as_ref().map_or(revision, |entry| entry.create_revision);
        let entry = Entry { create_revision, mod_revision: revision, value: Arc::from(value), lease };
        Arc::make_mut(&mut self.map).insert(key.clone(), entry.clone());
        Change { key, before, after: Some(entry) }
    }

    fn remove(&mut self, key: &Arc<str>) -> Change {
        let before = Arc::make_mut(&mut self.map).remove(key);
        if let Some(lease) = before.as_ref().and_then(|entry| entry.lease) {
            self.leases.get_mut(&lease).map(|lease| lease.keys.remove(key));
        }
        Change { key: key.clone(), before, after: None }
    }

    fn publish(&mut self, changes: &[Change]) {
        if changes.is_empty() {
            return;
        }
        self.revision += 1;
        let revision = self.revision;
        self.watchers.retain(|watcher| {
            let matching: Vec<Event> = changes
                .iter()
                .filter(|change| watcher.range.contains(&change.key))
                .map(|change| Event {
                    key: change.key.to_string(),
                    revision,
                    create_revision: change.after.as_ref().map(|entry| entry.create_revision),
                })
                .collect();
            matching.is_empty() || watcher.events.send(Ok(matching)).is_ok()
        });
    }
}

fn range<'a>(map: &'a Map, keys: &KeyRange) -> impl Iterator<Item = (&'a Arc<str>, &'a Entry)> + use<'a> {
    let from = keys.start.as_str();
    let to = match keys.end.as_deref() {
        None => Bound::Included(from),
        // A range that ends before it starts is empty; `BTreeMap::range` would panic.
        Some(to) => Bound::Excluded(to.max(from)),
    };
    let empty = matches!(to, Bound::Excluded(to) if to == from);
    let from = if empty { Bound::Excluded("\u{10FFFF}") } else { Bound::Included(from) };
    let to = if empty { Bound::Unbounded } else { to };
    map.range::<str, _>((from, to))
}

fn read(map: &Map, get: &Get) -> (Vec<KeyValue>, bool) {
    let (mut kvs, mut more) = (Vec::new(), false);
    for (key, entry) in range(map, &get.range) {
        if get.limit > 0 && kvs.len() == get.limit {
            more = true;
            break;
        }
        let value = if get.keys_only { Vec::new() } else { entry.value.to_vec() };
        kvs.push(KeyValue {
            key: key.to_string(),
            value,
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
        });
    }
    (kvs, more)
}
