//! Artifacts from a hostile or broken registry are rejected.

use std::{fs, path::Path};

use gauntlet_domain::Scenarios as _;
use gauntlet_scenario::FileLimits;
use serde_json::{Value, json};

use crate::support::{DOCUMENT, Fixture, digest, packed, plain, titled, unpacked};

#[tokio::test(flavor = "multi_thread")]
async fn hostile_layers_are_rejected_and_leave_nothing() {
    use tar::EntryType::{Block, Char, Fifo, GNULongName, Link, Regular, Symlink, XHeader};
    let fixture = Fixture::new();
    let limits = FileLimits { file: 1 << 20, total: 2 << 20, count: 8 };
    let library = fixture.library_at("strict", plain(), limits);
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
        let reference = fixture.put(&format!("case{at}"), &[(over.clone(), content)]);
        let error = library.resolve(&reference).await.unwrap_err();
        let code = error.code();
        assert!(code == "SCENARIO_NON_MATCHING_SPECIFICATION" || code == "OCI_INTERACTION", "{over}: {error}");
        assert!(error.to_string().len() < 900, "{over}: {error}");
        assert_eq!((fixture.cached("strict"), fixture.drafts("strict")), (0, 0), "{over}: {error}");
    }
    for escaped in ["escaped", "strict/escaped", "strict/drafts/escaped", "strict/sha256/escaped"] {
        assert!(!fixture.dir.path().join(escaped).exists());
    }
    assert!(!Path::new("/tmp/gauntlet-escaped").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_of_other_types_are_rejected() {
    let fixture = Fixture::new();
    let library = fixture.library(plain());
    let layer = || fixture.layer("x", &json!({}), "scenario.yaml", DOCUMENT.as_bytes());
    let mut image = fixture.manifest("x", vec![layer()]);
    image["artifactType"] = json!("application/vnd.other");
    let none = fixture.manifest("x", vec![]);
    let many = fixture.manifest("x", vec![layer(); 3000]);
    fixture.put_manifest("x", &none);
    let (listed, size) = (digest(none.to_string().as_bytes()), none.to_string().len());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{ "mediaType": kind, "digest": listed, "size": size, "platform": { "architecture": "amd64", "os": "linux" } }]
    });
    for manifest in [image, none, many, index] {
        fixture.put_manifest("x", &manifest);
        let error = library.resolve(&fixture.reference("x")).await.unwrap_err();
        assert_eq!(error.code(), "SCENARIO_NON_MATCHING_SPECIFICATION", "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_content_is_rejected() {
    let fixture = Fixture::new();
    let pushed = fixture.push("web:v1").await;
    let data = |digest: &str| {
        let hex = digest.trim_start_matches("sha256:");
        fixture.dir.path().join("registry/blobs/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    };
    let run = fs::read(fixture.scenario().join("bin/run")).unwrap();
    let document = digest(DOCUMENT.as_bytes());
    let library = fixture.library(plain());
    for (what, path) in
        [("a file", data(&document)), ("another file", data(&digest(&run))), ("the manifest", data(&pushed))]
    {
        let content = fs::read(&path).unwrap();
        let mut changed = content.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&path, changed).unwrap();
        let error = library.resolve(&fixture.reference(&format!("web@{pushed}"))).await.unwrap_err();
        assert_eq!(error.code(), "OCI_INTERACTION", "{what}: {error}");
        assert_eq!((fixture.cached("cache"), fixture.drafts("cache")), (0, 0), "{what}");
        fs::write(&path, content).unwrap();
    }
    library.resolve(&fixture.reference("web:v1")).await.unwrap();
}
