//! Credentials reach the registry that they are for, and no other server.

use std::{fs, path::PathBuf};

use gauntlet_domain::Scenarios as _;
use gauntlet_scenario::{Access, Allowed, Config, Credentials, FlagKey, Library};

use crate::{
    fake::{Fake, Reply, Request},
    support::plain,
};

/// `ci:swordfish`.
const BASIC: &str = "Basic Y2k6c3dvcmRmaXNo";

fn access(registry: &Fake) -> Access {
    let registry = registry.address.to_string().parse().unwrap();
    Access {
        credentials: vec![Credentials { registry, username: "ci".into(), password: "swordfish".into() }],
        ..plain()
    }
}

/// Access to listed registries only.
fn listed(access: Access, registries: &[&Fake]) -> Access {
    let patterns = registries.iter().map(|registry| registry.address.to_string().parse().unwrap());
    Access { allowed: Allowed::Only(patterns.collect()), ..access }
}

async fn resolve(access: Access, reference: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { access, ..Config::new(dir.path(), FlagKey::new([1; 32])) };
    Library::new(config).unwrap().resolve(reference).await.map(|_| ()).map_err(|error| error.to_string())
}

/// Answers requests without credentials with a challenge.
fn demand(challenge: String) -> impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static {
    move |request| request.authorization.is_none().then(|| Reply::header(401, "www-authenticate", challenge.clone()))
}

fn basic() -> String {
    "Basic realm=\"x\"".to_owned()
}

/// A token service.
async fn tokens() -> Fake {
    Fake::start(|_| Reply::body(r#"{"token":"issued"}"#)).await
}

fn bearer(tokens: &Fake) -> String {
    format!("Bearer realm=\"http://{}/token\",service=\"a \\\"b\"", tokens.address)
}

#[tokio::test(flavor = "multi_thread")]
async fn other_registry_gets_no_credentials() {
    let (own, other) = (Fake::holding_web(demand(basic())).await, Fake::holding_web(demand(basic())).await);
    let error = resolve(access(&own), &other.reference()).await.unwrap_err();
    assert!(error.contains("access denied"), "{error}");
    assert_eq!(other.authorizations(), [""; 0]);
    resolve(access(&own), &own.reference()).await.unwrap();
    assert!(own.authorizations().iter().all(|value| value == BASIC));
}

#[tokio::test(flavor = "multi_thread")]
async fn realm_of_another_host_gets_no_credentials() {
    let tokens = tokens().await;
    let registry = Fake::holding_web(demand(bearer(&tokens))).await;
    // Not even if the operator allows scenarios of the other host.
    let error = resolve(listed(access(&registry), &[&registry, &tokens]), &registry.reference()).await.unwrap_err();
    assert!(error.contains(&format!("pass --oci-token-host {}", tokens.address)), "{error}");
    assert!(tokens.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn listed_token_host_gets_the_credentials_and_the_registry_the_token() {
    let tokens = tokens().await;
    let registry = Fake::holding_web(demand(bearer(&tokens))).await;
    let access = Access {
        token_hosts: vec![tokens.address.to_string().parse().unwrap()],
        ..listed(access(&registry), &[&registry, &tokens])
    };
    resolve(access, &registry.reference()).await.unwrap();
    let [lookup, pull] = tokens.seen().try_into().unwrap();
    assert_eq!(lookup.path, "/token?scope=repository%3Aweb%3Apull&service=a+%22b");
    assert!([lookup, pull].iter().all(|request| request.authorization.as_deref() == Some(BASIC)));
    assert!(registry.authorizations().iter().all(|value| value == "Bearer issued"));
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_to_another_host_gets_no_credentials() {
    let other = Fake::holding_web(|_| None).await;
    let elsewhere = other.address;
    let registry = Fake::holding_web(move |request| match &request.authorization {
        None => Some(Reply::header(401, "www-authenticate", "Basic realm=\"x\"")),
        Some(_) if request.path.contains("/blobs/") => {
            Some(Reply::header(307, "location", format!("http://{elsewhere}{}", request.path)))
        }
        Some(_) => None,
    })
    .await;
    resolve(listed(access(&registry), &[&registry, &other]), &registry.reference()).await.unwrap();
    assert_eq!((other.seen().len(), other.authorizations().len()), (1, 0));
    assert!(!registry.authorizations().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn server_that_a_registry_redirects_to_cannot_ask_for_credentials() {
    let other = Fake::holding_web(demand(basic())).await;
    let elsewhere = other.address;
    let registry = Fake::holding_web(move |request| {
        Some(Reply::header(302, "location", format!("http://{elsewhere}{}", request.path)))
    })
    .await;
    let error = resolve(listed(access(&registry), &[&registry, &other]), &registry.reference()).await.unwrap_err();
    assert!(error.contains("access denied"), "{error}");
    assert_eq!(other.authorizations(), [""; 0]);
}

/// Writes a configuration and returns its directory.
fn docker(dir: &tempfile::TempDir, config: &str) -> PathBuf {
    fs::write(dir.path().join("config.json"), config).unwrap();
    dir.path().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_configuration_names_the_registry_of_each_login() {
    let (own, other) = (Fake::holding_web(demand(basic())).await, Fake::holding_web(demand(basic())).await);
    let dir = tempfile::tempdir().unwrap();
    let auth = BASIC.trim_start_matches("Basic ");
    for key in [own.address.to_string(), format!("http://{}/v1/", own.address)] {
        let config = format!(r#"{{"auths":{{"{key}":{{"auth":"{auth}"}},"x.test":{{}}}},"extra":1}}"#);
        let access = || Access { docker_config: Some(docker(&dir, &config)), ..plain() };
        resolve(access(), &own.reference()).await.unwrap();
        assert!(resolve(access(), &other.reference()).await.unwrap_err().contains("access denied"));
    }
    assert!(own.authorizations().iter().all(|value| value == BASIC) && other.authorizations().is_empty());

    let broken = r#"{"auths":{"x":{"auth":"hunter2","password":7}}}"#;
    let access = Access { docker_config: Some(docker(&dir, broken)), ..plain() };
    let error = resolve(access, &own.reference()).await.unwrap_err();
    assert!(error.contains("--docker-config") && error.contains("line 1") && !error.contains("hunter2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_token_is_exchanged_at_the_registrys_own_token_service() {
    let registry = Fake::holding_web(|request| match (&request.authorization, request.path.as_str()) {
        (_, "/token") => Some(Reply::body(r#"{"access_token":"exchanged"}"#)),
        (None, _) => Some(Reply::header(401, "www-authenticate", "Bearer realm=\"http://HOST/token\",service=\"s\"")),
        (Some(_), _) => None,
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let config = format!(r#"{{"auths":{{"{}":{{"identitytoken":"refresh"}}}}}}"#, registry.address);
    let access = Access { docker_config: Some(docker(&dir, &config)), ..plain() };
    resolve(access, &registry.reference()).await.unwrap();
    let seen = registry.seen();
    assert!(seen.iter().any(|request| (request.method.as_str(), request.path.as_str()) == ("POST", "/token")));
    assert!(registry.authorizations().iter().all(|value| value == "Bearer exchanged"));
}
