//! The writer thread: runs jobs in order, groups them into commits, and expires leases.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, Table};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{
    Clock, Shared,
    error::kv_error,
    snapshot::{ENTRIES, Entry, LeasedEntries, LeasedEntry, Snapshot, compares_hold, oldest, read_range},
};
use crate::kv::{Event, Get, KeyRange, KvError, KvResult, LeaseId, Op, Txn, TxnResponse};

/// The maximum number of jobs that share a commit.
const MAX_GROUP: usize = 64;

/// A request to the writer, and where to send its result.
#[derive(Debug)]
pub(super) enum Job {
    Txn(Txn, oneshot::Sender<KvResult<TxnResponse>>),
    Grant(Duration, oneshot::Sender<KvResult<LeaseId>>),
    KeepAlive(LeaseId, oneshot::Sender<KvResult<()>>),
    Revoke(LeaseId, oneshot::Sender<KvResult<()>>),
}

/// A job and its slot in the writer's queue.
pub(super) struct QueuedJob {
    pub(super) job: Job,
    pub(super) _slot: OwnedSemaphorePermit,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: Duration,
    /// When the lease expires unless it is kept alive.
    expires: Instant,
}

type Leases = BTreeMap<LeaseId, Lease>;

/// The state of the writer thread.
pub(super) struct Writer {
    db: Database,
    shared: Arc<Shared>,
    revision: u64,
    leases: Leases,
    clock: Clock,
}

impl Writer {
    pub(super) fn new(db: Database, shared: Arc<Shared>, revision: u64, clock: Clock) -> Self {
        Self { db, shared, revision, leases: Leases::new(), clock }
    }

    /// Runs until every sender of the queue is dropped. Wakes for jobs and for expiring leases.
    pub(super) fn run(mut self, queue: mpsc::Receiver<QueuedJob>) {
        loop {
            let first = match self.leases.values().map(|lease| lease.expires).min() {
                None => queue.recv().map_err(RecvTimeoutError::from),
                Some(expires) => queue.recv_timeout(expires.saturating_duration_since((self.clock)())),
            };
            let mut jobs: Vec<Job> = match first {
                Ok(first) => vec![first.job],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while jobs.len() < MAX_GROUP
                && let Ok(queued) = queue.try_recv()
            {
                jobs.push(queued.job);
            }
            self.run_group(jobs);
        }
    }

    /// Runs jobs in order and commits them as one. If the commit fails, all of them fail.
    fn run_group(&mut self, jobs: Vec<Job>) {
        let before = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut change = Change {
            leased: before.leased.clone(),
            leases: self.leases.clone(),
            now: (self.clock)(),
            revision: self.revision,
            durable: false,
            events: Vec::new(),
        };
        change.expire_leases();
        let mut jobs = jobs.into_iter();
        let mut replies = Vec::new();
        match self.apply(&mut jobs, &mut change, &mut replies, &before) {
            Ok(after) => {
                self.revision = change.revision;
                self.leases = change.leases;
                let mut published = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner);
                *published = Arc::new(after);
                if !change.events.is_empty() {
                    // Fails only if there is no watch.
                    let _ = self.shared.events.send(Arc::new(change.events));
                }
                drop(published);
                replies.into_iter().for_each(|reply| reply(Ok(())));
            }
            Err(error) => {
                let error = kv_error(&self.shared.path, &error);
                tracing::error!(%error, "a write to the embedded store failed");
                let error = match error {
                    // The failed commit may have reached the file.
                    KvError::Unavailable(detail) if change.durable => KvError::Ambiguous(detail),
                    error => error,
                };
                replies.into_iter().for_each(|reply| reply(Err(error.clone())));
                jobs.for_each(|job| job.fail(error.clone()));
            }
        }
    }

    fn apply(
        &self,
        jobs: &mut impl Iterator<Item = Job>,
        change: &mut Change,
        replies: &mut Vec<Reply>,
        before: &Snapshot,
    ) -> Result<Snapshot, redb::Error> {
        let write = self.db.begin_write()?;
        {
            let mut table = write.open_table(ENTRIES)?;
            for job in jobs {
                change.run_job(job, &mut table, replies)?;
            }
        }
        let table = if change.durable {
            write.commit()?;
            Arc::new(self.db.begin_read()?.open_table(ENTRIES)?)
        } else {
            write.abort()?;
            before.table.clone()
        };
        Ok(Snapshot { table, leased: change.leased.clone(), revision: change.revision })
    }
}

/// Sends a job its result once the group's commit has succeeded or failed.
type Reply = Box<dyn FnOnce(KvResult<()>)>;

fn reply<T: 'static>(to: oneshot::Sender<KvResult<T>>, result: KvResult<T>) -> Reply {
    // Sending fails only if the caller has stopped waiting.
    Box::new(move |committed| drop(to.send(committed.and(result))))
}

impl Job {
    fn fail(self, error: KvError) {
        // Sending fails only if the caller has stopped waiting.
        match self {
            Self::Txn(_, to) => drop(to.send(Err(error))),
            Self::Grant(_, to) => drop(to.send(Err(error))),
            Self::KeepAlive(_, to) | Self::Revoke(_, to) => drop(to.send(Err(error))),
        }
    }
}

/// The changes of one group of jobs.
struct Change {
    leased: Arc<LeasedEntries>,
    leases: Leases,
    now: Instant,
    revision: u64,
    /// Whether the file changes too, so that the group needs a commit.
    durable: bool,
    events: Vec<Event>,
}

impl Change {
    /// Runs a job; its reply is sent when the group has been committed or has failed.
    fn run_job(
        &mut self,
        job: Job,
        table: &mut Table<'_, &'static str, Entry>,
        replies: &mut Vec<Reply>,
    ) -> Result<(), redb::Error> {
        match job {
            Job::Txn(txn, to) => {
                let (result, failed) = match self.txn(txn, table) {
                    Ok(result) => (result, Ok(())),
                    Err(error) => (Err(KvError::Unavailable(error.to_string())), Err(error)),
                };
                replies.push(reply(to, result));
                failed?;
            }
            Job::Grant(ttl, to) => {
                self.revision += 1;
                let lease = i64::try_from(self.revision).unwrap_or(i64::MAX);
                self.leases.insert(lease, Lease { ttl, expires: self.now + ttl });
                replies.push(reply(to, Ok(lease)));
            }
            Job::KeepAlive(lease, to) => {
                let renewed = self.leases.get_mut(&lease).map(|lease| lease.expires = self.now + lease.ttl);
                replies.push(reply(to, renewed.ok_or(KvError::LeaseNotFound)));
            }
            Job::Revoke(lease, to) => {
                self.revoke(lease);
                replies.push(reply(to, Ok(())));
            }
        }
        Ok(())
    }

    fn expire_leases(&mut self) {
        let expired = self.leases.iter().filter(|(_, lease)| lease.expires <= self.now).map(|(id, _)| *id);
        for lease in expired.collect::<Vec<_>>() {
            tracing::warn!(lease, "a lease expired: it was not kept alive for its time to live");
            self.revoke(lease);
        }
    }

    /// Removes a lease and deletes its keys, all at one revision.
    fn revoke(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease).is_none() {
            return;
        }
        self.revision += 1;
        let (revision, events) = (self.revision, &mut self.events);
        Arc::make_mut(&mut self.leased).retain(|key, entry| {
            if entry.lease == lease {
                events.push(Event { key: key.clone(), revision, create_revision: None });
            }
            entry.lease != lease
        });
    }

    fn txn(
        &mut self,
        txn: Txn,
        table: &mut Table<'_, &'static str, Entry>,
    ) -> Result<KvResult<TxnResponse>, redb::Error> {
        let succeeded = compares_hold(&txn.compare, table, &self.leased)?;
        let ops = if succeeded { txn.success } else { txn.failure };
        let without_lease =
            |op: &Op| matches!(op, Op::Put { lease: Some(lease), .. } if !self.leases.contains_key(lease));
        if ops.iter().any(without_lease) {
            return Ok(Err(KvError::LeaseNotFound));
        }
        let revision = self.revision + 1;
        let (mut reads, mut counts) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Get(get) => reads.push(read_range(&get, table, &self.leased)?.0),
                Op::Oldest { range, limit } => {
                    let (read, count) = oldest(&range, limit, table, &self.leased)?;
                    reads.push(read);
                    counts.push(count);
                }
                Op::Put { key, value, lease } => self.put(key, &value, lease, revision, table)?,
                Op::Delete(range) => self.delete(&range, revision, table)?,
            }
        }
        Ok(Ok(TxnResponse { succeeded, revision: self.revision, reads, counts }))
    }

    fn put(
        &mut self,
        key: String,
        value: &[u8],
        lease: Option<LeaseId>,
        revision: u64,
        table: &mut Table<'_, &'static str, Entry>,
    ) -> Result<(), redb::Error> {
        let stored = table.get(key.as_str())?.map(|entry| entry.value().0);
        let create_revision =
            stored.or_else(|| self.leased.get(&key).map(|entry| entry.create_revision)).unwrap_or(revision);
        match lease {
            Some(lease) => {
                if stored.is_some() {
                    table.remove(key.as_str())?;
                    self.durable = true;
                }
                let entry = LeasedEntry { create_revision, mod_revision: revision, value: value.to_vec(), lease };
                Arc::make_mut(&mut self.leased).insert(key.clone(), entry);
            }
            None => {
                // Checked first: `make_mut` copies the whole map while a snapshot shares it.
                if self.leased.contains_key(&key) {
                    Arc::make_mut(&mut self.leased).remove(&key);
                }
                table.insert(key.as_str(), (create_revision, revision, value))?;
                self.durable = true;
            }
        }
        self.revision = revision;
        self.events.push(Event { key, revision, create_revision: Some(create_revision) });
        Ok(())
    }

    fn delete(
        &mut self,
        range: &KeyRange,
        revision: u64,
        table: &mut Table<'_, &'static str, Entry>,
    ) -> Result<(), redb::Error> {
        let all = Get { range: range.clone(), limit: 0, keys_only: true };
        for kv in read_range(&all, table, &self.leased)?.0 {
            if self.leased.contains_key(&kv.key) {
                Arc::make_mut(&mut self.leased).remove(&kv.key);
            } else {
                table.remove(kv.key.as_str())?;
                self.durable = true;
            }
            self.revision = revision;
            self.events.push(Event { key: kv.key, revision, create_revision: None });
        }
        Ok(())
    }
}
