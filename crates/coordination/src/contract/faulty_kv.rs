//! A key-value store that counts calls and injects faults.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::Semaphore;

use crate::kv::{Get, KeyRange, Kv, KvError, KvResult, LeaseId, Page, Txn, TxnResponse, Watch};

/// What happens to the next transaction.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// The transaction is applied and its response is lost.
    LostResponse,
    /// The request is lost; the caller cannot tell.
    LostRequest,
    /// The request is applied by [`TestKv::deliver_late_requests`]; the caller stops waiting before that.
    LateRequest,
    /// The request is applied after [`TestKv::release_blocked`]; the caller waits for it.
    Blocked,
}

/// A snapshot and the number of compactions before it was read.
#[derive(Clone)]
pub(super) struct TestSnapshot<S> {
    inner: S,
    compactions: usize,
}

/// One replica's client of a store, with counters and faults of its own.
pub(super) struct FaultyKv<K> {
    inner: Arc<K>,
    calls: Mutex<BTreeMap<&'static str, usize>>,
    largest_read: AtomicUsize,
    page_ranges: Mutex<Vec<KeyRange>>,
    faults: Mutex<VecDeque<Fault>>,
    late_requests: Mutex<Vec<Txn>>,
    deadline: Mutex<Duration>,
    compactions: AtomicUsize,
    /// One permit per [`Fault::Blocked`] transaction that may run.
    released: Semaphore,
    keep_alive_calls: AtomicUsize,
    keep_alive_hangs: AtomicBool,
    revoke_fails: AtomicBool,
    revoke_hangs: AtomicBool,
}

/// A store whose calls tests can count and disturb.
pub(super) trait TestKv: Kv {
    /// Injects a fault into the next transaction; faults queue up.
    fn inject(&self, fault: Fault);
    /// Clears the counters.
    fn reset(&self);
    /// The number of calls by name since the last reset, without lease calls.
    fn calls(&self) -> BTreeMap<&'static str, usize>;
    /// Changes the deadline that the store reports.
    fn set_deadline(&self, deadline: Duration);
    /// Applies the transactions of [`Fault::LateRequest`].
    fn deliver_late_requests(&self) -> impl Future<Output = ()> + Send;
    /// The ranges whose pages were read since the last reset.
    fn page_ranges(&self) -> Vec<KeyRange>;
    /// The largest number of keys that one transaction read since the last reset.
    fn largest_read(&self) -> usize;
    /// Makes every earlier snapshot fail with [`KvError::Compacted`].
    fn compact(&self);
    /// Lets one [`Fault::Blocked`] transaction run.
    fn release_blocked(&self);
    /// The number of keepalive calls.
    fn keep_alive_calls(&self) -> usize;
    /// Makes keepalive calls hang from now on.
    fn hang_keep_alive(&self);
    /// Makes revoke calls fail from now on.
    fn fail_revoke(&self);
    /// Makes revoke calls hang from now on.
    fn hang_revoke(&self);
}

impl<K: Kv> TestKv for FaultyKv<K> {
    fn inject(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }

    fn reset(&self) {
        self.calls.lock().unwrap().clear();
        self.page_ranges.lock().unwrap().clear();
        self.largest_read.store(0, Ordering::SeqCst);
    }

    fn calls(&self) -> BTreeMap<&'static str, usize> {
        self.calls.lock().unwrap().clone()
    }

    fn set_deadline(&self, deadline: Duration) {
        *self.deadline.lock().unwrap() = deadline;
    }

    async fn deliver_late_requests(&self) {
        let late = std::mem::take(&mut *self.late_requests.lock().unwrap());
        for txn in late {
            self.inner.txn(txn).await.unwrap();
        }
    }

    fn page_ranges(&self) -> Vec<KeyRange> {
        self.page_ranges.lock().unwrap().clone()
    }

    fn largest_read(&self) -> usize {
        self.largest_read.load(Ordering::SeqCst)
    }

    fn compact(&self) {
        self.compactions.fetch_add(1, Ordering::SeqCst);
    }

    fn release_blocked(&self) {
        self.released.add_permits(1);
    }

    fn keep_alive_calls(&self) -> usize {
        self.keep_alive_calls.load(Ordering::SeqCst)
    }

    fn hang_keep_alive(&self) {
        self.keep_alive_hangs.store(true, Ordering::SeqCst);
    }

    fn fail_revoke(&self) {
        self.revoke_fails.store(true, Ordering::SeqCst);
    }

    fn hang_revoke(&self) {
        self.revoke_hangs.store(true, Ordering::SeqCst);
    }
}

impl<K: Kv> FaultyKv<K> {
    pub(super) fn new(inner: &Arc<K>) -> Self {
        Self {
            deadline: Mutex::new(inner.deadline()),
            inner: inner.clone(),
            calls: Mutex::default(),
            largest_read: AtomicUsize::new(0),
            page_ranges: Mutex::default(),
            faults: Mutex::default(),
            late_requests: Mutex::default(),
            compactions: AtomicUsize::new(0),
            released: Semaphore::new(0),
            keep_alive_calls: AtomicUsize::new(0),
            keep_alive_hangs: AtomicBool::new(false),
            revoke_fails: AtomicBool::new(false),
            revoke_hangs: AtomicBool::new(false),
        }
    }

    /// Unwraps a snapshot; fails if it is from before a compaction.
    fn inner_snapshot(&self, at: Option<TestSnapshot<K::Snapshot>>) -> KvResult<Option<K::Snapshot>> {
        match at {
            Some(at) if at.compactions < self.compactions.load(Ordering::SeqCst) => Err(KvError::Compacted),
            at => Ok(at.map(|at| at.inner)),
        }
    }

    fn count_call(&self, call: &'static str) {
        *self.calls.lock().unwrap().entry(call).or_default() += 1;
    }
}

impl<K: Kv> Kv for FaultyKv<K> {
    type Snapshot = TestSnapshot<K::Snapshot>;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn deadline(&self) -> Duration {
        *self.deadline.lock().unwrap()
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        self.count_call("txn");
        let fault = self.faults.lock().unwrap().pop_front();
        match fault {
            None => {
                let response = self.inner.txn(txn).await?;
                self.largest_read.fetch_max(response.reads.iter().map(Vec::len).sum(), Ordering::SeqCst);
                Ok(response)
            }
            Some(Fault::LostResponse) => {
                self.inner.txn(txn).await?;
                Err(KvError::Ambiguous("injected".to_owned()))
            }
            Some(Fault::LostRequest) => Err(KvError::Ambiguous("injected".to_owned())),
            Some(Fault::LateRequest) => {
                self.late_requests.lock().unwrap().push(txn);
                Err(KvError::Ambiguous("injected".to_owned()))
            }
            Some(Fault::Blocked) => {
                self.released.acquire().await.unwrap().forget();
                self.inner.txn(txn).await
            }
        }
    }

    async fn page(&self, get: Get, at: Option<Self::Snapshot>) -> KvResult<Page<Self::Snapshot>> {
        self.count_call("page");
        self.page_ranges.lock().unwrap().push(get.range.clone());
        let at = self.inner_snapshot(at)?;
        let Page { kvs, more, snapshot } = self.inner.page(get, at).await?;
        let snapshot = TestSnapshot { inner: snapshot, compactions: self.compactions.load(Ordering::SeqCst) };
        Ok(Page { kvs, more, snapshot })
    }

    async fn count(&self, range: KeyRange, at: Option<Self::Snapshot>) -> KvResult<u64> {
        self.count_call("count");
        let at = self.inner_snapshot(at)?;
        self.inner.count(range, at).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        self.count_call("watch");
        self.inner.list_and_watch(range).await
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.keep_alive_calls.fetch_add(1, Ordering::SeqCst);
        if self.keep_alive_hangs.load(Ordering::SeqCst) {
            std::future::pending().await
        }
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        if self.revoke_hangs.load(Ordering::SeqCst) {
            std::future::pending().await
        }
        if self.revoke_fails.load(Ordering::SeqCst) {
            return Err(KvError::Unavailable("injected".to_owned()));
        }
        self.inner.revoke(lease).await
    }

    /// Does nothing: the fixture owns the store.
    async fn close(&self) {}
}
