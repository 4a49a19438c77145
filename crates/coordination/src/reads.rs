//! Reading ranges in pages at one revision, and records out of them.
//!
//! Where that revision is compacted meanwhile, what is left of the range is read at a later one: keys come in order, so none is told twice,
//! and one that was there all the time is not left out. An instance's record and its intent are always of one revision. (A claim moves an
//! instance from the pool's keys to a source's, which come later: such a list may name its identity in both places.)

use std::{collections::VecDeque, sync::Arc};

use futures::stream;
use gauntlet_domain::{Challenge, ChallengeId, Instance, InstanceKey, Phase, Result, Snapshot, Stored, Version};

use crate::{
    core::{Core, unreadable},
    keys::Layout,
    kv::{Get, KeyRange, KeyValue, Kv, KvError, Op, Page, Txn, TxnResponse},
    memory::POOLED,
    records::{self, Unreadable},
};

/// Keys read with their values at once, and without.
const PAGE: usize = 256;
const PAGE_OF_KEYS: usize = 4096;
/// Keys that a snapshot looks at for pooled instances: an instance may have two, and some are not ready.
const POOLED_KEYS: usize = 48;
/// Instances that an index names read at once: etcd allows 128 operations in a transaction.
const INDEXED: usize = 64;

/// Pages of a walk over all instances before it is cut, and pages between two cuts.
const UNCUT: usize = 4;

/// A walk through a range, page by page.
pub(crate) struct Scan<K: Kv> {
    core: Arc<Core<K>>,
    /// What is left to read.
    rest: Option<Get>,
    at: Option<K::Snapshot>,
    page: VecDeque<KeyValue>,
    cut: Cut<K>,
}

/// Whether a range is read in parts. For each page etcd walks over the range to its end, however few keys the page may hold: what is left of
/// a long range is to be no longer than a few pages.
enum Cut<K: Kv> {
    /// Not at all, or not any more.
    No,
    /// It is the range of all instances, of which so many keys and pages were read: cut where a challenge begins if there are many.
    Later { read: usize, pages: usize },
    /// Up to `upto`. The part has `passed` challenges, and `read` keys of them were read.
    Now { challenges: Box<Scan<K>>, upto: String, passed: usize, read: usize },
}

impl<K: Kv> Scan<K> {
    pub(crate) fn values(core: &Arc<Core<K>>, keys: KeyRange, at: Option<K::Snapshot>) -> Self {
        let rest = Some(Get { range: keys, limit: PAGE, keys_only: false });
        Self { core: core.clone(), rest, at, page: VecDeque::new(), cut: Cut::No }
    }

    pub(crate) fn keys(core: &Arc<Core<K>>, keys: KeyRange, at: Option<K::Snapshot>) -> Self {
        let rest = Some(Get { range: keys, limit: PAGE_OF_KEYS, keys_only: true });
        Self { core: core.clone(), rest, at, page: VecDeque::new(), cut: Cut::No }
    }

    /// All instances.
    pub(crate) fn instances(core: &Arc<Core<K>>, at: Option<K::Snapshot>) -> Self {
        Self { cut: Cut::Later { read: 0, pages: 0 }, ..Self::values(core, core.layout.instances(), at) }
    }

    /// The keys of all instances.
    pub(crate) fn instance_keys(core: &Arc<Core<K>>, at: Option<K::Snapshot>) -> Self {
        Self { cut: Cut::Later { read: 0, pages: 0 }, ..Self::keys(core, core.layout.instances(), at) }
    }

    /// The snapshot it reads from; reads the first page if it has not yet.
    pub(crate) async fn at(&mut self) -> Result<Option<K::Snapshot>> {
        if self.at.is_none() {
            self.fill().await?;
        }
        Ok(self.at.clone())
    }

    pub(crate) async fn next(&mut self) -> Result<Option<KeyValue>> {
        while self.page.is_empty() && self.rest.is_some() {
            self.fill().await?;
        }
        Ok(self.page.pop_front())
    }

    /// Whether everything was read.
    pub(crate) fn ended(&self) -> bool {
        self.page.is_empty() && self.rest.is_none()
    }

    pub(crate) async fn all(mut self) -> Result<Vec<KeyValue>> {
        let mut all = Vec::new();
        while let Some(kv) = self.next().await? {
            all.push(kv);
        }
        Ok(all)
    }

    async fn fill(&mut self) -> Result<()> {
        let Some(get) = self.rest.take() else { return Ok(()) };
        let upto = self.upto(&get).await?;
        let range = KeyRange { start: get.range.start.clone(), end: upto.clone().or_else(|| get.range.end.clone()) };
        let mut page = self.core.page(Get { range, ..get }, self.at.clone()).await?;
        self.at = Some(page.snapshot);
        // What belongs to the last one may be on the next page, and of another revision by then: both are read with that.
        let parted = |kv: &KeyValue| self.core.layout.parse_instance(&kv.key).is_some_and(|(_, intent)| !intent);
        let again = match page.kvs.last() {
            Some(last) if page.more && !get.keys_only && page.kvs.len() > 1 && parted(last) => page.kvs.pop(),
            _ => None,
        };
        if let Cut::Later { read, .. } | Cut::Now { read, .. } = &mut self.cut {
            *read += page.kvs.len();
        }
        // The least key after the last one read, or after the part.
        let next = match (again, page.kvs.last()) {
            (Some(again), _) => Some(again.key),
            (None, Some(last)) if page.more => Some(format!("{}\0", last.key)),
            (None, _) => upto,
        };
        self.rest = next.map(|start| Get { range: KeyRange { start, end: get.range.end }, ..get });
        self.page.extend(page.kvs);
        Ok(())
    }

    /// Where the part of the range ends that is read now.
    async fn upto(&mut self, get: &Get) -> Result<Option<String>> {
        let from = &get.range.start;
        let (mut challenges, wanted, before) = match std::mem::replace(&mut self.cut, Cut::No) {
            Cut::No => return Ok(None),
            Cut::Later { read, pages } if pages < UNCUT => {
                self.cut = Cut::Later { read, pages: pages + 1 };
                return Ok(None);
            }
            // To where the next challenge begins.
            Cut::Later { read, .. } => {
                let keys = self.core.layout.challenges();
                (Box::new(Self::keys(&self.core, keys, self.at.clone())), 1, read)
            }
            Cut::Now { challenges, upto, passed, read } if *from < upto => {
                self.cut = Cut::Now { challenges, upto: upto.clone(), passed, read };
                return Ok(Some(upto));
            }
            // To as many challenges as have some pages together, by those before.
            Cut::Now { challenges, passed, read, .. } => (challenges, passed * UNCUT * get.limit / read.max(1), 0),
        };
        let (mut passed, mut ahead) = (0, 0);
        while let Some(kv) = Box::pin(challenges.next()).await? {
            let Some(id) = self.core.layout.parse_challenge(&kv.key) else { continue };
            let begins = self.core.layout.instances_of(&id).start;
            passed += 1;
            ahead += usize::from(begins > *from);
            if ahead >= wanted.max(1) {
                self.cut = Cut::Now { challenges, upto: begins.clone(), passed, read: before };
                return Ok(Some(begins));
            }
        }
        Ok(None)
    }
}

/// The instances of a range, each with its intent applied; what cannot be read is reported and left out.
pub(crate) struct Instances<K: Kv> {
    scan: Scan<K>,
    peeked: Option<KeyValue>,
}

impl<K: Kv> Instances<K> {
    pub(crate) fn new(scan: Scan<K>) -> Self {
        Self { scan, peeked: None }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Stored<Instance>>> {
        while let Some(group) = self.group().await? {
            if let Some(stored) = self.scan.core.readable(&group) {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// Reads on to the end; fails at the first that cannot be read.
    pub(crate) async fn all_readable(mut self) -> Result<()> {
        while let Some(group) = self.group().await? {
            let key = group.first().map(|kv| kv.key.as_str()).unwrap_or_default();
            self.scan.core.parsed(&group).map_err(|problem| unreadable(key, &problem))?;
        }
        Ok(())
    }

    /// The keys of the next instance.
    async fn group(&mut self) -> Result<Option<Vec<KeyValue>>> {
        let record = match self.peeked.take() {
            Some(kv) => kv,
            None => match self.scan.next().await? {
                Some(kv) => kv,
                None => return Ok(None),
            },
        };
        let mut group = vec![record];
        while let Some(kv) = self.scan.next().await? {
            if self.scan.core.layout.parse_instance(&kv.key).is_some_and(|(_, intent)| intent) {
                group.push(kv);
            } else {
                self.peeked = Some(kv);
                break;
            }
        }
        Ok(Some(group))
    }
}

/// The instances that an index names, some at a time. The index is read at one revision, each instance as it is by then.
pub(crate) struct Indexed<K: Kv> {
    index: Scan<K>,
    key: fn(&Layout, &str) -> Option<InstanceKey>,
    found: VecDeque<Instance>,
}

impl<K: Kv> Indexed<K> {
    /// The instances of the keys that `key` reads from the keys of `index`.
    pub(crate) fn new(index: Scan<K>, key: fn(&Layout, &str) -> Option<InstanceKey>) -> Self {
        Self { index, key, found: VecDeque::new() }
    }

    pub(crate) fn stream(self) -> impl futures::Stream<Item = Result<Instance>> + Send {
        stream::try_unfold(
            self,
            |mut indexed| async move { Ok(indexed.next().await?.map(|instance| (instance, indexed))) },
        )
    }

    async fn next(&mut self) -> Result<Option<Instance>> {
        while self.found.is_empty() && !self.index.ended() {
            self.fill().await?;
        }
        Ok(self.found.pop_front())
    }

    async fn fill(&mut self) -> Result<()> {
        let core = self.index.core.clone();
        let mut keys = Vec::new();
        while keys.len() < INDEXED
            && let Some(kv) = self.index.next().await?
        {
            keys.extend((self.key)(&core.layout, &kv.key));
        }
        if !keys.is_empty() {
            let read = core.read(keys.iter().map(|key| Op::get(core.layout.record_and_intent(key))).collect()).await?;
            self.found.extend(read.reads.iter().filter_map(|group| core.readable(group)).map(|stored| stored.value));
        }
        Ok(())
    }
}

impl<K: Kv> Core<K> {
    /// Reads several things at one revision.
    pub(crate) async fn read(&self, success: Vec<Op>) -> Result<TxnResponse> {
        let txn = Txn { success, ..Txn::default() };
        self.txn(txn).await.map_err(|error| self.error(error))
    }

    /// Reads part of a range at a snapshot, or as it is now where that is compacted.
    pub(crate) async fn page(&self, get: Get, at: Option<K::Snapshot>) -> Result<Page<K::Snapshot>> {
        let page = match self.kv.page(get.clone(), at).await {
            Err(KvError::Compacted) => self.kv.page(get, None).await,
            page => page,
        };
        page.map_err(|error| self.error(error))
    }

    /// Counts a range at a snapshot, or as it is now where that is compacted.
    pub(crate) async fn count(&self, keys: KeyRange, at: Option<K::Snapshot>) -> Result<u64> {
        let count = match self.kv.count(keys.clone(), at).await {
            Err(KvError::Compacted) => self.kv.count(keys, None).await,
            count => count,
        };
        count.map_err(|error| self.error(error))
    }

    /// What a snapshot for a source's seat reads.
    pub(crate) fn snapshot_ops(&self, key: &InstanceKey) -> [Op; 3] {
        let layout = &self.layout;
        [
            Op::get(KeyRange::key(layout.challenge(&key.challenge))),
            Op::get(layout.record_and_intent(key)),
            Op::Get(Get { range: layout.pooled_of(&key.challenge), limit: POOLED_KEYS, keys_only: false }),
        ]
    }

    /// What they read, and whether the pool has more.
    pub(crate) fn read_snapshot(&self, key: &InstanceKey, read: &mut TxnResponse) -> Result<(Snapshot, bool)> {
        let challenge = self.read_challenge(&key.challenge, read.next_read())?;
        let instance = self.read_instance(key, &read.next_read())?;
        let listed = read.next_read();
        let cut = listed.len() == POOLED_KEYS;
        let pooled = self.ready_among(listed, cut, POOLED);
        Ok((Snapshot { challenge, instance, pooled }, cut))
    }

    /// Remembers how it stood when something else was expected.
    pub(crate) fn met(&self, key: &InstanceKey, snapshot: &Snapshot) {
        if snapshot.challenge.is_none() {
            self.memory.forget_challenge(&key.challenge);
        }
        if snapshot.instance.is_none() {
            self.memory.forget_instance(key);
        }
        self.memory.snapshot(snapshot);
    }

    /// The ready ones among listed keys of a pool, at most so many; if the list was `cut` without the last, which may miss its intent.
    pub(crate) fn ready_among(&self, listed: Vec<KeyValue>, cut: bool, most: usize) -> Vec<Stored<Instance>> {
        let mut groups: Vec<Vec<KeyValue>> = Vec::new();
        for kv in listed {
            match groups.last_mut() {
                Some(group) if self.layout.parse_instance(&kv.key).is_some_and(|(_, intent)| intent) => group.push(kv),
                _ => groups.push(vec![kv]),
            }
        }
        if cut {
            groups.pop();
        }
        let ready = |stored: &Stored<Instance>| stored.value.phase == Phase::Ready;
        groups.iter().filter_map(|group| self.readable(group)).filter(ready).take(most).collect()
    }

    pub(crate) fn read_challenge(&self, id: &ChallengeId, kvs: Vec<KeyValue>) -> Result<Option<Stored<Challenge>>> {
        let Some(kv) = kvs.into_iter().next() else { return Ok(None) };
        let value = records::read_challenge(id.clone(), &kv.value).map_err(|problem| unreadable(&kv.key, &problem))?;
        Ok(Some(Stored { value, version: Version(kv.mod_revision) }))
    }

    /// The challenge of a key in a list; reported and left out if it cannot be read.
    pub(crate) fn readable_challenge(&self, kv: &KeyValue) -> Option<Stored<Challenge>> {
        let id =
            self.layout.parse_challenge(&kv.key).ok_or_else(|| Unreadable("the key names no challenge".to_owned()));
        match id.and_then(|id| records::read_challenge(id, &kv.value)) {
            Ok(value) => Some(Stored { value, version: Version(kv.mod_revision) }),
            Err(problem) => {
                self.report(&kv.key, kv.mod_revision, &problem);
                None
            }
        }
    }

    /// An instance that was asked for: its record and its intent, if any.
    pub(crate) fn read_instance(&self, key: &InstanceKey, kvs: &[KeyValue]) -> Result<Option<Stored<Instance>>> {
        if kvs.is_empty() {
            return Ok(None);
        }
        stored(key, kvs).map(Some).map_err(|problem| unreadable(&self.layout.instance(key), &problem))
    }

    /// The instance of some neighbouring keys in a list; reported and left out if it cannot be read.
    pub(crate) fn readable(&self, kvs: &[KeyValue]) -> Option<Stored<Instance>> {
        let first = kvs.first()?;
        self.parsed(kvs).map_err(|problem| self.report(&first.key, version(kvs), &problem)).ok()
    }

    fn parsed(&self, kvs: &[KeyValue]) -> Result<Stored<Instance>, Unreadable> {
        match kvs.first().and_then(|first| self.layout.parse_instance(&first.key)) {
            Some((key, false)) => stored(&key, kvs),
            _ => Err(Unreadable("the key names no instance".to_owned())),
        }
    }
}

fn stored(key: &InstanceKey, kvs: &[KeyValue]) -> Result<Stored<Instance>, Unreadable> {
    let (record, intent) = match kvs {
        [record] => (record, None),
        [record, intent] => (record, Some(intent)),
        _ => return Err(Unreadable("more keys than a record and an intent".to_owned())),
    };
    let mut value = records::read_instance(key.clone(), &record.value)?;
    if let Some(intent) = intent {
        records::apply_intent(&mut value, &intent.value)?;
    }
    Ok(Stored { value, version: Version(version(kvs)) })
}

/// The version of an instance: the last revision that touched its record or its intent.
fn version(kvs: &[KeyValue]) -> u64 {
    kvs.iter().map(|kv| kv.mod_revision).max().unwrap_or(0)
}
