//! Round trips of push and pull, and resolution of references.

use std::{fs, sync::Mutex};

use gauntlet_domain::{Additional, Error, Identity, Pinned, Scenarios as _};
use gauntlet_scenario::{FileLimits, Progress, PushError, push};
use gauntlet_testing::eventually;
use serde_json::json;

use crate::support::{DOCUMENT, Fixture, files_of, merge, packed, plain, unpacked};

#[tokio::test(flavor = "multi_thread")]
async fn pushed_scenario_can_be_pulled() {
    let fixture = Fixture::new();
    let seen = Mutex::new(Vec::new());
    let reference = fixture.reference("a/web:v1");
    let progress = |step| seen.lock().unwrap().push(step);
    let pushed = push(&fixture.scenario(), &reference, &plain(), &progress).await.unwrap();
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
    let again = push(&fixture.scenario(), &fixture.reference("a/web:v2"), &plain(), &progress).await.unwrap();
    assert_eq!(again, pushed, "the same files must give the same digest");
    let known = |step: &Progress| matches!(step, Progress::Manifest { .. } | Progress::File { known: true, .. });
    assert!(seen.lock().unwrap().iter().all(known), "a known blob was sent again");

    let library = fixture.library(plain());
    for reference in [
        reference.clone(),
        fixture.reference("a/web:v2"),
        fixture.reference(&format!("a/web@{pushed}")),
        fixture.reference(&format!("a/web:gone@{pushed}")),
    ] {
        let pinned = library.resolve(&reference).await.unwrap();
        assert_eq!(pinned, Pinned { reference, digest: pushed.clone() });
    }
    assert_eq!(fixture.blobs_served(), 4, "each blob must be pulled once");
    let pinned = Pinned { reference, digest: pushed };
    let files = files_of(&library, &pinned).await;
    for name in ["bin/run", "empty", "large", "scenario.yaml"] {
        assert_eq!(fs::read(files.join(name)).unwrap(), fs::read(fixture.scenario().join(name)).unwrap(), "{name}");
    }
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(files.join("bin/run")).unwrap().permissions().mode() & 0o777, 0o555);
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_tag_is_noticed_and_pinned_digest_needs_no_registry() {
    let mut fixture = Fixture::new();
    let library = fixture.library(plain());
    fixture.push("web:latest").await;
    let old = library.resolve(&fixture.reference("web")).await.unwrap();
    fs::write(fixture.scenario().join("bin/run"), "#!/bin/sh\nexit 1\n").unwrap();
    fixture.push("web:latest").await;
    let new = library.resolve(&fixture.reference("web")).await.unwrap();
    assert_ne!(old.digest, new.digest);

    fixture.registry.process.kill().unwrap();
    assert_ne!(files_of(&library, &old).await, files_of(&library, &new).await);
    let by_digest = fixture.reference(&format!("web@{}", old.digest));
    assert_eq!(library.resolve(&by_digest).await.unwrap().digest, old.digest);
    let error = library.resolve(&fixture.reference("web")).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");

    fs::remove_dir_all(fixture.dir.path().join("cache/sha256")).unwrap();
    let error = library.prepare(&old, &Identity::from_bits(1), None, &Additional::new()).await.unwrap_err();
    assert_eq!(error.code(), "OCI_INTERACTION", "{error}");
    fixture.registry.process.start().unwrap();
    files_of(&library, &old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_resolves_share_one_pull() {
    let fixture = Fixture::new();
    let digest = fixture.push("web:latest").await;
    let library = fixture.library(plain());
    let reference = fixture.reference("web");
    let all = futures::future::join_all((0..20).map(|_| library.resolve(&reference))).await;
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap().digest == digest));
    assert_eq!(fixture.blobs_served(), 4);

    // Several libraries with one cache directory stand in for several processes.
    let others: Vec<_> = (0..4).map(|_| fixture.library_at("shared", plain(), FileLimits::default())).collect();
    let all = futures::future::join_all(others.iter().map(|library| library.resolve(&reference))).await;
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap().digest == digest));
    assert_eq!((fixture.cached("shared"), fixture.drafts("shared")), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_resolve_leaves_no_draft() {
    let fixture = Fixture::new();
    fixture.push("web:latest").await;
    let library = fixture.library(plain());
    for polls in 0..12 {
        let reference = fixture.reference("web");
        let mut resolve = Box::pin(library.resolve(&reference));
        for _ in 0..polls {
            if futures::poll!(&mut resolve).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    library.resolve(&fixture.reference("web")).await.unwrap();
    eventually("drafts are removed", async || fixture.drafts("cache") == 0).await;
    assert_eq!((fixture.cached("cache"), fixture.drafts("cache")), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_and_unknown_references_are_rejected() {
    let fixture = Fixture::new();
    let library = fixture.library(plain());
    let digest = fixture.push("web:v1").await;
    for rest in ["web:none", "none:v1", "none", &format!("web@sha256:{}", "0".repeat(64))] {
        let error = library.resolve(&fixture.reference(rest)).await.unwrap_err();
        assert_eq!(error.code(), "OCI_REFERENCE_NOT_FOUND", "{rest}: {error}");
    }
    let upper =
        format!("{}/web@sha256:{}", fixture.registry.address(), digest.to_uppercase().trim_start_matches("SHA256:"));
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
    for to in [fixture.reference(&format!("web@{digest}")), "web".into()] {
        let error = push(&fixture.scenario(), &to, &plain(), &|_| {}).await.unwrap_err();
        assert!(matches!(&error, PushError::Failed(Error::ReferenceMalformed { .. })), "{error}");
    }
    fs::write(fixture.scenario().join("scenario.yaml"), "version: 2").unwrap();
    let error = push(&fixture.scenario(), &fixture.reference("web:v1"), &plain(), &|_| {}).await.unwrap_err();
    assert!(matches!(&error, PushError::Unsound(report) if !report.problems.is_empty()), "{error}");
    assert_eq!(
        library.resolve(&fixture.reference("web:v1")).await.unwrap().digest,
        digest,
        "a rejected push must not move the tag"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_of_oras_and_of_older_tools_are_accepted() {
    let fixture = Fixture::new();
    let library = fixture.library(plain());
    use tar::EntryType::{Directory, Regular};
    let archive = packed(&[(Directory, "sub/", ""), (Regular, "sub/one", "1"), (Regular, "sub/deep/two", "#!/bin/sh")]);
    let whole = json!({ "mediaType": "application/vnd.ctfer-io.file" });
    let mut file_typed = unpacked("sub");
    merge(&mut file_typed, &whole);
    for (repository, layer) in [("tar", unpacked("sub")), ("tar-as-file", file_typed)] {
        let reference = fixture.put(repository, &[(layer, &archive)]);
        let pinned = library.resolve(&reference).await.unwrap();
        let files = files_of(&library, &pinned).await;
        assert_eq!(fs::read_to_string(files.join("sub/one")).unwrap(), "1");
        assert_eq!(fs::read_to_string(files.join("sub/deep/two")).unwrap(), "#!/bin/sh");
    }
    // Manifests without `artifactType` use the media type of the config as the artifact's type.
    let layer = fixture.layer("old", &json!({}), "scenario.yaml", DOCUMENT.as_bytes());
    let mut manifest = fixture.manifest("old", vec![layer]);
    manifest.as_object_mut().unwrap().remove("artifactType");
    manifest["config"]["mediaType"] = json!("application/vnd.ctfer-io.scenario");
    fixture.put_manifest("old", &manifest);
    library.resolve(&fixture.reference("old")).await.unwrap();

    let layer = fixture.layer("pulumi", &json!({}), "Pulumi.yaml", b"name: x\nruntime: go\n");
    fixture.put_manifest("pulumi", &fixture.manifest("pulumi", vec![layer]));
    let error = library.resolve(&fixture.reference("pulumi")).await.unwrap_err();
    assert_eq!(error.code(), "SCENARIO_NON_MATCHING_SPECIFICATION");
    assert!(error.to_string().contains("Pulumi"), "{error}");
}
