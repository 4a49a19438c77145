//! Which servers are contacted, for how long, and how much is read from them.

use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use gauntlet_domain::{Additional, Error, Identity, Pinned, Scenarios as _};
use gauntlet_scenario::{Access, Allowed, Config, FlagKey, Library};
use gauntlet_testing::eventually;

use crate::{
    fake::{Fake, Reply, manifest},
    support::{digest, plain},
};

fn library(dir: &tempfile::TempDir, access: Access) -> Library {
    Library::new(Config { access, ..Config::new(dir.path(), FlagKey::new([1; 32])) }).unwrap()
}

fn only(patterns: &[String]) -> Access {
    Access { allowed: Allowed::Only(patterns.iter().map(|pattern| pattern.parse().unwrap()).collect()), ..plain() }
}

async fn fails(access: Access, reference: &str) -> Error {
    let dir = tempfile::tempdir().unwrap();
    library(&dir, access).resolve(reference).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_that_is_not_allowed_is_not_contacted() {
    let registry = Fake::holding_web(|_| None).await;
    let here = registry.address.to_string();
    for patterns in [vec![], vec!["other.test".to_owned()], vec![format!("{here}/team")]] {
        let error = fails(only(&patterns), &registry.reference()).await;
        assert_eq!(error.code(), "OCI_REGISTRY_NOT_ALLOWED", "{error}");
        assert!(error.to_string().contains(&format!("--registry-allow {here}")), "{error}");
        // Nor is it for a scenario that was pinned when it was allowed.
        let pinned = Pinned { reference: registry.reference(), digest: digest(manifest().0.as_bytes()) };
        let dir = tempfile::tempdir().unwrap();
        let prepared =
            library(&dir, only(&patterns)).prepare(&pinned, &Identity::from_bits(1), None, &Additional::new()).await;
        assert_eq!(prepared.unwrap_err().code(), "OCI_REGISTRY_NOT_ALLOWED");
    }
    assert!(registry.seen().is_empty());
    let dir = tempfile::tempdir().unwrap();
    library(&dir, only(&[format!("{here}/web")])).resolve(&registry.reference()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_to_a_private_address_is_not_followed_unless_it_is_listed() {
    let other = Fake::holding_web(|_| None).await;
    for target in [
        format!("http://{}/x", other.address),
        format!("http://localhost:{}/x", other.address.port()),
        format!("http://[::ffff:7f00:1]:{}/x", other.address.port()),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "http://10.0.0.1/x".to_owned(),
        "http://[fe80::1]/x".to_owned(),
        "http://0.0.0.0/x".to_owned(),
        "http://user:secret@8.8.8.8/x".to_owned(),
        "file:///etc/passwd".to_owned(),
        "//".to_owned(),
    ] {
        let location = target.clone();
        let registry = Fake::start(move |_| Reply::header(302, "location", location.clone())).await;
        for access in [plain(), only(&[registry.address.to_string()])] {
            let error = fails(access, &registry.reference()).await;
            assert_eq!(error.code(), "OCI_INTERACTION", "{target}: {error}");
        }
        assert_eq!(registry.seen().len(), 2, "{target}");
    }
    assert!(other.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn link_local_and_unspecified_addresses_are_no_registries() {
    for reference in
        ["169.254.169.254/web", "169.254.43518/web", "0xa9fea9fe.:80/web", "0.0.0.0:5000/web", "100.100.100.200/web"]
    {
        let error = fails(plain(), reference).await;
        assert!(["OCI_INTERACTION", "OCI_REFERENCE_MALFORMED"].contains(&error.code()), "{reference}: {error}");
        assert!(error.code() != "OCI_INTERACTION" || error.to_string().contains("link-local or reserved"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_and_endless_responses_are_refused() {
    let huge = || Reply::body(vec![b' '; 5 << 20]);
    let manifests =
        Fake::holding_web(move |request| (request.method == "GET" && request.path.contains("/manifests/")).then(huge))
            .await;
    let tokens = Fake::holding_web(move |request| match request.path.starts_with("/token") {
        true => Some(huge()),
        false => Some(Reply::header(401, "www-authenticate", "Bearer realm=\"http://HOST/token\"")),
    })
    .await;
    let errors = Fake::start(move |_| Reply::With(500, Vec::new(), vec![b'x'; 5 << 20])).await;
    let redirects = Fake::start(|request| Reply::header(302, "location", format!("{}x", request.path))).await;
    for (registry, part) in [
        (&manifests, "sends more than 4194304 bytes"),
        (&tokens, "sends more than 262144 bytes"),
        (&errors, "answered 500"),
        (&redirects, "redirects more than 5 times"),
    ] {
        let error = fails(plain(), &registry.reference()).await;
        assert!(error.to_string().contains(part) && error.to_string().len() < 900, "{error}");
    }
    assert_eq!(redirects.seen().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_registry_delays_no_other() {
    let slow = Fake::start(|_| Reply::Never).await;
    let fast = Fake::holding_web(|_| None).await;
    let dir = tempfile::tempdir().unwrap();
    let library = library(&dir, Access { timeout: Duration::from_secs(60), ..plain() });
    // Both registries claim to have this digest.
    let digest = digest(manifest().0.as_bytes());
    let references: Vec<String> = (0..100).map(|n| format!("{}/web{n}@{digest}", slow.address)).collect();
    let mut waiting: FuturesUnordered<_> = references.iter().map(|reference| library.resolve(reference)).collect();
    let mut refused = 0;
    eventually("the slow registry is busy", async || {
        while let Some(Some(result)) = waiting.next().now_or_never() {
            assert_eq!(result.unwrap_err().code(), "OCI_INTERACTION");
            refused += 1;
        }
        slow.seen().len() == 8
    })
    .await;
    assert_eq!(refused, 100 - 8 - 64, "the queue of a registry is bounded");
    let reference = format!("{}/web@{digest}", fast.address);
    tokio::time::timeout(Duration::from_secs(30), library.resolve(&reference)).await.unwrap().unwrap();
    assert_eq!(slow.seen().len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_without_the_content_fails_only_its_own_callers() {
    let empty = Fake::start(|_| Reply::status(404)).await;
    let full = Fake::holding_web(|_| None).await;
    let dir = tempfile::tempdir().unwrap();
    let library = library(&dir, plain());
    let digest = digest(manifest().0.as_bytes());
    let [empty, full] = [empty.address, full.address].map(|address| format!("{address}/web@{digest}"));
    let (missing, found) = tokio::join!(library.resolve(&empty), library.resolve(&full));
    assert_eq!(missing.unwrap_err().code(), "OCI_REFERENCE_NOT_FOUND");
    found.unwrap();
}
