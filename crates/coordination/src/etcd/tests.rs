//! The cluster: away, frozen, refusing; and the configuration that leads to it.
#![allow(clippy::unwrap_used, reason = "tests")]
use gauntlet_domain::{By, ChallengeId, LockKind, Store as _};
use gauntlet_stack::{Etcd as Server, Process, Ready, Spec, Tool, Tools};
use gauntlet_telemetry::Instruments;

use super::*;
use crate::Coordination;

fn database() -> Database {
    Database::etcd(&Instruments::noop())
}

async fn replica(config: EtcdConfig) -> Coordination<Etcd> {
    Coordination::etcd(config, "a".to_owned(), database()).await.unwrap()
}

async fn until_ok<T, F: Future<Output = Result<T, Error>>>(mut call: impl FnMut() -> F) -> T {
    let ends = Instant::now() + Duration::from_secs(30);
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < ends, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn by() -> By {
    By { origin: None, patience: Duration::from_secs(30) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_away_is_told_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path()).unwrap();
    let deadline = Duration::from_secs(2);
    let store = replica(EtcdConfig { deadline, ..EtcdConfig::new([server.url()]) }).await;
    let (web, by) = (ChallengeId::new("web").unwrap(), by());
    let held = until_ok(|| store.lock(LockKind::Challenge, &web, &by)).await;
    store.release(held).await.unwrap();
    for _ in 0..2 {
        server.process.kill().unwrap();
        for _ in 0..3 {
            let error = store.challenge(&web).await.unwrap_err();
            assert!(matches!(&error, Error::Unavailable { what: "etcd", .. }), "{error}");
            let error = store.lock(LockKind::Challenge, &web, &by).await.unwrap_err();
            assert!(matches!(&error, Error::Unavailable { what: "etcd", .. }), "{error}");
        }
        server.process.start().unwrap();
        until_ok(|| store.ping()).await;
        let held = until_ok(|| store.lock(LockKind::Challenge, &web, &by)).await;
        // The watch is back, too.
        let waiting = store.lock(LockKind::Challenge, &web, &by);
        drop(held);
        store.release(waiting.await.unwrap()).await.unwrap();
    }
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_away_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let away = "http://127.0.0.1:1".to_owned();
    for endpoints in [[away.clone(), server.url()], [server.url(), away.clone()]] {
        let store = replica(EtcdConfig::new(endpoints)).await;
        for n in 0..20 {
            let id = ChallengeId::new(format!("web-{n}")).unwrap();
            let held = store.lock(LockKind::Challenge, &id, &by()).await.unwrap();
            store.release(held).await.unwrap();
            store.ping().await.unwrap();
        }
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_etcd_does_not_hang_a_call() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let deadline = Duration::from_millis(300);
    let store = replica(EtcdConfig { deadline, ..EtcdConfig::new([server.url()]) }).await;
    let (web, by) = (ChallengeId::new("web").unwrap(), by());
    let held = until_ok(|| store.lock(LockKind::Challenge, &web, &by)).await;
    server.process.signal(rustix::process::Signal::STOP);
    // It stops when it is scheduled next, not at once.
    let ends = Instant::now() + Duration::from_secs(30);
    while store.challenge(&web).await.is_ok() {
        assert!(Instant::now() < ends, "it was not stopped");
    }
    assert!(matches!(store.challenge(&web).await, Err(Error::Unavailable { .. })));
    assert!(matches!(store.lock(LockKind::Rollout, &web, &by).await, Err(Error::Unavailable { .. })));
    assert!(matches!(store.release(held).await, Err(Error::Unavailable { .. })));
    server.process.signal(rustix::process::Signal::CONT);
    let held = until_ok(|| store.lock(LockKind::Challenge, &web, &by)).await;
    store.release(held).await.unwrap();
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_logs_in_and_a_wrong_password_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).unwrap();
    let mut admin = Client::connect([server.url()], None).await.unwrap();
    admin.user_add("root", "hunter2", None).await.unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();
    let config = |password: &str| EtcdConfig {
        username: Some("root".to_owned()),
        password: Some(password.to_owned()),
        ..EtcdConfig::new([server.url()])
    };
    let store = replica(config("hunter2")).await;
    store.ping().await.unwrap();
    let held = store.lock(LockKind::Challenge, &ChallengeId::new("web").unwrap(), &by()).await.unwrap();
    store.release(held).await.unwrap();
    store.shutdown().await;
    let store = replica(config("wrong-secret")).await;
    let text = store.ping().await.unwrap_err().to_string();
    assert!(text.contains("authentication failed") && !text.contains("wrong-secret"), "{text}");
    store.shutdown().await;
    let store = replica(EtcdConfig::new([server.url()])).await;
    let text = store.ping().await.unwrap_err().to_string();
    assert!(text.contains("etcd refused"), "{text}");
}

fn refused(config: &EtcdConfig) -> String {
    Etcd::new(config, database()).unwrap_err().to_string()
}

#[test]
fn a_wrong_configuration_is_named() {
    let of = |url: &str| EtcdConfig::new([url.to_owned()]);
    assert!(refused(&EtcdConfig::new([])).contains("name at least one"));
    for (url, problem) in [
        ("ftp://a:1", "neither http nor https"),
        ("https://a:1", "no CA certificate"),
        ("localhost", "no host and port"),
        ("http://a:1/path", "no host and port"),
        ("http://a/b:1", "more than a host and a port"),
        ("http://:2379", "no host and port"),
    ] {
        let text = refused(&of(url));
        assert!(text.contains(problem) && text.contains(url), "{text}");
    }
    let tls = EtcdTls { ca: "/nowhere/ca.pem".into(), identity: None };
    let text = refused(&EtcdConfig { tls: Some(tls), ..of("https://a:1") });
    assert!(text.contains("etcd CA certificate: /nowhere/ca.pem cannot be read"), "{text}");
    let text = refused(&EtcdConfig { username: Some("root".to_owned()), ..of("http://a:1") });
    assert!(text.contains("give both or none"), "{text}");
}

#[test]
fn the_password_is_not_shown() {
    let config = EtcdConfig {
        username: Some("root".to_owned()),
        password: Some("hunter2".to_owned()),
        ..EtcdConfig::new(["http://a:1".to_owned()])
    };
    assert!(!format!("{config:?}").contains("hunter2"));
}

/// The files of an authority, and of a certificate of its for loopback.
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
async fn it_speaks_tls_and_shows_its_certificate() {
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
    let tls = EtcdTls { ca: ca.clone(), identity: Some((certificate, key)) };
    let config = EtcdConfig { tls: Some(tls.clone()), ..EtcdConfig::new([url]) };
    let store = replica(config.clone()).await;
    store.ping().await.unwrap();
    let held = store.lock(LockKind::Challenge, &ChallengeId::new("web").unwrap(), &by()).await.unwrap();
    store.release(held).await.unwrap();
    store.shutdown().await;
    // Without a certificate, and trusting another authority.
    let other = tempfile::tempdir().unwrap();
    for tls in [EtcdTls { ca, identity: None }, EtcdTls { ca: certificates(other.path()).0, ..tls }] {
        let store = replica(EtcdConfig { tls: Some(tls), ..config.clone() }).await;
        assert!(matches!(store.ping().await, Err(Error::Unavailable { what: "etcd", .. })));
        store.shutdown().await;
    }
}
