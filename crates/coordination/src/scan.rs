//! Reading ranges page by page, at one revision.
//!
//! If that revision is compacted meanwhile, the rest of the range is read at a later one. Keys come in order, so none is returned twice, and
//! none that was there all the time is left out. An instance's record and its intent always come from one revision. A claim moves an instance
//! from the pool's keys to a source's, which come later, so that a scan may return its identity in both places.

use std::{collections::VecDeque, sync::Arc};

use futures::stream;
use gauntlet_domain::{Instance, InstanceKey, Result, Stored};

use crate::{
    core::Core,
    decode::unreadable,
    keys::Layout,
    kv::{Get, KeyRange, KeyValue, Kv, KvError, Op, Page},
};

/// Keys per page, read with their values.
const PAGE: usize = 256;
/// Keys per page, read without values.
const PAGE_OF_KEYS: usize = 4096;
/// Instances that are looked up in one transaction. etcd allows 128 operations in one.
const LOOKUP_BATCH: usize = 64;
/// Pages of a scan of all instances before it is segmented, and the intended number of pages per segment.
const PAGES_PER_SEGMENT: usize = 4;

/// A read of a range, page by page.
pub(crate) struct Scan<K: Kv> {
    core: Arc<Core<K>>,
    /// What is left to read.
    rest: Option<Get>,
    snapshot: Option<K::Snapshot>,
    page: VecDeque<KeyValue>,
    segments: Segments<K>,
}

/// Whether a range is read in segments. For each page etcd walks to the end of the requested range, however few keys the page holds, so that
/// a long range costs the square of its length. A segment bounds that walk to a few pages.
enum Segments<K: Kv> {
    /// The range is short, or its last segment is being read.
    Off,
    /// The range of all instances, of which `read` keys and `pages` pages were read. Segmented after [`PAGES_PER_SEGMENT`] pages.
    Later { read: usize, pages: usize },
    /// Reading up to `end`, where a challenge begins. The segment spans `span` challenges, and `read` keys of it were read.
    On { challenges: Box<Scan<K>>, end: String, span: usize, read: usize },
}

impl<K: Kv> Scan<K> {
    /// Reads keys with their values.
    pub(crate) fn values(core: &Arc<Core<K>>, range: KeyRange, snapshot: Option<K::Snapshot>) -> Self {
        let rest = Some(Get { range, limit: PAGE, keys_only: false });
        Self { core: core.clone(), rest, snapshot, page: VecDeque::new(), segments: Segments::Off }
    }

    /// Reads keys without their values.
    pub(crate) fn keys(core: &Arc<Core<K>>, range: KeyRange, snapshot: Option<K::Snapshot>) -> Self {
        let rest = Some(Get { range, limit: PAGE_OF_KEYS, keys_only: true });
        Self { core: core.clone(), rest, snapshot, page: VecDeque::new(), segments: Segments::Off }
    }

    /// Reads all instances.
    pub(crate) fn instances(core: &Arc<Core<K>>, snapshot: Option<K::Snapshot>) -> Self {
        let segments = Segments::Later { read: 0, pages: 0 };
        Self { segments, ..Self::values(core, core.layout.instances(), snapshot) }
    }

    /// Reads the keys of all instances.
    pub(crate) fn instance_keys(core: &Arc<Core<K>>, snapshot: Option<K::Snapshot>) -> Self {
        let segments = Segments::Later { read: 0, pages: 0 };
        Self { segments, ..Self::keys(core, core.layout.instances(), snapshot) }
    }

    /// The snapshot that is read. Reads the first page if that has not happened yet.
    pub(crate) async fn snapshot(&mut self) -> Result<Option<K::Snapshot>> {
        if self.snapshot.is_none() {
            self.read_page().await?;
        }
        Ok(self.snapshot.clone())
    }

    /// Returns the next key.
    pub(crate) async fn next(&mut self) -> Result<Option<KeyValue>> {
        while self.page.is_empty() && self.rest.is_some() {
            self.read_page().await?;
        }
        Ok(self.page.pop_front())
    }

    /// Whether no key is left.
    pub(crate) fn is_finished(&self) -> bool {
        self.page.is_empty() && self.rest.is_none()
    }

    /// Reads the whole range.
    pub(crate) async fn all(mut self) -> Result<Vec<KeyValue>> {
        let mut all = Vec::new();
        while let Some(kv) = self.next().await? {
            all.push(kv);
        }
        Ok(all)
    }

    async fn read_page(&mut self) -> Result<()> {
        let Some(get) = self.rest.take() else { return Ok(()) };
        let segment_end = self.segment_end(&get).await?;
        let end = segment_end.clone().or_else(|| get.range.end.clone());
        let range = KeyRange { start: get.range.start.clone(), end };
        let mut page = self.core.page(Get { range, ..get }, self.snapshot.clone()).await?;
        self.snapshot = Some(page.snapshot);
        // The intent of the last record may be on the next page, at another revision: both are read with that page.
        let is_record = |kv: &KeyValue| self.core.layout.parse_instance(&kv.key).is_some_and(|(_, intent)| !intent);
        let postponed = match page.kvs.last() {
            Some(last) if page.more && !get.keys_only && page.kvs.len() > 1 && is_record(last) => page.kvs.pop(),
            _ => None,
        };
        if let Segments::Later { read, .. } | Segments::On { read, .. } = &mut self.segments {
            *read += page.kvs.len();
        }
        let next = match (postponed, page.kvs.last()) {
            (Some(postponed), _) => Some(postponed.key),
            // The least key after the last one.
            (None, Some(last)) if page.more => Some(format!("{}\0", last.key)),
            (None, _) => segment_end,
        };
        self.rest = next.map(|start| Get { range: KeyRange { start, end: get.range.end }, ..get });
        self.page.extend(page.kvs);
        Ok(())
    }

    /// Where the current segment ends; `None` if the rest of the range is read at once.
    async fn segment_end(&mut self, get: &Get) -> Result<Option<String>> {
        let start = &get.range.start;
        let (mut challenges, wanted, already_read) = match std::mem::replace(&mut self.segments, Segments::Off) {
            Segments::Off => return Ok(None),
            Segments::Later { read, pages } if pages < PAGES_PER_SEGMENT => {
                self.segments = Segments::Later { read, pages: pages + 1 };
                return Ok(None);
            }
            // The first segment ends where the next challenge begins.
            Segments::Later { read, .. } => {
                let range = self.core.layout.challenges();
                (Box::new(Self::keys(&self.core, range, self.snapshot.clone())), 1, read)
            }
            Segments::On { challenges, end, span, read } if *start < end => {
                self.segments = Segments::On { challenges, end: end.clone(), span, read };
                return Ok(Some(end));
            }
            // The next one spans as many challenges as should fill a few pages, judged by the segment before.
            Segments::On { challenges, span, read, .. } => {
                (challenges, span * PAGES_PER_SEGMENT * get.limit / read.max(1), 0)
            }
        };
        let (mut span, mut ahead) = (0, 0);
        while let Some(kv) = Box::pin(challenges.next()).await? {
            let Some(id) = self.core.layout.parse_challenge(&kv.key) else { continue };
            let end = self.core.layout.instances_of(&id).start;
            span += 1;
            ahead += usize::from(end > *start);
            if ahead >= wanted.max(1) {
                self.segments = Segments::On { challenges, end: end.clone(), span, read: already_read };
                return Ok(Some(end));
            }
        }
        Ok(None)
    }
}

/// The instances of a range, each with its intent applied. Logs and leaves out what cannot be read.
pub(crate) struct Instances<K: Kv> {
    scan: Scan<K>,
    peeked: Option<KeyValue>,
}

impl<K: Kv> Instances<K> {
    pub(crate) fn new(scan: Scan<K>) -> Self {
        Self { scan, peeked: None }
    }

    /// Returns the next instance.
    pub(crate) async fn next(&mut self) -> Result<Option<Stored<Instance>>> {
        while let Some(group) = self.next_group().await? {
            if let Some(stored) = self.scan.core.readable(&group) {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// Reads the whole range and fails at the first instance that cannot be read.
    pub(crate) async fn all_readable(mut self) -> Result<()> {
        while let Some(group) = self.next_group().await? {
            let key = group.first().map(|kv| kv.key.as_str()).unwrap_or_default();
            self.scan.core.parse(&group).map_err(|problem| unreadable(key, &problem))?;
        }
        Ok(())
    }

    /// Returns the keys of the next instance.
    async fn next_group(&mut self) -> Result<Option<Vec<KeyValue>>> {
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

/// The instances that an index lists. The index is read at one revision, and each batch of instances later, at its own.
pub(crate) struct Indexed<K: Kv> {
    index: Scan<K>,
    parse_key: fn(&Layout, &str) -> Option<InstanceKey>,
    batch: VecDeque<Instance>,
}

impl<K: Kv> Indexed<K> {
    /// The instances whose keys `parse_key` reads from the keys of `index`.
    pub(crate) fn new(index: Scan<K>, parse_key: fn(&Layout, &str) -> Option<InstanceKey>) -> Self {
        Self { index, parse_key, batch: VecDeque::new() }
    }

    pub(crate) fn stream(self) -> impl futures::Stream<Item = Result<Instance>> + Send {
        stream::try_unfold(
            self,
            |mut indexed| async move { Ok(indexed.next().await?.map(|instance| (instance, indexed))) },
        )
    }

    async fn next(&mut self) -> Result<Option<Instance>> {
        while self.batch.is_empty() && !self.index.is_finished() {
            self.read_batch().await?;
        }
        Ok(self.batch.pop_front())
    }

    async fn read_batch(&mut self) -> Result<()> {
        let core = self.index.core.clone();
        let mut keys = Vec::new();
        while keys.len() < LOOKUP_BATCH
            && let Some(kv) = self.index.next().await?
        {
            keys.extend((self.parse_key)(&core.layout, &kv.key));
        }
        if !keys.is_empty() {
            let response =
                core.read(keys.iter().map(|key| Op::get(core.layout.record_and_intent(key))).collect()).await?;
            let groups = response.reads.iter();
            self.batch.extend(groups.filter_map(|group| core.readable(group)).map(|stored| stored.value));
        }
        Ok(())
    }
}

impl<K: Kv> Core<K> {
    /// Reads a page of a range at a snapshot, or at the latest revision if the snapshot is compacted.
    pub(crate) async fn page(&self, get: Get, snapshot: Option<K::Snapshot>) -> Result<Page<K::Snapshot>> {
        let page = match self.kv.page(get.clone(), snapshot).await {
            Err(KvError::Compacted) => self.kv.page(get, None).await,
            page => page,
        };
        page.map_err(|error| self.error(error))
    }

    /// Counts a range at a snapshot, or at the latest revision if the snapshot is compacted.
    pub(crate) async fn count(&self, range: KeyRange, snapshot: Option<K::Snapshot>) -> Result<u64> {
        let count = match self.kv.count(range.clone(), snapshot).await {
            Err(KvError::Compacted) => self.kv.count(range, None).await,
            count => count,
        };
        count.map_err(|error| self.error(error))
    }
}
