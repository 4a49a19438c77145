//! Local directories: access, caching and launch plans.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use gauntlet_domain::{
    Additional, Error, Identity, LaunchPlan, Pinned, Placement, PortHold, PreparedScenario, Scenarios as _,
};
use gauntlet_scenario::{Config, FlagKey, FlagKeys, Library, validate};

const WEB: &str = r#"
version: 1
provisioner: process
process:
  command: ["./run.sh", "--listen", "0.0.0.0:{{ ports.http }}"]
  env:
    FLAG: "{{ flags.main }}"
    MOTD: "{{ additional['mo td'] | default('hello') }}"
ports: { http: tcp, side: udp }
ready: { tcp: { port: http } }
flags:
  main: "FLAG{ {{ vary('hello web') }} }"
  given: "{{ additional['add-flag'] | default('FLAG{none}') }}"
connection_info: "http://{{ host }}:{{ ports.http }}/{{ identity }}"
"#;

struct Fixture {
    dir: tempfile::TempDir,
    library: Library,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("root/web");
    fs::create_dir_all(&web).unwrap();
    fs::write(web.join("scenario.yaml"), WEB).unwrap();
    fs::write(web.join("run.sh"), "#!/bin/sh\nsleep 1\n").unwrap();
    let mut config = Config::new(dir.path().join("cache"), FlagKey::new([1; 32]));
    config.local_root = Some(dir.path().join("root"));
    let library = Library::new(config).unwrap();
    Fixture { dir, library }
}

#[tokio::test]
async fn relative_cache_directory_yields_absolute_files() {
    let fixture = fixture();
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    let relative = up.join(fixture.dir.path().strip_prefix("/").unwrap()).join("another");
    let mut config = Config::new(relative, FlagKey::new([1; 32]));
    config.local_root = Some(fixture.dir.path().join("root"));
    let library = Library::new(config).unwrap();
    let pinned = library.resolve("file://web").await.unwrap();
    let plan = render(&library, &prepare(&library, &pinned, 1, &[]).await).await;
    assert!(plan.files.is_absolute(), "{}", plan.files.display());
}

async fn prepare(library: &Library, pinned: &Pinned, identity: u64, additional: &[(&str, &str)]) -> PreparedScenario {
    let additional: Additional = additional.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    library.prepare(pinned, &Identity::from_bits(identity), None, &additional).await.unwrap()
}

async fn render(library: &Library, prepared: &PreparedScenario) -> LaunchPlan {
    let ports = BTreeMap::from([("http".to_owned(), 4000), ("side".to_owned(), 4001)]);
    let placement = Placement { host: "play.test".into(), ports, dir: "/instance".into(), hold: PortHold::default() };
    library.render(prepared, &placement).await.unwrap()
}

#[tokio::test]
async fn local_directory_becomes_a_launch_plan() {
    let fixture = fixture();
    let pinned = fixture.library.resolve("file://web").await.unwrap();
    assert_eq!(pinned.reference, "file://web");
    let absolute = format!("file://{}", fixture.dir.path().join("root/web").display());
    assert_eq!(fixture.library.resolve(&absolute).await.unwrap().digest, pinned.digest);

    let prepared = prepare(&fixture.library, &pinned, 1, &[("mo td", "moin"), ("add-flag", "FLAG{given}")]).await;
    assert_eq!(prepared.ports.len(), 2);
    let plan = render(&fixture.library, &prepared).await;
    assert_eq!(plan, render(&fixture.library, &prepared).await, "rendering must be deterministic");
    assert_eq!(plan.command, ["./run.sh", "--listen", "0.0.0.0:4000"]);
    assert_eq!(plan.env["MOTD"], "moin");
    assert_eq!(plan.connection_info, "http://play.test:4000/0000000000000001");
    assert_eq!(plan.flags, [plan.env["FLAG"].clone(), "FLAG{given}".into()]);
    assert!(plan.files.join("run.sh").is_file());
    assert!(!format!("{prepared:?} {plan:?}").contains("FLAG{"), "Debug must omit flags");

    let other = render(&fixture.library, &prepare(&fixture.library, &pinned, 2, &[]).await).await;
    assert_ne!(other.flags[0], plan.flags[0]);
    assert_eq!((other.env["MOTD"].as_str(), other.flags[1].as_str()), ("hello", "FLAG{none}"));
}

#[tokio::test]
async fn pinned_scenario_does_not_change() {
    let fixture = fixture();
    let web = fixture.dir.path().join("root/web");
    let pinned = fixture.library.resolve("file://web").await.unwrap();
    fs::write(web.join("run.sh"), "#!/bin/sh\necho changed\n").unwrap();
    let moved = fixture.library.resolve("file://web").await.unwrap();
    assert_ne!(moved.digest, pinned.digest);
    let plan = render(&fixture.library, &prepare(&fixture.library, &pinned, 1, &[]).await).await;
    assert_eq!(fs::read_to_string(plan.files.join("run.sh")).unwrap(), "#!/bin/sh\nsleep 1\n");

    fs::remove_dir_all(fixture.dir.path().join("cache/sha256")).unwrap();
    prepare(&fixture.library, &moved, 1, &[]).await;
    let error = fixture.library.prepare(&pinned, &Identity::from_bits(1), None, &Additional::new()).await.unwrap_err();
    assert!(
        matches!(&error, Error::ScenarioNotFound { problem, .. } if problem.contains("no longer cached")),
        "{error}"
    );
}

#[tokio::test]
async fn references_outside_of_the_root_are_rejected() {
    let fixture = fixture();
    let outside = fixture.dir.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("scenario.yaml"), WEB).unwrap();
    std::os::unix::fs::symlink(&outside, fixture.dir.path().join("root/link")).unwrap();
    let beside = format!("file://{}", outside.display());
    for reference in [
        "file://../outside",
        "file://web/../../outside",
        "file://link",
        &beside,
        "file:///etc",
        "file://none",
        "file://web/run.sh",
    ] {
        let error = fixture.library.resolve(reference).await.unwrap_err();
        assert_eq!(error.code(), "SCENARIO_NOT_FOUND", "{reference}: {error}");
    }
    let closed = Library::new(Config::new(fixture.dir.path().join("cache"), FlagKey::new([1; 32]))).unwrap();
    let error = closed.resolve("file://web").await.unwrap_err();
    assert!(error.to_string().contains("--scenario-root"), "{error}");
}

#[tokio::test]
async fn invalid_directories_are_explained() {
    let fixture = fixture();
    let wrong = async |files: &[(&str, &str)]| {
        let dir = fixture.dir.path().join("root/wrong");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
        match fixture.library.resolve("file://wrong").await.unwrap_err() {
            Error::ScenarioInvalid { problem, .. } => problem,
            error => panic!("{error}"),
        }
    };
    insta::assert_snapshot!(wrong(&[]).await);
    insta::assert_snapshot!(wrong(&[("Pulumi.yaml", "name: x")]).await);
    insta::assert_snapshot!(wrong(&[("scenario.yml", WEB)]).await);
    insta::assert_snapshot!(wrong(&[("scenario.yaml", &WEB.replace("command:", "comand:"))]).await);
    let dir = fixture.dir.path().join("root/wrong");
    fs::write(dir.join("scenario.yaml"), WEB).unwrap();
    fs::write(dir.join("Pulumi.yaml"), "name: x").unwrap();
    fixture.library.resolve("file://wrong").await.expect("scenario.yaml takes precedence over Pulumi.yaml");
}

#[tokio::test]
async fn missing_additional_value_fails_prepare() {
    let fixture = fixture();
    let dir = fixture.dir.path().join("root/needs");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("scenario.yaml"), WEB.replace(" | default('FLAG{none}')", "")).unwrap();
    let pinned = fixture.library.resolve("file://needs").await.unwrap();
    let error = fixture.library.prepare(&pinned, &Identity::from_bits(1), None, &Additional::new()).await.unwrap_err();
    assert_eq!(error.code(), "SCENARIO_PREPROCESSING");
    insta::assert_snapshot!(error);
}

#[tokio::test(flavor = "multi_thread")]
async fn libraries_share_a_cache_directory() {
    let fixture = fixture();
    let mut config = Config::new(fixture.dir.path().join("cache"), FlagKey::new([1; 32]));
    config.local_root = Some(fixture.dir.path().join("root"));
    let second = Library::new(config).unwrap();
    let all =
        (0..20).map(|n| if n % 2 == 0 { fixture.library.resolve("file://web") } else { second.resolve("file://web") });
    let all = futures::future::join_all(all).await;
    let first = all[0].as_ref().unwrap();
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap() == first));
    assert_eq!(fs::read_dir(fixture.dir.path().join("cache/drafts")).unwrap().count(), 0);
}

#[test]
fn report_lists_files_and_warnings() {
    let fixture = fixture();
    let report = validate(&fixture.dir.path().join("root/web")).unwrap();
    assert!(report.is_valid() && report.warnings.is_empty(), "{report:?}");
    let files: Vec<_> = report.files.iter().map(|file| (file.path.as_str(), file.executable)).collect();
    assert_eq!(files, [("run.sh", true), ("scenario.yaml", false)]);

    fs::remove_file(fixture.dir.path().join("root/web/run.sh")).unwrap();
    assert_eq!(validate(&fixture.dir.path().join("root/web")).unwrap().warnings.len(), 1);
    assert!(validate(Path::new("/nowhere")).is_err());
}

#[tokio::test]
async fn rotated_key_is_for_new_instances_only() {
    let fixture = fixture();
    let file = fixture.dir.path().join("flag.key");
    let keys = FlagKeys::load_or_create(&file).unwrap();
    let mut config = Config::new(fixture.dir.path().join("cache"), keys);
    config.local_root = Some(fixture.dir.path().join("root"));
    let library = Library::new(config).unwrap();
    let pinned = library.resolve("file://web").await.unwrap();
    let flags = async |key: Option<&str>| {
        library.prepare(&pinned, &Identity::from_bits(1), key, &Additional::new()).await.map(|prepared| prepared.flags)
    };
    let old = library.flag_key().unwrap();
    let before = flags(Some(&old)).await.unwrap();
    let new = FlagKeys::rotate(&file).unwrap();
    assert_eq!(library.flag_key(), Some(new.clone()), "a running library notices it");
    assert_eq!(flags(Some(&old)).await.unwrap(), before);
    assert_eq!(flags(None).await.unwrap(), before, "of an instance without an id");
    assert_ne!(flags(Some(&new)).await.unwrap(), before);
    let error = flags(Some("00000000")).await.unwrap_err();
    assert!(error.code() == "UNAVAILABLE" && error.to_string().contains("--flag-key-file"), "{error}");
}
