//! A cluster that is stopped, frozen or refuses calls, and the configuration errors.
#![allow(clippy::unwrap_used, reason = "tests")]
use gauntlet_domain::{LockKind, LockOptions, Store as _};
use gauntlet_stack::{Etcd as Server, Process, Ready, Spec, Tool, Tools};
use gauntlet_telemetry::Instruments;
use gauntlet_testing::{
    eventually,
    fixtures::{challenge, challenge_id, instance, new_challenge, source_id, source_key},
};

use std::path::{Path, PathBuf};

use super::*;
use crate::Coordination;

fn database() -> Database {
    Database::etcd(&Instruments::noop())
}

async fn replica(config: EtcdConfig) -> Coordination<Etcd> {
    Coordination::etcd(config, "a".to_owned(), database()).await.unwrap()
}

fn lock_options() -> LockOptions {
    LockOptions { traceparent: None, timeout: Duration::from_secs(30) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_etcd_is_reported_and_reconnected() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path()).unwrap();
    let deadline = Duration::from_secs(2);
    let store = replica(EtcdConfig { deadline, ..EtcdConfig::new([server.url()]) }).await;
    let (web, options) = (challenge_id("web"), lock_options());
    let guard = eventually("the lock is acquired", || store.lock(LockKind::Challenge, &web, &options)).await;
    guard.release().await.unwrap();
    for _ in 0..2 {
        server.process.kill().unwrap();
        for _ in 0..3 {
            let error = store.challenge(&web).await.unwrap_err();
            assert!(matches!(&error, Error::Unavailable { what: "etcd", .. }), "{error}");
            let error = store.lock(LockKind::Challenge, &web, &options).await.unwrap_err();
            assert!(matches!(&error, Error::Unavailable { what: "etcd", .. }), "{error}");
        }
        server.process.start().unwrap();
        eventually("etcd responds", || store.ping()).await;
        let guard = eventually("the lock is acquired", || store.lock(LockKind::Challenge, &web, &options)).await;
        // The watch works again, too.
        let waiting = store.lock(LockKind::Challenge, &web, &options);
        drop(guard);
        waiting.await.unwrap().release().await.unwrap();
    }
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_member_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let unreachable = "http://127.0.0.1:1".to_owned();
    for endpoints in [[unreachable.clone(), server.url()], [server.url(), unreachable.clone()]] {
        let store = replica(EtcdConfig::new(endpoints)).await;
        for n in 0..20 {
            let id = challenge_id(&format!("web-{n}"));
            let guard = store.lock(LockKind::Challenge, &id, &lock_options()).await.unwrap();
            guard.release().await.unwrap();
            store.ping().await.unwrap();
        }
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_etcd_does_not_hang_calls() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let deadline = Duration::from_millis(300);
    let store = replica(EtcdConfig { deadline, ..EtcdConfig::new([server.url()]) }).await;
    let (web, options) = (challenge_id("web"), lock_options());
    let guard = eventually("the lock is acquired", || store.lock(LockKind::Challenge, &web, &options)).await;
    server.process.signal(rustix::process::Signal::STOP);
    // The signal stops the process when it is scheduled next, not at once.
    let ends = Instant::now() + Duration::from_secs(30);
    while store.challenge(&web).await.is_ok() {
        assert!(Instant::now() < ends, "etcd was not stopped");
    }
    assert!(matches!(store.challenge(&web).await, Err(Error::Unavailable { .. })));
    assert!(matches!(store.lock(LockKind::Rollout, &web, &options).await, Err(Error::Unavailable { .. })));
    assert!(matches!(guard.release().await, Err(Error::Unavailable { .. })));
    server.process.signal(rustix::process::Signal::CONT);
    let guard = eventually("the lock is acquired", || store.lock(LockKind::Challenge, &web, &options)).await;
    guard.release().await.unwrap();
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_write_goes_to_another_endpoint_after_an_unknown_outcome() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let servers = dirs.each_ref().map(|dir| Server::start(dir.path()).unwrap());
    let endpoints = servers.each_ref().map(Server::url);
    let config = EtcdConfig { deadline: Duration::from_millis(500), ..EtcdConfig::new(endpoints) };
    let etcd = tokio::task::spawn_blocking(move || Etcd::new(&config, database())).await.unwrap().unwrap();
    let write = || etcd.txn(Txn { compare: Vec::new(), success: vec![Op::put("key", "value")], failure: Vec::new() });
    eventually("the first endpoint answers", async || write().await.is_ok()).await;
    etcd.start_at(0);
    servers[0].process.signal(rustix::process::Signal::STOP);
    eventually("a write has an unknown outcome", async || matches!(write().await, Err(KvError::Ambiguous(_)))).await;
    write().await.unwrap();
    servers[0].process.signal(rustix::process::Signal::CONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_begins_with_a_list_of_several_pages() {
    const KEYS: usize = LIST_PAGE + 100;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let config = EtcdConfig::new([server.url()]);
    let etcd = tokio::task::spawn_blocking(move || Etcd::new(&config, database())).await.unwrap().unwrap();
    let puts: Vec<_> = (0..KEYS).map(|number| Op::put(format!("key {number:05}"), "")).collect();
    // etcd takes at most 128 operations in a transaction.
    for puts in puts.chunks(128) {
        etcd.txn(Txn { compare: Vec::new(), success: puts.to_vec(), failure: Vec::new() }).await.unwrap();
    }
    let watch = etcd.list_and_watch(KeyRange::between("key ", "key!")).await.unwrap();
    assert_eq!(watch.keys.len(), KEYS);
}

/// The calls that etcd counts in its own metrics, by method, without those of the replica's background tasks.
async fn served(server: &Server) -> std::collections::BTreeMap<String, u64> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = server.url().trim_start_matches("http://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let method = |line: &str| Some(line.split_once("grpc_method=\"")?.1.split_once('"')?.0.to_owned());
    let mut served = std::collections::BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("grpc_server_handled_total{grpc_code=\"OK\"")) {
        let count: f64 = line.rsplit_once(' ').unwrap().1.parse().unwrap();
        let method = method(line).unwrap();
        if count > 0.0 && !method.starts_with("Lease") && method != "Watch" {
            served.insert(method, count as u64);
        }
    }
    served
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_serves_the_budgeted_number_of_calls() {
    use futures::TryStreamExt as _;

    use crate::contract::noop::{call_now, gauntlet};
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let store = std::sync::Arc::new(replica(EtcdConfig::new([server.url()])).await);
    let gauntlet = gauntlet(store.clone());
    let (web, alice) = (challenge_id("web"), source_id("alice"));
    let guard = store.lock(LockKind::Challenge, &web, &lock_options()).await.unwrap();
    guard.release().await.unwrap();
    gauntlet.create_challenge(&call_now(), new_challenge("web", 0)).await.unwrap();
    let before = std::cell::RefCell::new(served(&server).await);
    let assert_served = async |what: &str, txns: u64, ranges: u64| {
        let now = served(&server).await;
        let since = |method| now.get(method).unwrap_or(&0) - before.borrow().get(method).unwrap_or(&0);
        assert_eq!((since("Txn"), since("Range")), (txns, ranges), "{what}");
        assert_eq!((since("Put"), since("DeleteRange")), (0, 0), "{what}");
        before.replace(now);
    };
    let guard = store.lock(LockKind::Challenge, &web, &lock_options()).await.unwrap();
    assert_served("acquire", 1, 0).await;
    guard.release().await.unwrap();
    assert_served("release", 1, 0).await;
    gauntlet.create_instance(&call_now(), &web, &alice, Default::default()).await.unwrap();
    assert_served("create", 2, 0).await;
    gauntlet.renew_instance(&call_now(), &web, &alice).await.unwrap();
    assert_served("renew", 1, 0).await;
    let all: Vec<_> = gauntlet.query_instances(None).try_collect().await.unwrap();
    assert_eq!(all.len(), 1);
    assert_served("a listing of one page", 0, 1).await;
    gauntlet.delete_instance(&call_now(), &web, &alice).await.unwrap();
    assert_served("delete", 2, 0).await;
    let pooled = challenge_id("pooled");
    gauntlet.create_challenge(&call_now(), new_challenge("pooled", 2)).await.unwrap();
    gauntlet_testing::maintain_pool(&gauntlet, &call_now(), &pooled).await.unwrap();
    before.replace(served(&server).await);
    gauntlet.create_instance(&call_now(), &pooled, &alice, Default::default()).await.unwrap();
    assert_served("claim", 1, 0).await;
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authenticates_and_reports_a_wrong_password() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let mut admin = Client::connect([server.url()], None).await.unwrap();
    admin.user_add("root", "hunter2", None).await.unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();
    let config = |password: &str| EtcdConfig {
        username: Some("root".to_owned()),
        password: Some(password.into()),
        ..EtcdConfig::new([server.url()])
    };
    let store = replica(config("hunter2")).await;
    store.ping().await.unwrap();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &lock_options()).await.unwrap();
    guard.release().await.unwrap();
    store.shutdown().await;
    let store = replica(config("wrong-secret")).await;
    let text = store.ping().await.unwrap_err().to_string();
    assert!(text.contains("authentication failed") && !text.contains("wrong-secret"), "{text}");
    store.shutdown().await;
    let store = replica(EtcdConfig::new([server.url()])).await;
    let text = store.ping().await.unwrap_err().to_string();
    assert!(text.contains("etcd refused"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paged_scans_survive_compaction() {
    use futures::TryStreamExt as _;
    const INSTANCES: usize = 2000;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let store = replica(EtcdConfig::new([server.url()])).await;
    let mut admin = Client::connect([server.url()], None).await.unwrap();
    store.insert_challenge(&challenge("web")).await.unwrap();
    let keys: Vec<_> = (0..INSTANCES).map(|n| source_key("web", &format!("team-{n:04}"))).collect();
    for some in keys.chunks(100) {
        let record = |key: &gauntlet_domain::InstanceKey| {
            let instance = instance(key.clone(), gauntlet_domain::Phase::Ready);
            Op::put(store.core.layout.instance(key), crate::records::write_instance(&instance))
        };
        store.core.kv.txn(Txn { success: some.iter().map(record).collect(), ..Txn::default() }).await.unwrap();
    }
    let mut compact = async || {
        let put = admin.put("elsewhere", "", None).await.unwrap();
        admin.compact(put.header().unwrap().revision(), None).await.unwrap();
    };
    let (mut seen, mut all) = (Vec::new(), store.instances_by_source(None));
    while let Some(instance) = all.try_next().await.unwrap() {
        if seen.len() % 200 == 0 {
            compact().await;
        }
        seen.push(instance.key);
    }
    assert!(seen == keys, "each once, in order: {} of them", seen.len());
    let mut listing = store.challenges();
    compact().await;
    let (_, own) = listing.try_next().await.unwrap().unwrap();
    assert_eq!(own.len(), INSTANCES);
    // A read at a compacted revision has its own error, and the store falls back to the latest.
    let old = Some(1);
    let get = || Get { range: KeyRange::key("elsewhere"), limit: 0, keys_only: false };
    assert_eq!(store.core.kv.page(get(), old).await.unwrap_err(), KvError::Compacted);
    assert_eq!(store.core.kv.count(get().range, old).await.unwrap_err(), KvError::Compacted);
    assert_eq!(store.core.count(get().range, old).await.unwrap(), 1);
    store.shutdown().await;
}

fn refused(config: &EtcdConfig) -> String {
    Etcd::new(config, database()).unwrap_err().to_string()
}

#[test]
fn invalid_configuration_is_named() {
    let of = |url: &str| EtcdConfig::new([url.to_owned()]);
    assert!(refused(&EtcdConfig::new([])).contains("name at least one"));
    for (url, problem) in [
        ("ftp://a:1", "neither http nor https"),
        ("localhost", "no host and port"),
        ("http://a:1/path", "no host and port"),
        ("http://a/b:1", "more than a host and a port"),
        ("http://:2379", "no host and port"),
    ] {
        let text = refused(&of(url));
        assert!(text.contains(problem) && text.contains(url), "{text}");
    }
    let tls = EtcdTls { ca: Some("/nowhere/ca.pem".into()), identity: None };
    let text = refused(&EtcdConfig { tls: Some(tls), ..of("https://a:1") });
    assert!(text.contains("etcd CA certificate: /nowhere/ca.pem cannot be read"), "{text}");
    let text = refused(&EtcdConfig { username: Some("root".to_owned()), ..of("http://a:1") });
    assert!(text.contains("give both or none"), "{text}");
    // The authorities that the system trusts are enough.
    Etcd::new(&of("https://a:1"), database()).unwrap();
}

#[test]
fn password_without_tls_needs_an_explicit_scheme() {
    let login = |url: &str| EtcdConfig {
        username: Some("root".to_owned()),
        password: Some("hunter2".into()),
        ..EtcdConfig::new([url.to_owned()])
    };
    let text = refused(&login("a:2379"));
    assert!(text.contains("\"a:2379\"") && text.contains("https://") && !text.contains("hunter2"), "{text}");
    for url in ["http://a:2379", "https://a:2379"] {
        Etcd::new(&login(url), database()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, certificate, key) = certificates(dir.path());
    let tls = || Some(EtcdTls { ca: None, identity: Some((certificate.clone(), key.clone())) });
    Etcd::new(&EtcdConfig { tls: tls(), ..login("a:2379") }, database()).unwrap();
    let text = refused(&EtcdConfig { tls: tls(), ..EtcdConfig::new(["http://a:2379".to_owned()]) });
    assert!(text.contains("TLS is configured: use https"), "{text}");
    // The key of another certificate.
    let other = tempfile::tempdir().unwrap();
    let tls = Some(EtcdTls { ca: None, identity: Some((certificate.clone(), certificates(other.path()).2)) });
    let text = refused(&EtcdConfig { tls, ..EtcdConfig::new(["a:2379".to_owned()]) });
    assert!(text.contains("etcd TLS files") && text.contains("key.pem"), "{text}");
}

#[tokio::test]
async fn replicas_start_at_different_endpoints() {
    let endpoints = || ["http://a:1", "http://b:1", "http://c:1"].map(str::to_owned);
    let mut starts = std::collections::BTreeSet::new();
    for n in 0..12 {
        let store = Coordination::etcd(EtcdConfig::new(endpoints()), format!("manager-{n}"), database()).await.unwrap();
        starts.insert(store.core.kv.current.load(Ordering::Relaxed));
    }
    assert_eq!(starts.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn debug_hides_the_password() {
    let config = EtcdConfig {
        username: Some("root".to_owned()),
        password: Some("hunter2".into()),
        ..EtcdConfig::new(["http://a:1".to_owned()])
    };
    let text = format!("{config:?}");
    assert!(text.contains("http://a:1") && !text.contains("hunter2"), "{text}");
}

/// Writes an authority's certificate, and a certificate for loopback with its key that the authority signed.
fn certificates(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let ca = authority.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(authority, key);
    let mut own = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    own.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = own.signed_by(&key, &issuer).unwrap();
    let write = |name: &str, pem: String| {
        let path = dir.join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    (write("ca.pem", ca.pem()), write("cert.pem", certificate.pem()), write("key.pem", key.serialize_pem()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_with_tls_and_reloads_replaced_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, certificate, key) = certificates(dir.path());
    let free = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let (client, peer, metrics) = (free(), free(), free());
    let url = format!("https://127.0.0.1:{client}");
    let etcd = Tools::from_env().require(Tool::Etcd).unwrap();
    let ready = Ready::Http(format!("http://127.0.0.1:{metrics}/health"));
    let mut spec = Spec::new("etcd with TLS", etcd, dir.path().join("etcd.log"), ready)
        .arg(format!("--data-dir={}", dir.path().join("data").display()))
        .arg(format!("--listen-client-urls={url}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"))
        .arg(format!("--initial-cluster=default=http://127.0.0.1:{peer}"))
        .arg(format!("--listen-metrics-urls=http://127.0.0.1:{metrics}"))
        .arg("--client-cert-auth=true");
    for (name, path) in [("trusted-ca-file", &ca), ("cert-file", &certificate), ("key-file", &key)] {
        spec = spec.arg(format!("--{name}={}", path.display()));
    }
    let _server = Process::run(spec).unwrap();
    let tls = EtcdTls { ca: Some(ca.clone()), identity: Some((certificate.clone(), key.clone())) };
    // An endpoint without a scheme uses https.
    let config = EtcdConfig { tls: Some(tls.clone()), ..EtcdConfig::new([format!("127.0.0.1:{client}")]) };
    let store = replica(config.clone()).await;
    store.ping().await.unwrap();
    let guard = store.lock(LockKind::Challenge, &challenge_id("web"), &lock_options()).await.unwrap();
    guard.release().await.unwrap();
    store.shutdown().await;
    // Rejected: no client certificate, or another authority.
    let other = tempfile::tempdir().unwrap();
    let (other_ca, other_certificate, other_key) = certificates(other.path());
    for tls in [EtcdTls { identity: None, ..tls.clone() }, EtcdTls { ca: Some(other_ca), ..tls.clone() }] {
        let store = replica(EtcdConfig { tls: Some(tls), ..config.clone() }).await;
        assert!(matches!(store.ping().await, Err(Error::Unavailable { what: "etcd", .. })));
        store.shutdown().await;
    }
    // Replaced files take effect without a restart.
    let (used, used_key) = (other.path().join("used.pem"), other.path().join("used-key.pem"));
    std::fs::copy(other_certificate, &used).unwrap();
    std::fs::copy(other_key, &used_key).unwrap();
    let tls = EtcdTls { identity: Some((used.clone(), used_key.clone())), ..tls };
    let store = replica(EtcdConfig { tls: Some(tls), ..config }).await;
    assert!(matches!(store.ping().await, Err(Error::Unavailable { what: "etcd", .. })));
    std::fs::copy(certificate, used).unwrap();
    std::fs::copy(key, used_key).unwrap();
    eventually("etcd responds", || store.ping()).await;
    store.shutdown().await;
}
