//! Cached scenarios are used as they were unpacked, or not at all.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use gauntlet_domain::Scenarios as _;

use crate::support::{Fixture, files_of, plain};

/// Replaces the content of a read-only file by other content of the same size and with the same modification time.
fn overwrite(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let mut content = fs::read(path).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(path, content).unwrap();
    fs::set_permissions(path, mode).unwrap();
    fs::File::open(path).unwrap().set_modified(modified).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_scenario_is_fetched_again() {
    type Change = (&'static str, fn(&Path));
    let changes: [Change; 8] = [
        ("content", |files| overwrite(&files.join("bin/run"))),
        ("replaced file", |files| {
            fs::remove_file(files.join("bin/run")).unwrap();
            fs::write(files.join("bin/run"), "#!/bin/sh\nexec sleep 61\n").unwrap();
        }),
        ("link", |files| {
            fs::remove_file(files.join("bin/run")).unwrap();
            symlink("/bin/true", files.join("bin/run")).unwrap();
        }),
        ("missing file", |files| fs::remove_file(files.join("empty")).unwrap()),
        ("added file", |files| fs::write(files.join("bin/added"), "x").unwrap()),
        ("mode", |files| fs::set_permissions(files.join("large"), fs::Permissions::from_mode(0o777)).unwrap()),
        ("seal", |files| fs::remove_file(files.parent().unwrap().join("seal")).unwrap()),
        ("everything", |files| fs::remove_dir_all(files).unwrap()),
    ];
    let fixture = Fixture::new();
    fs::write(fixture.scenario().join("large"), "smaller").unwrap();
    fixture.push("web:v1").await;
    let library = fixture.library(plain());
    let pinned = library.resolve(&fixture.reference("web:v1")).await.unwrap();
    let files = files_of(&library, &pinned).await;
    let same = || {
        let read =
            |dir: &Path| ["bin/run", "empty", "large", "scenario.yaml"].map(|name| fs::read(dir.join(name)).unwrap());
        let mode = fs::metadata(files.join("large")).unwrap().permissions().mode() & 0o777;
        read(&files) == read(&fixture.scenario()) && mode == 0o444 && !files.join("bin/added").exists()
    };
    for (what, change) in changes {
        for restarted in [false, true] {
            // A running manager compares the files with what it remembers, so it doesn't need the seal.
            if what == "seal" && !restarted {
                continue;
            }
            files_of(&library, &pinned).await;
            let served = fixture.blobs_served();
            change(&files);
            let library = if restarted { fixture.library(plain()) } else { library.clone() };
            assert_eq!(files_of(&library, &pinned).await, files, "{what}");
            assert!(same(), "{what}, restarted: {restarted}");
            assert_eq!(fixture.blobs_served() - served, 4, "{what}, restarted: {restarted}");
            assert_eq!((fixture.cached("cache"), fixture.drafts("cache")), (1, 0), "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_scenario_is_not_fetched_again() {
    let mut fixture = Fixture::new();
    fixture.push("web:v1").await;
    let library = fixture.library(plain());
    let pinned = library.resolve(&fixture.reference("web:v1")).await.unwrap();
    let files = files_of(&library, &pinned).await;
    fixture.registry.process.kill().unwrap();
    for library in [library.clone(), fixture.library(plain()), library] {
        assert_eq!(files_of(&library, &pinned).await, files);
        // Metadata that changes without the content is no damage.
        fs::hard_link(files.join("large"), fixture.dir.path().join("link")).unwrap();
        fs::remove_file(fixture.dir.path().join("link")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_scenario_without_its_registry_is_not_used() {
    let mut fixture = Fixture::new();
    fixture.push("web:v1").await;
    let library = fixture.library(plain());
    let pinned = library.resolve(&fixture.reference("web:v1")).await.unwrap();
    let files = files_of(&library, &pinned).await;
    fixture.registry.process.kill().unwrap();
    overwrite(&files.join("bin/run"));
    let additional = gauntlet_domain::Additional::new();
    let prepared = library.prepare(&pinned, &gauntlet_domain::Identity::from_bits(1), None, &additional).await;
    assert_eq!(prepared.unwrap_err().code(), "OCI_INTERACTION");
}
