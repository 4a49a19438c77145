//! The one thread that writes, and what it does with each job.

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

use super::{Clock, ENTRIES, Entry, Leased, Live, Shared, Snapshot, all_hold, describe, get_all, oldest};
use crate::kv::{Event, Get, KeyRange, KvError, KvResult, LeaseId, Op, Txn, TxnResponse};

/// Writes that share a commit at most.
const GROUP: usize = 64;

/// What the writer is asked for, and where the answer goes.
#[derive(Debug)]
pub(super) enum Job {
    Txn(Txn, oneshot::Sender<KvResult<TxnResponse>>),
    Grant(Duration, oneshot::Sender<KvResult<LeaseId>>),
    KeepAlive(LeaseId, oneshot::Sender<KvResult<()>>),
    Revoke(LeaseId, oneshot::Sender<KvResult<()>>),
}

/// A job that waits for the writer, and its place in the queue.
pub(super) struct Queued {
    pub(super) job: Job,
    pub(super) _place: OwnedSemaphorePermit,
}

/// How long a lease lives, and until when unless it is kept alive.
#[derive(Debug, Clone, Copy)]
struct Granted {
    ttl: Duration,
    ends: Instant,
}

type Leases = BTreeMap<LeaseId, Granted>;

/// The one thread that writes.
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

    /// Works until the last sender of the queue is gone; wakes for a job, and when a lease runs out.
    pub(super) fn run(mut self, queue: mpsc::Receiver<Queued>) {
        loop {
            let first = match self.leases.values().map(|lease| lease.ends).min() {
                None => queue.recv().map_err(RecvTimeoutError::from),
                Some(ends) => queue.recv_timeout(ends.saturating_duration_since((self.clock)())),
            };
            let mut jobs: Vec<Job> = match first {
                Ok(first) => vec![first.job],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while jobs.len() < GROUP
                && let Ok(queued) = queue.try_recv()
            {
                jobs.push(queued.job);
            }
            self.group(jobs);
        }
    }

    /// Runs some jobs in order and commits them as one; all fail if that fails.
    fn group(&mut self, jobs: Vec<Job>) {
        let before = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut change = Change {
            live: before.live.clone(),
            leases: self.leases.clone(),
            now: (self.clock)(),
            revision: self.revision,
            durable: false,
            events: Vec::new(),
        };
        change.expire();
        let mut jobs = jobs.into_iter();
        let mut answers = Vec::new();
        match self.apply(&mut jobs, &mut change, &mut answers, &before) {
            Ok(after) => {
                self.revision = change.revision;
                self.leases = change.leases;
                let mut published = self.shared.published.lock().unwrap_or_else(PoisonError::into_inner);
                *published = Arc::new(after);
                if !change.events.is_empty() {
                    // An error means that nobody listens.
                    let _ = self.shared.events.send(Arc::new(change.events));
                }
                drop(published);
                answers.into_iter().for_each(|answer| answer(Ok(())));
            }
            Err(error) => {
                let error = describe(&self.shared.path, &error);
                tracing::error!(%error, "a write failed");
                let error = match error {
                    // It may be in the file all the same.
                    KvError::Unavailable(detail) if change.durable => KvError::Ambiguous(detail),
                    error => error,
                };
                answers.into_iter().for_each(|answer| answer(Err(error.clone())));
                jobs.for_each(|job| job.fail(error.clone()));
            }
        }
    }

    fn apply(
        &self,
        jobs: &mut impl Iterator<Item = Job>,
        change: &mut Change,
        answers: &mut Vec<Answer>,
        before: &Snapshot,
    ) -> Result<Snapshot, redb::Error> {
        let write = self.db.begin_write()?;
        {
            let mut table = write.open_table(ENTRIES)?;
            for job in jobs {
                change.job(job, &mut table, answers)?;
            }
        }
        let table = if change.durable {
            write.commit()?;
            Arc::new(self.db.begin_read()?.open_table(ENTRIES)?)
        } else {
            write.abort()?;
            before.table.clone()
        };
        Ok(Snapshot { table, live: change.live.clone(), revision: change.revision })
    }
}

/// Gives a job its answer, once it is known whether the group was committed.
type Answer = Box<dyn FnOnce(KvResult<()>)>;

fn reply<T: 'static>(to: oneshot::Sender<KvResult<T>>, value: KvResult<T>) -> Answer {
    // An error means that nobody waits for it any more.
    Box::new(move |committed| drop(to.send(committed.and(value))))
}

impl Job {
    fn fail(self, error: KvError) {
        // As above.
        match self {
            Self::Txn(_, to) => drop(to.send(Err(error))),
            Self::Grant(_, to) => drop(to.send(Err(error))),
            Self::KeepAlive(_, to) | Self::Revoke(_, to) => drop(to.send(Err(error))),
        }
    }
}

/// What a group of jobs changes.
struct Change {
    live: Arc<Live>,
    leases: Leases,
    now: Instant,
    revision: u64,
    /// Whether the file changes.
    durable: bool,
    events: Vec<Event>,
}

impl Change {
    /// Runs a job; its answer is given once the group is committed, or has failed.
    fn job(
        &mut self,
        job: Job,
        table: &mut Table<'_, &'static str, Entry>,
        answers: &mut Vec<Answer>,
    ) -> Result<(), redb::Error> {
        match job {
            Job::Txn(txn, to) => {
                let (result, failed) = match self.txn(txn, table) {
                    Ok(result) => (result, Ok(())),
                    Err(error) => (Err(KvError::Unavailable(error.to_string())), Err(error)),
                };
                answers.push(reply(to, result));
                failed?;
            }
            Job::Grant(ttl, to) => {
                self.revision += 1;
                let lease = i64::try_from(self.revision).unwrap_or(i64::MAX);
                self.leases.insert(lease, Granted { ttl, ends: self.now + ttl });
                answers.push(reply(to, Ok(lease)));
            }
            Job::KeepAlive(lease, to) => {
                let kept = self.leases.get_mut(&lease).map(|lease| lease.ends = self.now + lease.ttl);
                answers.push(reply(to, kept.ok_or(KvError::LeaseNotFound)));
            }
            Job::Revoke(lease, to) => {
                self.end(lease);
                answers.push(reply(to, Ok(())));
            }
        }
        Ok(())
    }

    /// Ends the leases whose time is over.
    fn expire(&mut self) {
        let over = self.leases.iter().filter(|(_, lease)| lease.ends <= self.now).map(|(id, _)| *id);
        for lease in over.collect::<Vec<_>>() {
            tracing::warn!(lease, "a lease has run out");
            self.end(lease);
        }
    }

    /// Ends a lease; its keys go, all at one revision.
    fn end(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease).is_none() {
            return;
        }
        self.revision += 1;
        let (revision, events) = (self.revision, &mut self.events);
        Arc::make_mut(&mut self.live).retain(|key, leased| {
            if leased.lease == lease {
                events.push(Event { key: key.clone(), revision, create_revision: None });
            }
            leased.lease != lease
        });
    }

    fn txn(
        &mut self,
        txn: Txn,
        table: &mut Table<'_, &'static str, Entry>,
    ) -> Result<KvResult<TxnResponse>, redb::Error> {
        let succeeded = all_hold(&txn.compare, table, &self.live)?;
        let ops = if succeeded { txn.success } else { txn.failure };
        let leased = |op: &Op| matches!(op, Op::Put { lease: Some(lease), .. } if !self.leases.contains_key(lease));
        if ops.iter().any(leased) {
            return Ok(Err(KvError::LeaseNotFound));
        }
        let revision = self.revision + 1;
        let (mut reads, mut counts) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Get(get) => reads.push(get_all(&get, table, &self.live)?.0),
                Op::Oldest { range, limit } => {
                    let (read, count) = oldest(&range, limit, table, &self.live)?;
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
            stored.or_else(|| self.live.get(&key).map(|leased| leased.create_revision)).unwrap_or(revision);
        match lease {
            Some(lease) => {
                if stored.is_some() {
                    table.remove(key.as_str())?;
                    self.durable = true;
                }
                let leased = Leased { create_revision, mod_revision: revision, value: value.to_vec(), lease };
                Arc::make_mut(&mut self.live).insert(key.clone(), leased);
            }
            None => {
                if self.live.contains_key(&key) {
                    Arc::make_mut(&mut self.live).remove(&key);
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
        for kv in get_all(&all, table, &self.live)?.0 {
            if self.live.contains_key(&kv.key) {
                Arc::make_mut(&mut self.live).remove(&kv.key);
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
