//! The etcd backend, shared by many replicas.
//!
//! The client library doesn't fail over, so this module keeps one client per endpoint and does it here. A call goes to the endpoint that
//! answered last. A call that was never sent is retried on the next endpoint, and so is a read. A write without a response returns
//! [`KvError::Ambiguous`] and isn't retried.

mod call_error;
mod config;
mod connections;
mod wire;

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{Client, TxnOpResponse, WatchOptions};
use gauntlet_domain::Error;
use gauntlet_telemetry::db::{Database, Operation};
use tokio::time::{Instant, timeout_at};

pub use self::config::{EtcdConfig, EtcdTls};
use self::{
    call_error::{CallError, Outcome},
    connections::Connections,
};
use crate::kv::{Get, KeyRange, Kv, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse, Watch};

/// The largest response accepted, in bytes.
const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;
/// Keys per page when a range is listed before it is watched.
const LIST_PAGE: usize = 4096;

/// A client of an etcd cluster.
pub struct Etcd {
    connections: Connections,
    /// The index of the endpoint that answered last.
    current: AtomicUsize,
    deadline: Duration,
    database: Database,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.connections.addresses()).finish()
    }
}

impl Etcd {
    /// Checks the configuration and reads its files. Connects on the first call.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the setting that is wrong.
    pub fn new(config: &EtcdConfig, database: Database) -> Result<Self, Error> {
        Ok(Self {
            connections: Connections::new(config)?,
            current: AtomicUsize::new(0),
            deadline: config.deadline,
            database,
        })
    }

    /// Selects the endpoint for the first call, by `number` modulo the number of endpoints. Spreads replicas over the members.
    pub(crate) fn start_at(&self, number: u64) {
        let all = u64::try_from(self.connections.len()).unwrap_or(u64::MAX).max(1);
        self.current.store(usize::try_from(number % all).unwrap_or(0), Ordering::Relaxed);
    }

    /// Makes a call. A `repeatable` one is retried on the next endpoint if its outcome is unknown.
    async fn call<T, F>(&self, operation: Operation, repeatable: bool, call: impl Fn(Client) -> F) -> KvResult<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + self.deadline;
        let first = self.current.load(Ordering::Relaxed);
        let all = self.connections.len();
        let mut last = KvError::Unavailable("no endpoint".to_owned());
        for (tried, index) in (first..first + all).map(|index| index % all).enumerate() {
            let address = self.connections.address(index);
            // A call that can be retried elsewhere must leave time for the retry.
            let left = deadline.saturating_duration_since(Instant::now());
            let deadline = if repeatable && tried + 1 < all { Instant::now() + left / 2 } else { deadline };
            let attempt = async {
                let client =
                    timeout_at(deadline, self.connections.client(index)).await.map_err(|_| CallError::Deadline)??;
                timeout_at(deadline, call(client)).await.map_err(|_| CallError::Deadline)?.map_err(CallError::from)
            };
            match self.database.call(operation, address, CallError::code, attempt).await {
                Ok(response) => {
                    if tried > 0 {
                        self.current.store(index, Ordering::Relaxed);
                    }
                    return Ok(response);
                }
                Err(error) => {
                    let detail = format!("{address}: {error}");
                    match error.outcome() {
                        Outcome::Refused(error) => return Err(error),
                        Outcome::Unknown if !repeatable => {
                            self.current.store((index + 1) % all, Ordering::Relaxed);
                            return Err(KvError::Ambiguous(detail));
                        }
                        Outcome::Unknown | Outcome::NotSent => last = KvError::Unavailable(detail),
                    }
                }
            }
        }
        Err(last)
    }
}

impl Kv for Etcd {
    /// A revision.
    type Snapshot = i64;

    fn name(&self) -> &'static str {
        "etcd"
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let repeatable = txn.is_read_only();
        // Per read of a branch: whether it also counts.
        let counted =
            |ops: &[Op]| ops.iter().filter(|op| op.is_read()).map(|op| matches!(op, Op::Oldest { .. })).collect();
        let (success, failure): (Vec<bool>, Vec<bool>) = (counted(&txn.success), counted(&txn.failure));
        let txn = wire::txn(txn);
        let call = self.call(Operation::Txn, repeatable, |client| {
            let (mut kv, txn) = (client.kv_client().max_decoding_message_size(MAX_RESPONSE_BYTES), txn.clone());
            async move { kv.txn(txn).await }
        });
        let response = call.await?;
        let succeeded = response.succeeded();
        let revision = wire::revision(response.header());
        let read = response.op_responses().into_iter().filter_map(|response| match response {
            TxnOpResponse::Get(get) => Some(get),
            TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
        });
        let (mut reads, mut counts) = (Vec::new(), Vec::new());
        for (mut get, counted) in read.zip(if succeeded { success } else { failure }) {
            reads.push(get.take_kvs().into_iter().filter_map(wire::key_value).collect());
            if counted {
                counts.push(usize::try_from(get.count()).unwrap_or(0));
            }
        }
        Ok(TxnResponse { succeeded, revision, reads, counts })
    }

    async fn page(&self, get: Get, at: Option<i64>) -> KvResult<Page<i64>> {
        let options = wire::get_options(&get).with_revision(at.unwrap_or(0));
        let call = self.call(Operation::Range, true, |client| {
            let (key, options) = (get.range.start.clone(), options.clone());
            let mut kv = client.kv_client().max_decoding_message_size(MAX_RESPONSE_BYTES);
            async move { kv.get(key, Some(options)).await }
        });
        let mut response = call.await?;
        let latest = response.header().map_or(0, |header| header.revision());
        Ok(Page {
            more: response.more(),
            kvs: response.take_kvs().into_iter().filter_map(wire::key_value).collect(),
            snapshot: at.unwrap_or(latest),
        })
    }

    async fn count(&self, range: KeyRange, at: Option<i64>) -> KvResult<u64> {
        let get = Get { range, limit: 0, keys_only: false };
        let options = wire::get_options(&get).with_count_only().with_revision(at.unwrap_or(0));
        let call = self.call(Operation::Range, true, |client| {
            let (mut kv, key, options) = (client.kv_client(), get.range.start.clone(), options.clone());
            async move { kv.get(key, Some(options)).await }
        });
        Ok(u64::try_from(call.await?.count()).unwrap_or(0))
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (mut keys, mut at, mut rest) = (BTreeMap::new(), None, Some(range.clone()));
        while let Some(left) = rest.take() {
            let get = Get { range: left, limit: LIST_PAGE, keys_only: true };
            let page = match self.page(get.clone(), at).await {
                // The whole list must be of one revision: start over at the latest.
                Err(KvError::Compacted) => {
                    (keys, at, rest) = (BTreeMap::new(), None, Some(range.clone()));
                    continue;
                }
                page => page?,
            };
            at = Some(page.snapshot);
            if page.more
                && let Some(last) = page.kvs.last()
            {
                rest = Some(KeyRange { start: format!("{}\0", last.key), ..get.range });
            }
            keys.extend(page.kvs.into_iter().map(|kv| (kv.key, kv.create_revision)));
        }
        let listed_at = at.unwrap_or(0);
        let mut options = WatchOptions::new().with_start_revision(listed_at + 1);
        if let Some(end) = &range.end {
            options = options.with_range(end.as_str());
        }
        let call = self.call(Operation::Watch, true, |client| {
            let (mut watch, key, options) = (client.watch_client(), range.start.clone(), options.clone());
            async move {
                let mut stream = watch.watch(key, Some(options)).await?;
                // The server confirms the watch in its first message.
                match stream.message().await? {
                    Some(created) if created.created() && !created.canceled() => Ok(stream),
                    refused => Err(etcd_client::Error::WatchError(format!("not created: {refused:?}"))),
                }
            }
        });
        let events = Box::new(wire::EtcdEvents(call.await?));
        Ok(Watch { revision: u64::try_from(listed_at).unwrap_or(0), keys, events })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        // Repeatable: a lease that was granted without a response expires by itself.
        let call = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.grant(seconds, None).await }
        });
        let response = call.await?;
        Ok((response.id(), Duration::from_secs(u64::try_from(response.ttl()).unwrap_or(0))))
    }

    async fn keep_alive(&self, id: LeaseId) -> KvResult<()> {
        // The library waits for the first response and fails if the lease doesn't exist.
        let call = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.keep_alive(id).await }
        });
        call.await.map(|_| ())
    }

    async fn revoke(&self, id: LeaseId) -> KvResult<()> {
        let call = self.call(Operation::Lease, true, |client| {
            let mut lease = client.lease_client();
            async move { lease.revoke(id).await }
        });
        match call.await {
            Ok(_) | Err(KvError::LeaseNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Does nothing: a connection closes with its last call.
    async fn close(&self) {}
}

#[cfg(test)]
mod tests;
