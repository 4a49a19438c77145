//! Push and pull against the real registry, and what a hostile one may try.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use gauntlet_domain::{Additional, Error, Identity, Pinned, Scenarios as _};
use gauntlet_scenario::{Access, Config, Credentials, FileLimits, FlagKey, Library, Progress, PushError, push};
use gauntlet_stack::{Registry, RegistryOptions};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const DOCUMENT: &str = "version: 1\nprovisioner: process\nprocess: { command: [\"./bin/run\"] }\nports: { a: tcp }\n\
                        ready: { tcp: { port: a } }\nflags: { main: \"{{ vary('x') }}\" }\nconnection_info: \"{{ ports.a }}\"\n";

struct Desk {
    dir: tempfile::TempDir,
    registry: Registry,
}

fn desk() -> Desk {
    desk_with(RegistryOptions::default())
}

fn desk_with(options: RegistryOptions) -> Desk {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path().join("registry"), &options).expect("the real registry runs");
    let scenario = dir.path().join("scenario");
    fs::create_dir_all(scenario.join("bin")).unwrap();
    fs::write(scenario.join("scenario.yaml"), DOCUMENT).unwrap();
    fs::write(scenario.join("bin/run"), "#!/bin/sh\nexec sleep 60\n").unwrap();
    fs::write(scenario.join("empty"), "").unwrap();
    fs::write(scenario.join("large"), vec![7; 5 << 20]).unwrap();
    Desk { dir, registry }
}

fn plain() -> Access {
    Access { insecure: true, ..Access::default() }
}

impl Desk {
    fn scenario(&self) -> PathBuf {
        self.dir.path().join("scenario")
    }

    fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.registry.address())
    }

    fn library(&self, access: Access) -> Library {
        self.library_at("cache", access, FileLimits::default())
    }

    fn library_at(&self, cache: &str, access: Access, limits: FileLimits) -> Library {
        let mut config = Config::new(self.dir.path().join(cache), FlagKey::new([1; 32]));
        config.access = access;
        config.limits = limits;
        Library::new(config).unwrap()
    }

    async fn push(&self, rest: &str) -> String {
        push(&self.scenario(), &self.reference(rest), &plain(), &|_| {}).await.unwrap()
    }

    fn kept(&self, cache: &str) -> usize {
        fs::read_dir(self.dir.path().join(cache).join("sha256")).unwrap().count()
    }

    fn drafts(&self, cache: &str) -> usize {
        fs::read_dir(self.dir.path().join(cache).join("drafts")).unwrap().count()
    }

    /// How many blobs the registry has handed out.
    fn blobs_served(&self) -> usize {
        let log = fs::read_to_string(self.registry.process.log()).unwrap();
        log.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/sha256:")).count()
    }

    fn url(&self, rest: &str) -> String {
        format!("http://{}/v2/{rest}", self.registry.address())
    }

    /// Puts a blob with nothing but HTTP and answers its descriptor's digest and size.
    fn put_blob(&self, repository: &str, content: &[u8]) -> (String, usize) {
        let digest = digest(content);
        let begun = ureq::post(self.url(&format!("{repository}/blobs/uploads/"))).send_empty().unwrap();
        let location = begun.headers()["location"].to_str().unwrap().to_owned();
        let separator = if location.contains('?') { '&' } else { '?' };
        ureq::put(format!("{location}{separator}digest={digest}")).send(content).unwrap();
        (digest, content.len())
    }

    fn put_manifest(&self, repository: &str, manifest: &Value) {
        let kind = manifest["mediaType"].as_str().unwrap().to_owned();
        ureq::put(self.url(&format!("{repository}/manifests/latest")))
            .header("content-type", kind)
            .send(manifest.to_string())
            .unwrap();
    }

    /// Puts an artifact with these layers (title, content, what else) beside a sound `scenario.yaml`.
    fn put(&self, repository: &str, layers: &[(Value, &[u8])]) -> String {
        let mut all = vec![self.layer(repository, &json!({}), "scenario.yaml", DOCUMENT.as_bytes())];
        for (over, content) in layers {
            all.push(self.layer(repository, over, "file", content));
        }
        self.put_manifest(repository, &self.manifest(repository, all));
        self.reference(repository)
    }

    fn layer(&self, repository: &str, over: &Value, title: &str, content: &[u8]) -> Value {
        let (digest, size) = self.put_blob(repository, content);
        let mut layer = json!({
            "mediaType": "application/vnd.ctfer-io.file", "digest": digest, "size": size,
            "annotations": { "org.opencontainers.image.title": title }
        });
        merge(&mut layer, over);
        layer
    }

    fn manifest(&self, repository: &str, layers: Vec<Value>) -> Value {
        let (digest, size) = self.put_blob(repository, b"{}");
        json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.ctfer-io.scenario",
            "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": size },
            "layers": layers
        })
    }
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

fn merge(into: &mut Value, over: &Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            over.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, over) => *into = over.clone(),
    }
}

fn titled(title: &str) -> Value {
    json!({ "annotations": { "org.opencontainers.image.title": title } })
}

fn unpacked(title: &str) -> Value {
    json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "annotations": { "org.opencontainers.image.title": title, "io.deis.oras.content.unpack": "true" }
    })
}

/// A gzipped tar of entries (kind, name, link or content), names written as they are.
fn packed(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (kind, name, text) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o777);
        let content = if kind.is_file() { text.as_bytes() } else { &[] };
        if !kind.is_file() {
            header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap().finish().unwrap()
}

async fn files_of(library: &Library, pinned: &Pinned) -> PathBuf {
    library.prepare(pinned, &Identity::from_bits(1), &Additional::new()).await.unwrap().files
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_pulled() {
    let desk = desk();
    let seen = Mutex::new(Vec::new());
    let reference = desk.reference("a/web:v1");
    let progress = |step| seen.lock().unwrap().push(step);
    let pushed = push(&desk.scenario(), &reference, &plain(), &progress).await.unwrap();
    let files: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .filter_map(|step| match step {
            Progress::File { path, known, .. } => Some((path.clone(), *known)),
            Progress::Manifest { .. } => None,
        })
        .collect();
    assert_eq!(files, ["bin/run", "empty", "large", "scenario.yaml"].map(|path| (path.to_owned(), false)));
    assert_eq!(seen.lock().unwrap().last(), Some(&Progress::Manifest { digest: pushed.clone() }));

    seen.lock().unwrap().clear();
    let again = push(&desk.scenario(), &desk.reference("a/web:v2"), &plain(), &progress).await.unwrap();
    assert_eq!(again, pushed, "the same files give the same digest");
    let known = |step: &Progress| matches!(step, Progress::Manifest { .. } | Progress::File { known: true, .. });
    assert!(seen.lock().unwrap().iter().all(known), "nothing is sent twice");

    let library = desk.library(plain());
    for reference in [
        reference.clone(),
        desk.reference("a/web:v2"),
        desk.reference(&format!("a/web@{pushed}")),
        desk.reference(&format!("a/web:gone@{pushed}")),
    ] {
        let pinned = library.resolve(&reference).await.unwrap();
        assert_eq!(pinned, Pinned { reference, digest: pushed.clone() });
    }
    assert_eq!(desk.blobs_served(), 4, "one pull");
    let pinned = Pinned { reference, digest: pushed };
    let files = files_of(&library, &pinned).await;
    for name in ["bin/run", "empty", "large", "scenario.yaml"] {
        assert_eq!(fs::read(files.join(name)).unwrap(), fs::read(desk.scenario().join(name)).unwrap(), "{name}");
    }
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(files.join("bin/run")).unwrap().permissions().mode() & 0o777, 0o555);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_is_seen_and_a_pinned_digest_needs_no_registry() {
    let mut desk = desk();
    let library = desk.library(plain());
    desk.push("web:latest").await;
    let old = library.resolve(&desk.reference("web")).await.unwrap();
    fs::write(desk.scenario().join("bin/run"), "#!/bin/sh\nexit 1\n").unwrap();
    desk.push("web:latest").await;
    let new = library.resolve(&desk.reference("web")).await.unwrap();
    assert_ne!(old.digest, new.digest);

    desk.registry.process.kill().unwrap();
    assert_ne!(files_of(&library, &old).await, files_of(&library, &new).await);
    let by_digest = desk.reference(&format!("web@{}", old.digest));
    assert_eq!(library.resolve(&by_digest).await.unwrap().digest, old.digest);
    let error = library.resolve(&desk.reference("web")).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");

    fs::remove_dir_all(desk.dir.path().join("cache/sha256")).unwrap();
    let error = library.prepare(&old, &Identity::from_bits(1), &Additional::new()).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    desk.registry.process.start().unwrap();
    files_of(&library, &old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_pull_once() {
    let desk = desk();
    let digest = desk.push("web:latest").await;
    let library = desk.library(plain());
    let reference = desk.reference("web");
    let all = futures::future::join_all((0..20).map(|_| library.resolve(&reference))).await;
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap().digest == digest));
    assert_eq!(desk.blobs_served(), 4);

    // Other processes, as far as the cache can tell.
    let others: Vec<_> = (0..4).map(|_| desk.library_at("shared", plain(), FileLimits::default())).collect();
    let all = futures::future::join_all(others.iter().map(|library| library.resolve(&reference))).await;
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap().digest == digest));
    assert_eq!((desk.kept("shared"), desk.drafts("shared")), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_leaves_nothing() {
    let desk = desk();
    desk.push("web:latest").await;
    let library = desk.library(plain());
    for polls in 0..12 {
        let reference = desk.reference("web");
        let mut resolve = Box::pin(library.resolve(&reference));
        for _ in 0..polls {
            if futures::poll!(&mut resolve).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    library.resolve(&desk.reference("web")).await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while desk.drafts("cache") > 0 && std::time::Instant::now() < deadline {
        tokio::task::yield_now().await;
    }
    assert_eq!((desk.kept("cache"), desk.drafts("cache")), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_asked_for_and_not_told() {
    let desk = desk_with(RegistryOptions::with_user());
    let credentials = |registry: Option<String>, password: &str| Access {
        insecure: true,
        credentials: Some(Credentials { registry, username: RegistryOptions::USER.into(), password: password.into() }),
        ..Access::default()
    };
    let right = credentials(None, RegistryOptions::PASSWORD);
    assert!(!format!("{right:?}").contains(RegistryOptions::PASSWORD));
    let reference = desk.reference("web:v1");
    let digest = push(&desk.scenario(), &reference, &right, &|_| {}).await.unwrap();
    let elsewhere = credentials(Some("other.test".into()), RegistryOptions::PASSWORD);
    for wrong in [plain(), credentials(None, "wrong-secret"), elsewhere] {
        let error = desk.library(wrong.clone()).resolve(&reference).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
        assert!(error.to_string().contains("OCI_USERNAME") && !error.to_string().contains("secret"), "{error}");
        let error = push(&desk.scenario(), &reference, &wrong, &|_| {}).await.unwrap_err();
        assert!(matches!(&error, PushError::Failed(Error::Registry { .. })), "{error}");
    }
    let here = credentials(Some(desk.registry.address()), RegistryOptions::PASSWORD);
    assert_eq!(desk.library(here).resolve(&reference).await.unwrap().digest, digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_authority_of_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&certificate, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let desk = desk_with(RegistryOptions { tls: Some((certificate, key)), htpasswd: None });
    let trusting = Access { extra_roots: vec![made.cert.pem().into_bytes()], ..Access::default() };
    let reference = desk.reference("web:v1");
    let digest = push(&desk.scenario(), &reference, &trusting, &|_| {}).await.unwrap();
    assert_eq!(desk.library(trusting).resolve(&reference).await.unwrap().digest, digest);
    for access in [Access::default(), plain()] {
        let error = desk.library_at("other", access, FileLimits::default()).resolve(&reference).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    }
    let wrong = Access { extra_roots: vec![b"no certificate".to_vec()], ..Access::default() };
    let mut config = Config::new(desk.dir.path().join("cache"), FlagKey::new([1; 32]));
    config.access = wrong;
    assert!(Library::new(config).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn references_that_are_wrong_or_lead_nowhere() {
    let desk = desk();
    let library = desk.library(plain());
    let digest = desk.push("web:v1").await;
    for rest in ["web:none", "none:v1", "none", &format!("web@sha256:{}", "0".repeat(64))] {
        let error = library.resolve(&desk.reference(rest)).await.unwrap_err();
        assert_eq!(error.code(), "OCI_REFERENCE_NOT_FOUND", "{rest}: {error}");
    }
    let upper =
        format!("{}/web@sha256:{}", desk.registry.address(), digest.to_uppercase().trim_start_matches("SHA256:"));
    for reference in [
        "",
        "web",
        "web:v1",
        "library/web",
        "../../etc/passwd",
        "/etc/passwd",
        "host.test/../x",
        "host.test/A/b",
        "host.test/",
        "https://host.test/web",
        "user:secret@host.test/web",
        "host.test/web:",
        "host.test/web@sha256:12",
        "host.test/we b",
        "host.test/web\n",
        "host.test/web@md5:00000000000000000000000000000000",
        "file:/etc",
        "File:///etc",
        &upper,
        &format!("host.test/{}", "a".repeat(2000)),
    ] {
        let error = library.resolve(reference).await.unwrap_err();
        assert_eq!(error.code(), "OCI_REFERENCE_MALFORMED", "{reference}: {error}");
    }
    for to in [desk.reference(&format!("web@{digest}")), "web".into()] {
        let error = push(&desk.scenario(), &to, &plain(), &|_| {}).await.unwrap_err();
        assert!(matches!(&error, PushError::Failed(Error::ReferenceMalformed { .. })), "{error}");
    }
    fs::write(desk.scenario().join("scenario.yaml"), "version: 2").unwrap();
    let error = push(&desk.scenario(), &desk.reference("web:v1"), &plain(), &|_| {}).await.unwrap_err();
    assert!(matches!(&error, PushError::Unsound(report) if !report.problems.is_empty()), "{error}");
    assert_eq!(library.resolve(&desk.reference("web:v1")).await.unwrap().digest, digest, "nothing was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_of_other_tools() {
    let desk = desk();
    let library = desk.library(plain());
    use tar::EntryType::{Directory, Regular};
    let archive = packed(&[(Directory, "sub/", ""), (Regular, "sub/one", "1"), (Regular, "sub/deep/two", "#!/bin/sh")]);
    let whole = json!({ "mediaType": "application/vnd.ctfer-io.file" });
    let mut file_typed = unpacked("sub");
    merge(&mut file_typed, &whole);
    for (repository, layer) in [("tar", unpacked("sub")), ("tar-as-file", file_typed)] {
        let reference = desk.put(repository, &[(layer, &archive)]);
        let pinned = library.resolve(&reference).await.unwrap();
        let files = files_of(&library, &pinned).await;
        assert_eq!(fs::read_to_string(files.join("sub/one")).unwrap(), "1");
        assert_eq!(fs::read_to_string(files.join("sub/deep/two")).unwrap(), "#!/bin/sh");
    }
    // Before artifact types, the configuration's type was the artifact's.
    let layer = desk.layer("old", &json!({}), "scenario.yaml", DOCUMENT.as_bytes());
    let mut manifest = desk.manifest("old", vec![layer]);
    manifest.as_object_mut().unwrap().remove("artifactType");
    manifest["config"]["mediaType"] = json!("application/vnd.ctfer-io.scenario");
    desk.put_manifest("old", &manifest);
    library.resolve(&desk.reference("old")).await.unwrap();

    let layer = desk.layer("pulumi", &json!({}), "Pulumi.yaml", b"name: x\nruntime: go\n");
    desk.put_manifest("pulumi", &desk.manifest("pulumi", vec![layer]));
    let error = library.resolve(&desk.reference("pulumi")).await.unwrap_err();
    assert_eq!(error.code(), "SCENARIO_NON_MATCHING_SPECIFICATION");
    assert!(error.to_string().contains("Pulumi"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_escapes_and_nothing_half_is_kept() {
    use tar::EntryType::{Block, Char, Fifo, GNULongName, Link, Regular, Symlink, XHeader};
    let desk = desk();
    let limits = FileLimits { file: 1 << 20, total: 2 << 20, count: 8 };
    let library = desk.library_at("strict", plain(), limits);
    let big = vec![0u8; (1 << 20) + 1];
    let bomb = {
        let zeros = "\0".repeat(1 << 20);
        packed(&[(Regular, "d/a", &zeros), (Regular, "d/b", &zeros), (Regular, "d/c", &zeros)])
    };
    let many: Vec<(tar::EntryType, String)> = (0..40).map(|n| (Regular, format!("d/{n}"))).collect();
    let many: Vec<_> = many.iter().map(|(kind, name)| (*kind, name.as_str(), "x")).collect();
    let tar = |entries: &[(tar::EntryType, &str, &str)]| (unpacked("d"), packed(entries));
    let file = |over: Value| (over, b"escaped".to_vec());
    let cases: Vec<(Value, Vec<u8>)> = vec![
        file(titled("../escaped")),
        file(titled("/tmp/gauntlet-escaped")),
        file(titled("a/../../escaped")),
        file(titled("a\u{0}b")),
        file(titled("")),
        file(titled(&"x".repeat(4000))),
        file(titled("scenario.yaml")),
        file(titled("SCENARIO.yaml")),
        file(titled("scenario.yaml/x")),
        file(json!({ "annotations": { "org.opencontainers.image.title": null } })),
        file(json!({ "annotations": null })),
        file(json!({ "mediaType": "application/octet-stream" })),
        file(json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip" })),
        file(json!({ "size": 3 })),
        file(json!({ "size": 8 })),
        file(json!({ "size": -1 })),
        file(json!({ "size": 1u64 << 50 })),
        (json!({}), big),
        (unpacked("d"), b"not gzip".to_vec()),
        (unpacked("../d"), packed(&[(Regular, "../d/x", "escaped")])),
        (unpacked("d"), bomb),
        tar(&many),
        tar(&[(Regular, "../escaped", "x")]),
        tar(&[(Regular, "/tmp/gauntlet-escaped", "x")]),
        tar(&[(Regular, "d/../../escaped", "x")]),
        tar(&[(Regular, "other/x", "x")]),
        tar(&[(Regular, "d", "x")]),
        tar(&[(Regular, "d/x", "x"), (Regular, "d/X", "x")]),
        tar(&[(Symlink, "d/link", "/etc"), (Regular, "d/link/x", "x")]),
        tar(&[(Link, "d/link", "/etc/passwd")]),
        tar(&[(Char, "d/null", "")]),
        tar(&[(Block, "d/disk", "")]),
        tar(&[(Fifo, "d/pipe", "")]),
        tar(&[(GNULongName, "././@LongLink", "")]),
        tar(&[(XHeader, "d/pax", "")]),
    ];
    for (at, (over, content)) in cases.iter().enumerate() {
        let reference = desk.put(&format!("case{at}"), &[(over.clone(), content)]);
        let error = library.resolve(&reference).await.unwrap_err();
        let code = error.code();
        assert!(code == "SCENARIO_NON_MATCHING_SPECIFICATION" || code == "OCI_INTERACTION", "{over}: {error}");
        assert!(error.to_string().len() < 900, "{over}: {error}");
        assert_eq!((desk.kept("strict"), desk.drafts("strict")), (0, 0), "{over}: {error}");
    }
    for escaped in ["escaped", "strict/escaped", "strict/drafts/escaped", "strict/sha256/escaped"] {
        assert!(!desk.dir.path().join(escaped).exists());
    }
    assert!(!Path::new("/tmp/gauntlet-escaped").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_artifacts_are_refused() {
    let desk = desk();
    let library = desk.library(plain());
    let layer = || desk.layer("x", &json!({}), "scenario.yaml", DOCUMENT.as_bytes());
    let mut image = desk.manifest("x", vec![layer()]);
    image["artifactType"] = json!("application/vnd.other");
    let none = desk.manifest("x", vec![]);
    let many = desk.manifest("x", vec![layer(); 3000]);
    desk.put_manifest("x", &none);
    let (listed, size) = (digest(none.to_string().as_bytes()), none.to_string().len());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{ "mediaType": kind, "digest": listed, "size": size, "platform": { "architecture": "amd64", "os": "linux" } }]
    });
    for manifest in [image, none, many, index] {
        desk.put_manifest("x", &manifest);
        let error = library.resolve(&desk.reference("x")).await.unwrap_err();
        assert_eq!(error.code(), "SCENARIO_NON_MATCHING_SPECIFICATION", "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lies_is_found_out() {
    let desk = desk();
    let pushed = desk.push("web:v1").await;
    let data = |digest: &str| {
        let hex = digest.trim_start_matches("sha256:");
        desk.dir.path().join("registry/blobs/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    };
    let run = fs::read(desk.scenario().join("bin/run")).unwrap();
    let document = digest(DOCUMENT.as_bytes());
    let library = desk.library(plain());
    for (what, path) in
        [("a file", data(&document)), ("another file", data(&digest(&run))), ("the manifest", data(&pushed))]
    {
        let content = fs::read(&path).unwrap();
        let mut changed = content.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&path, changed).unwrap();
        let error = library.resolve(&desk.reference(&format!("web@{pushed}"))).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{what}: {error}");
        assert_eq!((desk.kept("cache"), desk.drafts("cache")), (0, 0), "{what}");
        fs::write(&path, content).unwrap();
    }
    library.resolve(&desk.reference("web:v1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_answer_ends_at_the_deadline() {
    let desk = desk();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/web", silent.local_addr().unwrap());
    let hurried = Access { timeout: Duration::from_millis(200), ..plain() };
    let error = desk.library(hurried.clone()).resolve(&reference).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    let error = push(&desk.scenario(), &reference, &hurried, &|_| {}).await.unwrap_err();
    assert!(matches!(error, PushError::Failed(Error::Registry { .. })));
}
