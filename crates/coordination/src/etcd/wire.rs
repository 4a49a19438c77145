//! Conversions between the key-value port's types and the client library's.

use etcd_client::{
    CompareOp, DeleteOptions, EventType, GetOptions, PutOptions, ResponseHeader, SortOrder, SortTarget, TxnOp,
    WatchStream,
};
use futures::{FutureExt as _, future::BoxFuture};

use super::call_error::CallError;
use crate::kv::{Compare, Condition, Event, EventStream, Get, KeyValue, KvError, KvResult, Op, Txn};

/// A watch's events, after the server has confirmed the watch.
pub(super) struct EtcdEvents(pub(super) WatchStream);

impl EventStream for EtcdEvents {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Event>>> {
        async {
            let ended = |detail: String| KvError::Unavailable(format!("watch: {detail}"));
            match self.0.message().await {
                Err(error) => Err(ended(CallError::Client(error).to_string())),
                Ok(None) => Err(ended("ended by the server".to_owned())),
                Ok(Some(message)) if message.canceled() => Err(ended(message.cancel_reason().to_owned())),
                Ok(Some(message)) => Ok(message.events().iter().filter_map(event).collect()),
            }
        }
        .boxed()
    }
}

fn event(event: &etcd_client::Event) -> Option<Event> {
    let kv = event.kv()?;
    let create_revision = match event.event_type() {
        EventType::Put => Some(unsigned(kv.create_revision())),
        EventType::Delete => None,
    };
    Some(Event { key: kv.key_str().ok()?.to_owned(), revision: unsigned(kv.mod_revision()), create_revision })
}

/// The revision in a response's header; 0 without one.
pub(super) fn revision(header: Option<&ResponseHeader>) -> u64 {
    header.map_or(0, |header| unsigned(header.revision()))
}

fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

/// Returns `None` if the key isn't UTF-8: no such key is written by this crate.
pub(super) fn key_value(kv: etcd_client::KeyValue) -> Option<KeyValue> {
    let (create_revision, mod_revision) = (unsigned(kv.create_revision()), unsigned(kv.mod_revision()));
    let (key, value) = kv.into_key_value();
    Some(KeyValue { key: String::from_utf8(key).ok()?, value, create_revision, mod_revision })
}

pub(super) fn txn(txn: Txn) -> etcd_client::Txn {
    etcd_client::Txn::new()
        .when(txn.compare.into_iter().map(compare).collect::<Vec<_>>())
        .and_then(txn.success.into_iter().map(op).collect::<Vec<_>>())
        .or_else(txn.failure.into_iter().map(op).collect::<Vec<_>>())
}

fn compare(compare: Compare) -> etcd_client::Compare {
    use etcd_client::Compare as C;
    let Compare { range, condition } = compare;
    let key = range.start;
    // An absent key has revisions of 0 and no value to compare.
    let compare = match condition {
        Condition::Exists => C::create_revision(key, CompareOp::Greater, 0),
        Condition::Absent => C::create_revision(key, CompareOp::Equal, 0),
        Condition::CreateRevision(revision) => C::create_revision(key, CompareOp::Equal, signed(revision)),
        Condition::CreateRevisionAtMost(revision) => {
            C::create_revision(key, CompareOp::Less, signed(revision).saturating_add(1))
        }
        Condition::ModRevision(revision) => C::mod_revision(key, CompareOp::Equal, signed(revision)),
        Condition::ModRevisionAtMost(revision) => {
            C::mod_revision(key, CompareOp::Less, signed(revision).saturating_add(1))
        }
        Condition::Value(value) => C::value(key, CompareOp::Equal, value),
    };
    match range.end {
        None => compare,
        Some(end) => compare.with_range(end),
    }
}

fn op(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => TxnOp::put(key, value, lease.map(|lease| PutOptions::new().with_lease(lease))),
        Op::Delete(range) => TxnOp::delete(range.start, range.end.map(|end| DeleteOptions::new().with_range(end))),
        Op::Get(get) => {
            let options = get_options(&get);
            TxnOp::get(get.range.start, Some(options))
        }
        Op::Oldest { range, limit } => {
            let options = get_options(&Get { range: range.clone(), limit, keys_only: false });
            TxnOp::get(range.start, Some(options.with_sort(SortTarget::Create, SortOrder::Ascend)))
        }
    }
}

pub(super) fn get_options(get: &Get) -> GetOptions {
    let mut options = GetOptions::new().with_limit(i64::try_from(get.limit).unwrap_or(i64::MAX));
    if let Some(end) = &get.range.end {
        options = options.with_range(end.as_str());
    }
    if get.keys_only {
        options = options.with_keys_only();
    }
    options
}
