//! The backend for one machine: one file, one process.
//!
//! Keys without a lease are in the file. Keys under a lease are in memory only: they go with the process, which is what a crash looks like to
//! whoever recovers from it. One thread writes; what is queued meanwhile shares the next commit and its one fsync. Readers see the last
//! commit and never wait for the next. The same thread ends the leases whose time is over, by a clock that it is given.
//!
//! A revision is the number of the start of the process (kept in the file) times 2^40, plus a counter: it grows across restarts although the
//! counter is never written.

mod writer;

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    ops::Bound,
    os::unix::fs::OpenOptionsExt as _,
    panic::{UnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::Error;
use redb::{Database, DatabaseError, ReadOnlyTable, ReadableDatabase as _, ReadableTable, TableDefinition};
use tokio::{
    sync::{Semaphore, broadcast, oneshot},
    time::{timeout, timeout_at},
};

use self::writer::{Job, Queued, Writer};
use crate::kv::{
    Compare, Condition, Event, EventStream, Get, KeyRange, KeyValue, Kv, KvError, KvResult, LeaseId, Op, Page, Txn,
    TxnResponse, Watch,
};

/// Revision of creation, revision of the last put, value.
type Entry = (u64, u64, &'static [u8]);
const ENTRIES: TableDefinition<'static, &'static str, Entry> = TableDefinition::new("entries");
const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");
const EPOCH: &str = "epoch";
const COUNTER_BITS: u32 = 40;

/// Writes that may wait for the writer.
const QUEUE: usize = 1024;
/// Commits that a watch may fall behind before it has to list again.
const BEHIND: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(10);

/// Tells the time by which leases run out; never goes back.
type Clock = Box<dyn Fn() -> Instant + Send>;

/// A store in one file.
#[derive(Debug)]
pub struct Embedded {
    /// `None` once closed.
    jobs: Mutex<Option<mpsc::Sender<Queued>>>,
    /// Places in the queue of the writer.
    places: Arc<Semaphore>,
    writer: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
    deadline: Duration,
}

/// What the writer and the readers have in common.
struct Shared {
    path: PathBuf,
    published: Mutex<Arc<Snapshot>>,
    events: broadcast::Sender<Arc<Vec<Event>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Everything, after one commit.
pub struct Snapshot {
    table: Arc<ReadOnlyTable<&'static str, Entry>>,
    live: Arc<Live>,
    revision: u64,
}

/// The keys under a lease.
type Live = BTreeMap<String, Leased>;

#[derive(Debug, Clone)]
struct Leased {
    create_revision: u64,
    mod_revision: u64,
    value: Vec<u8>,
    lease: LeaseId,
}

impl Embedded {
    /// Opens the file, and makes it and its directory if they are not there. Blocks: the file may need repair after a crash.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if another process has it open or it cannot be opened; [`Error::Internal`] if it is damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, Box::new(Instant::now), DEADLINE)
    }

    fn open_with(path: &Path, clock: Clock, deadline: Duration) -> Result<Self, Error> {
        let unavailable = |problem: String| Error::Unavailable {
            what: "embedded store",
            detail: format!("{}: {problem}", path.display()),
        };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(|error| unavailable(format!("cannot make its directory: {error}")))?;
        }
        // It holds flags: for its owner only.
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(unavailable(format!("cannot make it: {error}"))),
        }
        Self::open_database(path, clock, deadline, || Database::create(path))
    }

    /// Opens what `create` opens; `path` is what it is called.
    fn open_database(
        path: &Path,
        clock: Clock,
        deadline: Duration,
        create: impl FnOnce() -> Result<Database, DatabaseError> + UnwindSafe,
    ) -> Result<Self, Error> {
        let unavailable = |problem: String| Error::Unavailable {
            what: "embedded store",
            detail: format!("{}: {problem}", path.display()),
        };
        // A file that was damaged or cut short can make the library panic.
        let opened = catch_unwind(|| create().and_then(|mut db| db.check_integrity().map(|_| db)));
        let opened = opened.map_err(|panic| Error::Internal(damaged(path, &panicked(panic.as_ref()))))?;
        let db = opened.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => unavailable(
                "another process has it open; stop that one or name another file (several managers share a store through etcd only)"
                    .to_owned(),
            ),
            DatabaseError::UpgradeRequired(_) => {
                Error::Internal(format!("embedded store {}: {error}: it was written by another version", path.display()))
            }
            error => match describe(path, &error.into()) {
                KvError::Permanent(detail) => Error::Internal(detail),
                other => Error::Unavailable { what: "embedded store", detail: other.to_string() },
            },
        })?;
        let (revision, table) = begin_epoch(&db).map_err(|error| match describe(path, &error) {
            KvError::Permanent(detail) => Error::Internal(detail),
            other => Error::Unavailable { what: "embedded store", detail: other.to_string() },
        })?;
        let (events, _) = broadcast::channel(BEHIND);
        let snapshot = Snapshot { table: Arc::new(table), live: Arc::default(), revision };
        let shared = Arc::new(Shared { path: path.to_owned(), published: Mutex::new(Arc::new(snapshot)), events });
        let (jobs, queue) = mpsc::channel();
        let writer = Writer::new(db, shared.clone(), revision, clock);
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|error| unavailable(format!("cannot start its writer: {error}")))?;
        Ok(Self {
            jobs: Mutex::new(Some(jobs)),
            places: Arc::new(Semaphore::new(QUEUE)),
            writer: Mutex::new(Some(writer)),
            shared,
            deadline,
        })
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<KvResult<T>>) -> Job) -> KvResult<T> {
        let ends = tokio::time::Instant::now() + self.deadline;
        let place = match timeout_at(ends, self.places.clone().acquire_owned()).await {
            Ok(place) => place.map_err(|_| closed())?,
            Err(_) => return Err(KvError::Unavailable(format!("{QUEUE} writes wait for the disk"))),
        };
        let (answer, answered) = oneshot::channel();
        self.jobs()?.send(Queued { job: job(answer), _place: place }).map_err(|_| closed())?;
        match timeout_at(ends, answered).await {
            Ok(answer) => answer.map_err(|_| KvError::Ambiguous("the writer ended".to_owned()))?,
            Err(_) => Err(KvError::Ambiguous(format!("the disk did not answer within {:?}", self.deadline))),
        }
    }

    fn jobs(&self) -> KvResult<mpsc::Sender<Queued>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)
    }

    fn now(&self) -> Arc<Snapshot> {
        self.shared.published.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn read<T: Send + 'static>(
        &self,
        at: Option<Arc<Snapshot>>,
        read: impl FnOnce(&Snapshot) -> Result<T, redb::Error> + Send + 'static,
    ) -> KvResult<(T, Arc<Snapshot>)> {
        self.jobs()?;
        let at = at.unwrap_or_else(|| self.now());
        let shared = self.shared.clone();
        let read = tokio::task::spawn_blocking(move || match read(&at) {
            Ok(answer) => Ok((answer, at)),
            Err(error) => Err(describe(&shared.path, &error)),
        });
        match timeout(self.deadline, read).await {
            Ok(read) => {
                read.unwrap_or_else(|error| Err(KvError::Permanent(damaged(&self.shared.path, &error.to_string()))))
            }
            Err(_) => Err(KvError::Unavailable(format!("the disk was not read within {:?}", self.deadline))),
        }
    }
}

impl Kv for Embedded {
    type Snapshot = Arc<Snapshot>;

    fn name(&self) -> &'static str {
        "embedded"
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        if !txn.is_read_only() {
            return self.ask(|answer| Job::Txn(txn, answer)).await;
        }
        let read = move |at: &Snapshot| {
            let succeeded = all_hold(&txn.compare, at.table.as_ref(), &at.live)?;
            let (mut reads, mut counts) = (Vec::new(), Vec::new());
            for op in if succeeded { &txn.success } else { &txn.failure } {
                match op {
                    Op::Get(get) => reads.push(get_all(get, at.table.as_ref(), &at.live)?.0),
                    Op::Oldest { range, limit } => {
                        let (read, count) = oldest(range, *limit, at.table.as_ref(), &at.live)?;
                        reads.push(read);
                        counts.push(count);
                    }
                    Op::Put { .. } | Op::Delete(_) => {}
                }
            }
            Ok(TxnResponse { succeeded, revision: at.revision, reads, counts })
        };
        Ok(self.read(None, read).await?.0)
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        let ((kvs, more), at) = self.read(at, move |at| get_all(&get, at.table.as_ref(), &at.live)).await?;
        Ok(Page { kvs, more, snapshot: at })
    }

    async fn count(&self, keys: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        let count = move |at: &Snapshot| {
            let mut count = 0;
            visit(&keys, at.table.as_ref(), &at.live, |_| {
                count += 1;
                true
            })?;
            Ok(count)
        };
        Ok(self.read(at, count).await?.0)
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (events, at) = {
            let published = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner);
            (self.shared.events.subscribe(), published.clone())
        };
        let get = Get { range: range.clone(), limit: 0, keys_only: true };
        let ((listed, _), at) = self.read(Some(at), move |at| get_all(&get, at.table.as_ref(), &at.live)).await?;
        Ok(Watch {
            revision: at.revision,
            keys: listed.into_iter().map(|kv| (kv.key, kv.create_revision)).collect(),
            events: Box::new(Watching { range, events }),
        })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        Ok((self.ask(|answer| Job::Grant(ttl, answer)).await?, ttl))
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.ask(|answer| Job::KeepAlive(lease, answer)).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.ask(|answer| Job::Revoke(lease, answer)).await
    }

    async fn close(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.places.close();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer
            && let Ok(Err(_)) = tokio::task::spawn_blocking(|| writer.join()).await
        {
            tracing::error!(path = %self.shared.path.display(), "the writer of the embedded store panicked");
        }
    }
}

struct Watching {
    range: KeyRange,
    events: broadcast::Receiver<Arc<Vec<Event>>>,
}

impl EventStream for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async {
            loop {
                let batch = self.events.recv().await.map_err(|error| KvError::Unavailable(error.to_string()))?;
                let mine: Vec<Event> = batch.iter().filter(|event| self.range.contains(&event.key)).cloned().collect();
                if !mine.is_empty() {
                    return Ok(mine);
                }
            }
        }
        .boxed()
    }
}

fn closed() -> KvError {
    KvError::Unavailable("the embedded store is closed".to_owned())
}

/// Counts a start of the process, and answers the first revision of it and the table as it is.
fn begin_epoch(db: &Database) -> Result<(u64, ReadOnlyTable<&'static str, Entry>), redb::Error> {
    let write = db.begin_write()?;
    let epoch = {
        let mut meta = write.open_table(META)?;
        let epoch = meta.get(EPOCH)?.map_or(0, |epoch| epoch.value()) + 1;
        meta.insert(EPOCH, epoch)?;
        write.open_table(ENTRIES)?;
        epoch
    };
    write.commit()?;
    Ok((epoch << COUNTER_BITS, db.begin_read()?.open_table(ENTRIES)?))
}

fn damaged(path: &Path, detail: &str) -> String {
    format!("embedded store {} is damaged: {detail}; restore it from a backup", path.display())
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it cannot be read").to_owned()
}

fn describe(path: &Path, error: &redb::Error) -> KvError {
    use std::io::ErrorKind as Kind;
    if let redb::Error::Corrupted(detail) = error {
        return KvError::Permanent(damaged(path, detail));
    }
    if matches!(error, redb::Error::Io(error) if error.kind() == Kind::UnexpectedEof) {
        return KvError::Permanent(damaged(path, "it was cut short"));
    }
    let path = path.display();
    match error {
        redb::Error::Io(error)
            if matches!(error.kind(), Kind::StorageFull | Kind::FileTooLarge | Kind::QuotaExceeded) =>
        {
            KvError::Unavailable(format!("embedded store {path}: the disk is full; free some space and restart"))
        }
        redb::Error::PreviousIo => KvError::Unavailable(format!(
            "embedded store {path}: an earlier write failed; restart once the disk is well"
        )),
        error => KvError::Unavailable(format!("embedded store {path}: {error}")),
    }
}

/// A key as it is met on the way through both places.
struct Met<'a> {
    key: &'a str,
    create_revision: u64,
    mod_revision: u64,
    value: &'a [u8],
}

/// Goes through a range in order until `on` answers false.
fn visit(
    keys: &KeyRange,
    table: &impl ReadableTable<&'static str, Entry>,
    live: &Live,
    mut on: impl FnMut(Met<'_>) -> bool,
) -> Result<(), redb::Error> {
    let bounds = (
        Bound::Included(keys.start.as_str()),
        keys.end.as_deref().map_or(Bound::Included(keys.start.as_str()), Bound::Excluded),
    );
    if keys.end.as_ref().is_some_and(|to| *to <= keys.start) {
        return Ok(());
    }
    let mut stored = table.range::<&str>(bounds)?;
    let mut leased = live.range::<str, _>(bounds).peekable();
    let mut next = stored.next().transpose()?;
    loop {
        // A key is in one place only.
        let first_leased = match (&next, leased.peek()) {
            (Some((stored, _)), Some((leased, _))) => leased.as_str() < stored.value(),
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (None, None) => return Ok(()),
        };
        if first_leased {
            if let Some((key, leased)) = leased.next()
                && !on(Met {
                    key,
                    create_revision: leased.create_revision,
                    mod_revision: leased.mod_revision,
                    value: &leased.value,
                })
            {
                return Ok(());
            }
        } else if let Some((key, entry)) = next.take() {
            let (create_revision, mod_revision, value) = entry.value();
            if !on(Met { key: key.value(), create_revision, mod_revision, value }) {
                return Ok(());
            }
            next = stored.next().transpose()?;
        }
    }
}

/// What a get answers, and whether there is more.
fn get_all(
    get: &Get,
    table: &impl ReadableTable<&'static str, Entry>,
    live: &Live,
) -> Result<(Vec<KeyValue>, bool), redb::Error> {
    let (mut kvs, mut more) = (Vec::new(), false);
    visit(&get.range, table, live, |met| {
        more = get.limit > 0 && kvs.len() == get.limit;
        if !more {
            let value = if get.keys_only { Vec::new() } else { met.value.to_vec() };
            kvs.push(KeyValue {
                key: met.key.to_owned(),
                value,
                create_revision: met.create_revision,
                mod_revision: met.mod_revision,
            });
        }
        !more
    })?;
    Ok((kvs, more))
}

/// Those of a range that came to be first, and how many there are in all.
fn oldest(
    keys: &KeyRange,
    limit: usize,
    table: &impl ReadableTable<&'static str, Entry>,
    live: &Live,
) -> Result<(Vec<KeyValue>, usize), redb::Error> {
    let (mut first, mut count) = (BTreeMap::new(), 0);
    visit(keys, table, live, |met| {
        count += 1;
        let Met { key, create_revision, mod_revision, value } = met;
        let (key, value) = (key.to_owned(), value.to_vec());
        first.insert((create_revision, key.clone()), KeyValue { key, value, create_revision, mod_revision });
        if first.len() > limit {
            first.pop_last();
        }
        true
    })?;
    Ok((first.into_values().collect(), count))
}

fn all_hold(
    compares: &[Compare],
    table: &impl ReadableTable<&'static str, Entry>,
    live: &Live,
) -> Result<bool, redb::Error> {
    for Compare { range, condition } in compares {
        let (mut any, mut all) = (false, true);
        visit(range, table, live, |met| {
            any = true;
            all = match condition {
                Condition::Exists => true,
                Condition::Absent => false,
                Condition::CreateRevision(revision) => met.create_revision == *revision,
                Condition::CreateRevisionAtMost(revision) => met.create_revision <= *revision,
                Condition::ModRevision(revision) => met.mod_revision == *revision,
                Condition::ModRevisionAtMost(revision) => met.mod_revision <= *revision,
                Condition::Value(value) => met.value == value,
            };
            all
        })?;
        let holds = match condition {
            Condition::Absent | Condition::ModRevisionAtMost(_) | Condition::CreateRevisionAtMost(_) => all,
            Condition::Exists | Condition::CreateRevision(_) | Condition::ModRevision(_) | Condition::Value(_) => {
                any && all
            }
        };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
