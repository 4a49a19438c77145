//! The stores measured: coordination on each, and the raw transaction of each.

use std::{path::Path, sync::Arc, time::Duration};

use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use futures::FutureExt as _;
use gauntlet_coordination::{
    Coordination, Embedded, Etcd, EtcdConfig,
    kv::{self, KeyRange, Kv, Op},
};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{Instruments, db::Database};
use tempfile::TempDir;

use crate::measure::Work;

/// Which store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// One member, on loopback.
    Etcd,
    /// One file.
    Embedded,
}

/// A store that is measured.
pub(crate) struct Measured<K: Kv> {
    /// Coordination on it.
    pub(crate) store: Arc<Coordination<K>>,
    /// One compare, one put of 256 bytes, one get; on a key of its own for each client.
    pub(crate) raw: Work,
    _server: Option<Server>,
    _dir: TempDir,
}

/// Etcd, on files of its own.
pub(crate) async fn etcd() -> Measured<Etcd> {
    let dir = tempfile::tempdir().expect("a directory");
    let server = Server::start(dir.path()).expect("an etcd");
    // However slow the machine is, no lease runs out and no call is given up.
    let long = Duration::from_secs(60);
    let config = EtcdConfig { lease_ttl: long, deadline: long, ..EtcdConfig::new([server.url()]) };
    let database = Database::etcd(&Instruments::noop());
    let store = Coordination::etcd(config, "bench".to_owned(), database).await.expect("coordination");
    let client = Client::connect([server.url()], None).await.expect("a client");
    let raw: Work = Arc::new(move |at, _| {
        let mut client = client.clone();
        async move {
            let key = format!("raw/{at}");
            let txn = Txn::new()
                .when([Compare::create_revision("raw/none", CompareOp::Equal, 0)])
                .and_then([TxnOp::put(key.as_str(), vec![b'x'; 256], None), TxnOp::get(key.as_str(), None)]);
            assert!(client.txn(txn).await.expect("a transaction").succeeded());
        }
        .boxed()
    });
    Measured { store: Arc::new(store), raw, _server: Some(server), _dir: dir }
}

/// The embedded store. The raw transaction is one on a file beside it.
pub(crate) async fn embedded() -> Measured<Embedded> {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let store = Coordination::embedded(&at("store"), "bench".to_owned()).await.expect("coordination");
    let beside: &Path = &at("raw");
    let raw = Arc::new(Embedded::open(beside).expect("a store"));
    let raw: Work = Arc::new(move |at, _| {
        let raw = raw.clone();
        async move {
            let key = format!("raw/{at}");
            let txn = kv::Txn {
                compare: vec![kv::Compare::absent(KeyRange::key("raw/none"))],
                success: vec![Op::put(&key, vec![b'x'; 256]), Op::get(KeyRange::key(&key))],
                failure: Vec::new(),
            };
            assert!(raw.txn(txn).await.expect("a transaction").succeeded);
        }
        .boxed()
    });
    Measured { store: Arc::new(store), raw, _server: None, _dir: dir }
}
