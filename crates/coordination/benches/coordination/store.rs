//! The measured stores: coordination on each backend, and each backend's raw transaction.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use futures::FutureExt as _;
use gauntlet_coordination::{
    Coordination, Embedded, Etcd, EtcdConfig,
    kv::{self, KeyRange, Kv, Op},
};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{Instruments, db::Database};
use tempfile::TempDir;

use crate::measure::Workload;

/// The backend to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// A single etcd member on loopback.
    Etcd,
    /// The embedded store.
    Embedded,
}

impl Backend {
    /// Parses the backend's name.
    #[allow(dead_code, reason = "the smoke test includes this file without its `main`")]
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "etcd" => Some(Self::Etcd),
            "embedded" => Some(Self::Embedded),
            _ => None,
        }
    }
}

/// A store to measure.
pub(crate) struct MeasuredStore<K: Kv> {
    /// Coordination on the store.
    pub(crate) store: Arc<Coordination<K>>,
    /// The raw transaction: one compare, one put of 256 bytes and one get, on a separate key per client.
    pub(crate) raw: Workload,
    _server: Option<Server>,
    _dir: TempDir,
}

/// Starts an etcd server with a fresh data directory.
pub(crate) async fn etcd() -> MeasuredStore<Etcd> {
    let dir = tempfile::tempdir().expect("a directory");
    let server = Server::start(dir.path()).expect("an etcd");
    // Long enough that no lease expires and no call times out on a slow machine.
    let long = Duration::from_secs(60);
    let config = EtcdConfig { lease_ttl: long, deadline: long, ..EtcdConfig::new([server.url()]) };
    let database = Database::etcd(&Instruments::noop());
    let store = Coordination::etcd(config, "bench".to_owned(), database).await.expect("coordination");
    let client = Client::connect([server.url()], None).await.expect("a client");
    let raw: Workload = Arc::new(move |client_number, _| {
        let mut client = client.clone();
        async move {
            let key = format!("raw/{client_number}");
            let txn = Txn::new()
                .when([Compare::create_revision("raw/none", CompareOp::Equal, 0)])
                .and_then([TxnOp::put(key.as_str(), vec![b'x'; 256], None), TxnOp::get(key.as_str(), None)]);
            assert!(client.txn(txn).await.expect("a transaction").succeeded());
        }
        .boxed()
    });
    MeasuredStore { store: Arc::new(store), raw, _server: Some(server), _dir: dir }
}

/// Opens an embedded store. The raw transaction runs on a second file.
pub(crate) async fn embedded() -> MeasuredStore<Embedded> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str| dir.path().join(name);
    let store = Coordination::embedded(&file("store"), "bench".to_owned()).await.expect("coordination");
    let raw = Arc::new(Embedded::open(&file("raw")).expect("a store"));
    let raw: Workload = Arc::new(move |client_number, _| {
        let raw = raw.clone();
        async move {
            let key = format!("raw/{client_number}");
            let txn = kv::Txn {
                compare: vec![kv::Compare::absent(KeyRange::key("raw/none"))],
                success: vec![Op::put(&key, vec![b'x'; 256]), Op::get(KeyRange::key(&key))],
                failure: Vec::new(),
            };
            assert!(raw.txn(txn).await.expect("a transaction").succeeded);
        }
        .boxed()
    });
    MeasuredStore { store: Arc::new(store), raw, _server: None, _dir: dir }
}
