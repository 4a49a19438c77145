//! Credentials, TLS and deadlines.

use std::{fs, time::Duration};

use gauntlet_domain::{Error, Scenarios as _};
use gauntlet_scenario::{Access, Config, Credentials, FileLimits, FlagKey, Library, PushError, push};
use gauntlet_stack::RegistryOptions;

use crate::support::{Fixture, plain};

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_required_and_never_printed() {
    let fixture = Fixture::with(RegistryOptions::with_user());
    let credentials = |registry: &str, password: &str| Access {
        credentials: vec![Credentials {
            registry: registry.parse().unwrap(),
            username: RegistryOptions::USER.into(),
            password: password.into(),
        }],
        ..plain()
    };
    let here = fixture.registry.address();
    let right = credentials(&here, RegistryOptions::PASSWORD);
    assert!(!format!("{right:?}").contains(RegistryOptions::PASSWORD));
    let reference = fixture.reference("web:v1");
    let digest = push(&fixture.scenario(), &reference, &right, &|_| {}).await.unwrap();
    let elsewhere = credentials("other.test", RegistryOptions::PASSWORD);
    for wrong in [plain(), credentials(&here, "wrong-secret"), elsewhere] {
        let error = fixture.library(wrong.clone()).resolve(&reference).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
        assert!(error.to_string().contains("OCI_USERNAME") && !error.to_string().contains("secret"), "{error}");
        let error = push(&fixture.scenario(), &reference, &wrong, &|_| {}).await.unwrap_err();
        assert!(matches!(&error, PushError::Failed(Error::Registry { .. })), "{error}");
    }
    assert_eq!(fixture.library(right).resolve(&reference).await.unwrap().digest, digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn extra_root_certificates_are_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&certificate, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let fixture = Fixture::with(RegistryOptions { tls: Some((certificate, key)), htpasswd: None });
    let trusting = Access { extra_roots: vec![made.cert.pem().into_bytes()], ..Access::default() };
    let reference = fixture.reference("web:v1");
    let digest = push(&fixture.scenario(), &reference, &trusting, &|_| {}).await.unwrap();
    assert_eq!(fixture.library(trusting).resolve(&reference).await.unwrap().digest, digest);
    for access in [Access::default(), plain()] {
        let error = fixture.library_at("other", access, FileLimits::default()).resolve(&reference).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    }
    let wrong = Access { extra_roots: vec![b"no certificate".to_vec()], ..Access::default() };
    let mut config = Config::new(fixture.dir.path().join("cache"), FlagKey::new([1; 32]));
    config.access = wrong;
    assert!(Library::new(config).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_registry_fails_at_the_deadline() {
    let fixture = Fixture::new();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/web", silent.local_addr().unwrap());
    let hurried = Access { timeout: Duration::from_millis(200), ..plain() };
    let error = fixture.library(hurried.clone()).resolve(&reference).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    let error = push(&fixture.scenario(), &reference, &hurried, &|_| {}).await.unwrap_err();
    assert!(matches!(error, PushError::Failed(Error::Registry { .. })));
}
