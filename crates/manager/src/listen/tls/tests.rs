//! TLS listeners and clients on real sockets.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::{fs, net::SocketAddr};

use gauntlet_testing::eventually;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ClientConfig, pki_types::PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    listen::{Endpoint, socket::Socket},
    peer::ClientCertificate,
};

/// Longer than anything takes on a busy machine.
const LONG: Duration = Duration::from_secs(30);

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for `name`, and its key.
fn issue(ca: &Ca, name: &str) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.signed_by(&key, ca).unwrap(), key)
}

struct Fixture {
    dir: TempDir,
    ca: Ca,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap(), ca: ca() };
        fixture.replace("localhost");
        fs::write(fixture.dir.path().join("ca.pem"), fixture.ca.pem()).unwrap();
        fixture
    }

    /// Writes another certificate, for `name`.
    fn replace(&self, name: &str) {
        let (certificate, key) = issue(&self.ca, name);
        fs::write(self.dir.path().join("tls.crt"), certificate.pem()).unwrap();
        fs::write(self.dir.path().join("tls.key"), key.serialize_pem()).unwrap();
    }

    fn files(&self) -> TlsFiles {
        let file = |name| self.dir.path().join(name);
        TlsFiles { certificate: file("tls.crt"), key: file("tls.key"), client_ca: Some(file("ca.pem")) }
    }

    /// A client that trusts the CA, with a certificate of `issuer` if there is one.
    fn client(&self, issuer: Option<&Ca>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match issuer {
            None => client.with_no_client_auth(),
            Some(issuer) => {
                let (certificate, key) = issue(issuer, "platform");
                let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
                client.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
            }
        }
    }
}

/// Connects a client, and returns what the server knows of it once both have finished the handshake: the names in its certificate.
async fn handshake(
    certificates: &Certificates,
    client: ClientConfig,
    name: &str,
) -> Result<Option<Vec<String>>, String> {
    let endpoint = Endpoint::Tls(([127, 0, 0, 1], 0).into());
    let socket = Socket::bind(&endpoint, "test", Some(certificates.clone())).await.unwrap();
    let address: SocketAddr = socket.address().unwrap();
    let name = name.to_owned().try_into().unwrap();
    let connecting = async {
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(Arc::new(client)).connect(name, stream).await
    };
    let accepting = async { socket.accept().await.unwrap().handshake(LONG).await };
    let (connected, accepted) = tokio::join!(connecting, accepting);
    connected.map_err(|error| error.to_string())?;
    let (_, certificate) = accepted?;
    Ok(certificate.map(|certificate: ClientCertificate| certificate.names().to_vec()))
}

#[tokio::test]
async fn client_certificate_is_optional_or_required_and_always_checked() {
    let fixture = Fixture::new();
    let names = Ok(Some(vec!["CN:platform".to_owned(), "DNS:platform".to_owned()]));
    for required in [false, true] {
        let certificates = Certificates::load(fixture.files(), required).unwrap();
        let none = handshake(&certificates, fixture.client(None), "localhost").await;
        assert_eq!(none, if required { Err("handshake_failed".into()) } else { Ok(None) });
        let valid = handshake(&certificates, fixture.client(Some(&fixture.ca)), "localhost").await;
        assert_eq!(valid, names);
        let foreign = handshake(&certificates, fixture.client(Some(&ca())), "localhost").await;
        assert_eq!(foreign, Err("handshake_failed".into()));
    }
}

#[tokio::test]
async fn http2_is_preferred_and_http1_is_offered() {
    let fixture = Fixture::new();
    let certificates = Certificates::load(TlsFiles { client_ca: None, ..fixture.files() }, false).unwrap();
    for (offered, chosen) in [(&["http/1.1", "h2"][..], "h2"), (&["http/1.1"], "http/1.1")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut client = fixture.client(None);
        client.alpn_protocols = offered.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let name = "localhost".try_into().unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let (connected, _) = tokio::join!(
            TlsConnector::from(Arc::new(client)).connect(name, stream),
            certificates.acceptor().accept(accepted)
        );
        assert_eq!(connected.unwrap().get_ref().1.alpn_protocol(), Some(chosen.as_bytes()));
    }
}

#[tokio::test]
async fn client_that_does_not_finish_the_handshake_is_cut_off() {
    let fixture = Fixture::new();
    let certificates = Certificates::load(fixture.files(), false).unwrap();
    let endpoint = Endpoint::Tls(([127, 0, 0, 1], 0).into());
    let socket = Socket::bind(&endpoint, "test", Some(certificates)).await.unwrap();
    let _silent = TcpStream::connect(socket.address().unwrap()).await.unwrap();
    let accepted = socket.accept().await.unwrap().handshake(Duration::from_millis(1)).await;
    assert_eq!(accepted.err(), Some("handshake_timeout"));
}

#[tokio::test]
async fn changed_files_are_used_by_new_connections_and_bad_ones_are_not() {
    let fixture = Fixture::new();
    let certificates = Certificates::load(fixture.files(), false).unwrap();
    let stop = CancellationToken::new();
    let kept = tokio::spawn(certificates.clone().keep_current(Duration::from_millis(10), stop.clone()));
    let serves = async |name: &str| handshake(&certificates, fixture.client(None), name).await.is_ok();
    assert!(serves("localhost").await && !serves("second.example").await);
    // A key that is not that of the certificate yet: the two files are not replaced in one step.
    let (_, foreign_key) = issue(&fixture.ca, "localhost");
    fs::write(fixture.files().key, foreign_key.serialize_pem() + "\n").unwrap();
    let versions = fixture.files().versions();
    eventually("the bad key to be noticed", async || certificates.current().0 == versions).await;
    assert!(serves("localhost").await);
    fixture.replace("second.example");
    eventually("the new certificate", async || serves("second.example").await).await;
    fs::remove_file(fixture.files().certificate).unwrap();
    eventually("the missing file to be noticed", async || certificates.current().0.contains(&None)).await;
    assert!(serves("second.example").await);
    stop.cancel();
    kept.await.unwrap();
}

#[test]
fn unusable_files_are_named_with_their_flag_and_the_fix() {
    let fixture = Fixture::new();
    let good = fixture.files();
    let write = |name: &str, text: &str| {
        let path = fixture.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let secret = "-----BEGIN PRIVATE KEY-----\nhunter2\n";
    let (_, foreign_key) = issue(&fixture.ca, "localhost");
    for (files, parts) in [
        (TlsFiles { certificate: "/none.crt".into(), ..good.clone() }, ["--tls-cert /none.crt", "no such file"]),
        (TlsFiles { certificate: good.key.clone(), ..good.clone() }, ["--tls-cert", "BEGIN CERTIFICATE"]),
        (TlsFiles { key: good.certificate.clone(), ..good.clone() }, ["--tls-key", "BEGIN PRIVATE KEY"]),
        (TlsFiles { key: write("bad.key", secret), ..good.clone() }, ["--tls-key", "not valid PEM"]),
        (
            TlsFiles { key: write("foreign.key", &foreign_key.serialize_pem()), ..good.clone() },
            ["--tls-key", "is not the key of"],
        ),
        (
            TlsFiles { client_ca: Some(write("empty.pem", "")), ..good.clone() },
            ["--tls-client-ca", "no certificate in it"],
        ),
    ] {
        let error = Certificates::load(files, false).err().unwrap();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains("hunter2"), "{error}");
    }
}
