//! The embedded backend: one file, one process.
//!
//! Keys without a lease are stored in the file. Keys attached to a lease are kept in memory only: they vanish with the process, as if their
//! leases had expired. One thread writes; transactions that queue up meanwhile share the next commit and its single fsync. Readers see the
//! last commit and never wait for the next. The writer thread also expires leases, by the clock it is given.
//!
//! A revision is the number of process starts (stored in the file) times 2^40, plus a counter. Revisions grow across restarts although the
//! counter is never stored.

mod error;
mod snapshot;
mod writer;

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    panic::{UnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::Error;
use redb::{Database, DatabaseError, ReadOnlyTable, ReadableDatabase as _, ReadableTable as _};
use tokio::{
    sync::{Semaphore, broadcast, oneshot},
    time::{timeout, timeout_at},
};

use self::{
    error::{damaged, kv_error, panic_message},
    snapshot::{ENTRIES, EPOCH, Entry, META, Snapshot, compares_hold, count, oldest, read_range},
    writer::{Job, QueuedJob, Writer},
};
use crate::kv::{Event, EventStream, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse, Watch};

/// The low bits of a revision, which count within one process.
const COUNTER_BITS: u32 = 40;
/// Jobs that may wait for the writer.
const WRITE_QUEUE: usize = 1024;
/// Commits that a watch may lag behind before it ends and the range must be listed again.
const WATCH_BUFFER: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(10);

/// The clock for lease expiry; must be monotonic.
type Clock = Box<dyn Fn() -> Instant + Send>;

/// A store in one file.
#[derive(Debug)]
pub struct Embedded {
    /// `None` once the store is closed.
    jobs: Mutex<Option<mpsc::Sender<QueuedJob>>>,
    /// Bounds the jobs that wait for the writer.
    queue_slots: Arc<Semaphore>,
    writer: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
    deadline: Duration,
}

/// The state that the writer publishes to readers.
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

impl Embedded {
    /// Opens the file; creates it and its directory if they don't exist. Blocks: the file may need repair after a crash.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if another process has the file open or it cannot be opened; [`Error::Internal`] if it is damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, Box::new(Instant::now), DEADLINE)
    }

    fn open_with(path: &Path, clock: Clock, deadline: Duration) -> Result<Self, Error> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .map_err(|error| unavailable(path, format!("cannot create its directory: {error}")))?;
        }
        // The records contain flags, so only the owner may read the file.
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(unavailable(path, format!("cannot create it: {error}"))),
        }
        Self::open_database(path, clock, deadline, || Database::create(path))
    }

    /// Opens the database that `create` returns; `path` is only used in messages.
    fn open_database(
        path: &Path,
        clock: Clock,
        deadline: Duration,
        create: impl FnOnce() -> Result<Database, DatabaseError> + UnwindSafe,
    ) -> Result<Self, Error> {
        // redb can panic on a damaged or truncated file.
        let opened = catch_unwind(|| create().and_then(|mut db| db.check_integrity().map(|_| db)));
        let opened = opened.map_err(|panic| Error::Internal(damaged(path, &panic_message(panic.as_ref()))))?;
        let db = opened.map_err(|error| open_error(path, error))?;
        let (revision, table) = begin_epoch(&db).map_err(|error| domain_error(kv_error(path, &error)))?;
        let (events, _) = broadcast::channel(WATCH_BUFFER);
        let snapshot = Snapshot { table: Arc::new(table), leased: Arc::default(), revision };
        let shared = Arc::new(Shared { path: path.to_owned(), published: Mutex::new(Arc::new(snapshot)), events });
        let (jobs, queue) = mpsc::channel();
        let writer = Writer::new(db, shared.clone(), revision, clock);
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|error| unavailable(path, format!("cannot start its writer thread: {error}")))?;
        Ok(Self {
            jobs: Mutex::new(Some(jobs)),
            queue_slots: Arc::new(Semaphore::new(WRITE_QUEUE)),
            writer: Mutex::new(Some(writer)),
            shared,
            deadline,
        })
    }

    /// Queues a job for the writer and waits for its result.
    async fn run_job<T>(&self, job: impl FnOnce(oneshot::Sender<KvResult<T>>) -> Job) -> KvResult<T> {
        let deadline = tokio::time::Instant::now() + self.deadline;
        let slot = match timeout_at(deadline, self.queue_slots.clone().acquire_owned()).await {
            Ok(slot) => slot.map_err(|_| closed())?,
            Err(_) => {
                return Err(KvError::Unavailable(format!("the disk is too slow: {WRITE_QUEUE} writes are queued")));
            }
        };
        let (reply, result) = oneshot::channel();
        self.jobs()?.send(QueuedJob { job: job(reply), _slot: slot }).map_err(|_| closed())?;
        match timeout_at(deadline, result).await {
            Ok(result) => result.map_err(|_| KvError::Ambiguous("the writer thread ended".to_owned()))?,
            Err(_) => Err(KvError::Ambiguous(format!("the disk did not answer within {:?}", self.deadline))),
        }
    }

    fn jobs(&self) -> KvResult<mpsc::Sender<QueuedJob>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)
    }

    fn latest(&self) -> Arc<Snapshot> {
        self.shared.published.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads from a snapshot, or from the latest one, on a blocking thread.
    async fn read<T: Send + 'static>(
        &self,
        at: Option<Arc<Snapshot>>,
        read: impl FnOnce(&Snapshot) -> Result<T, redb::Error> + Send + 'static,
    ) -> KvResult<(T, Arc<Snapshot>)> {
        self.jobs()?;
        let at = at.unwrap_or_else(|| self.latest());
        let shared = self.shared.clone();
        let read = tokio::task::spawn_blocking(move || match read(&at) {
            Ok(value) => Ok((value, at)),
            Err(error) => Err(kv_error(&shared.path, &error)),
        });
        match timeout(self.deadline, read).await {
            Ok(read) => {
                // The task fails only by a panic of redb.
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
            return self.run_job(|reply| Job::Txn(txn, reply)).await;
        }
        let read = move |at: &Snapshot| {
            let succeeded = compares_hold(&txn.compare, at.table.as_ref(), &at.leased)?;
            let (mut reads, mut counts) = (Vec::new(), Vec::new());
            for op in if succeeded { &txn.success } else { &txn.failure } {
                match op {
                    Op::Get(get) => reads.push(read_range(get, at.table.as_ref(), &at.leased)?.0),
                    Op::Oldest { range, limit } => {
                        let (read, count) = oldest(range, *limit, at.table.as_ref(), &at.leased)?;
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
        let ((kvs, more), snapshot) = self.read(at, move |at| read_range(&get, at.table.as_ref(), &at.leased)).await?;
        Ok(Page { kvs, more, snapshot })
    }

    async fn count(&self, range: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        Ok(self.read(at, move |at| count(&range, at.table.as_ref(), &at.leased)).await?.0)
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        // Under one lock: no commit is published between the list and the first event.
        let (events, at) = {
            let published = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner);
            (self.shared.events.subscribe(), published.clone())
        };
        let get = Get { range: range.clone(), limit: 0, keys_only: true };
        let ((listed, _), at) = self.read(Some(at), move |at| read_range(&get, at.table.as_ref(), &at.leased)).await?;
        Ok(Watch {
            revision: at.revision,
            keys: listed.into_iter().map(|kv| (kv.key, kv.create_revision)).collect(),
            events: Box::new(EmbeddedEvents { range, events }),
        })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        Ok((self.run_job(|reply| Job::Grant(ttl, reply)).await?, ttl))
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.run_job(|reply| Job::KeepAlive(lease, reply)).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.run_job(|reply| Job::Revoke(lease, reply)).await
    }

    async fn close(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.queue_slots.close();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer
            && let Ok(Err(_)) = tokio::task::spawn_blocking(|| writer.join()).await
        {
            tracing::error!(path = %self.shared.path.display(), "the writer thread of the embedded store panicked");
        }
    }
}

struct EmbeddedEvents {
    range: KeyRange,
    events: broadcast::Receiver<Arc<Vec<Event>>>,
}

impl EventStream for EmbeddedEvents {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async {
            loop {
                let commit = self.events.recv().await.map_err(|error| KvError::Unavailable(error.to_string()))?;
                let events: Vec<Event> =
                    commit.iter().filter(|event| self.range.contains(&event.key)).cloned().collect();
                if !events.is_empty() {
                    return Ok(events);
                }
            }
        }
        .boxed()
    }
}

/// Counts a process start; returns its first revision and the current table.
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

fn closed() -> KvError {
    KvError::Unavailable("the embedded store is closed".to_owned())
}

fn unavailable(path: &Path, problem: String) -> Error {
    Error::Unavailable { what: "embedded store", detail: format!("{}: {problem}", path.display()) }
}

fn open_error(path: &Path, error: DatabaseError) -> Error {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => unavailable(
            path,
            "another process has it open; stop that process or name another file (several managers share a store through etcd only)"
                .to_owned(),
        ),
        DatabaseError::UpgradeRequired(_) => {
            Error::Internal(format!("embedded store {}: {error}: another version wrote it", path.display()))
        }
        error => domain_error(kv_error(path, &error.into())),
    }
}

fn domain_error(error: KvError) -> Error {
    match error {
        KvError::Permanent(detail) => Error::Internal(detail),
        other => Error::Unavailable { what: "embedded store", detail: other.to_string() },
    }
}

#[cfg(test)]
mod tests;
