//! Local directories: what is allowed, what is kept, what instances get.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use gauntlet_domain::{
    Additional, Error, Identity, LaunchPlan, Pinned, Placement, PortHold, PreparedScenario, Scenarios as _,
};
use gauntlet_scenario::{Config, FlagKey, Library, validate};

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

struct Desk {
    dir: tempfile::TempDir,
    library: Library,
}

fn desk() -> Desk {
    let dir = tempfile::tempdir().unwrap();
    let web = dir.path().join("root/web");
    fs::create_dir_all(&web).unwrap();
    fs::write(web.join("scenario.yaml"), WEB).unwrap();
    fs::write(web.join("run.sh"), "#!/bin/sh\nsleep 1\n").unwrap();
    let mut config = Config::new(dir.path().join("cache"), FlagKey::new([1; 32]));
    config.local_root = Some(dir.path().join("root"));
    let library = Library::new(config).unwrap();
    Desk { dir, library }
}

#[tokio::test]
async fn what_is_kept_is_found_from_anywhere() {
    let desk = desk();
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    let relative = up.join(desk.dir.path().strip_prefix("/").unwrap()).join("another");
    let mut config = Config::new(relative, FlagKey::new([1; 32]));
    config.local_root = Some(desk.dir.path().join("root"));
    let library = Library::new(config).unwrap();
    let pinned = library.resolve("file://web").await.unwrap();
    let plan = render(&library, &prepare(&library, &pinned, 1, &[]).await).await;
    assert!(plan.files.is_absolute(), "{}", plan.files.display());
}

async fn prepare(library: &Library, pinned: &Pinned, identity: u64, additional: &[(&str, &str)]) -> PreparedScenario {
    let additional: Additional = additional.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    library.prepare(pinned, &Identity::from_bits(identity), &additional).await.unwrap()
}

async fn render(library: &Library, prepared: &PreparedScenario) -> LaunchPlan {
    let ports = BTreeMap::from([("http".to_owned(), 4000), ("side".to_owned(), 4001)]);
    let placement = Placement { host: "play.test".into(), ports, dir: "/instance".into(), hold: PortHold::default() };
    library.render(prepared, &placement).await.unwrap()
}

#[tokio::test]
async fn a_directory_becomes_a_launch_plan() {
    let desk = desk();
    let pinned = desk.library.resolve("file://web").await.unwrap();
    assert_eq!(pinned.reference, "file://web");
    let absolute = format!("file://{}", desk.dir.path().join("root/web").display());
    assert_eq!(desk.library.resolve(&absolute).await.unwrap().digest, pinned.digest);

    let prepared = prepare(&desk.library, &pinned, 1, &[("mo td", "moin"), ("add-flag", "FLAG{given}")]).await;
    assert_eq!(prepared.ports.len(), 2);
    let plan = render(&desk.library, &prepared).await;
    assert_eq!(plan, render(&desk.library, &prepared).await, "rendering is pure");
    assert_eq!(plan.command, ["./run.sh", "--listen", "0.0.0.0:4000"]);
    assert_eq!(plan.env["MOTD"], "moin");
    assert_eq!(plan.connection_info, "http://play.test:4000/0000000000000001");
    assert_eq!(plan.flags, [plan.env["FLAG"].clone(), "FLAG{given}".into()]);
    assert!(plan.files.join("run.sh").is_file());
    assert!(!format!("{prepared:?} {plan:?}").contains("FLAG{"), "no flag in logs");

    let other = render(&desk.library, &prepare(&desk.library, &pinned, 2, &[]).await).await;
    assert_ne!(other.flags[0], plan.flags[0]);
    assert_eq!((other.env["MOTD"].as_str(), other.flags[1].as_str()), ("hello", "FLAG{none}"));
}

#[tokio::test]
async fn what_is_pinned_does_not_change_under_an_instance() {
    let desk = desk();
    let web = desk.dir.path().join("root/web");
    let pinned = desk.library.resolve("file://web").await.unwrap();
    fs::write(web.join("run.sh"), "#!/bin/sh\necho changed\n").unwrap();
    let moved = desk.library.resolve("file://web").await.unwrap();
    assert_ne!(moved.digest, pinned.digest);
    let plan = render(&desk.library, &prepare(&desk.library, &pinned, 1, &[]).await).await;
    assert_eq!(fs::read_to_string(plan.files.join("run.sh")).unwrap(), "#!/bin/sh\nsleep 1\n");

    fs::remove_dir_all(desk.dir.path().join("cache/sha256")).unwrap();
    prepare(&desk.library, &moved, 1, &[]).await;
    let error = desk.library.prepare(&pinned, &Identity::from_bits(1), &Additional::new()).await.unwrap_err();
    assert!(matches!(&error, Error::ScenarioNotFound { problem, .. } if problem.contains("no longer kept")), "{error}");
}

#[tokio::test]
async fn only_what_lies_under_the_root_is_found() {
    let desk = desk();
    let outside = desk.dir.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("scenario.yaml"), WEB).unwrap();
    std::os::unix::fs::symlink(&outside, desk.dir.path().join("root/link")).unwrap();
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
        let error = desk.library.resolve(reference).await.unwrap_err();
        assert_eq!(error.code(), "SCENARIO_NOT_FOUND", "{reference}: {error}");
    }
    let closed = Library::new(Config::new(desk.dir.path().join("cache"), FlagKey::new([1; 32]))).unwrap();
    let error = closed.resolve("file://web").await.unwrap_err();
    assert!(error.to_string().contains("--scenario-root"), "{error}");
}

#[tokio::test]
async fn what_is_no_scenario_says_why() {
    let desk = desk();
    let wrong = async |files: &[(&str, &str)]| {
        let dir = desk.dir.path().join("root/wrong");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
        match desk.library.resolve("file://wrong").await.unwrap_err() {
            Error::ScenarioInvalid { problem, .. } => problem,
            error => panic!("{error}"),
        }
    };
    insta::assert_snapshot!(wrong(&[]).await);
    insta::assert_snapshot!(wrong(&[("Pulumi.yaml", "name: x")]).await);
    insta::assert_snapshot!(wrong(&[("scenario.yml", WEB)]).await);
    insta::assert_snapshot!(wrong(&[("scenario.yaml", &WEB.replace("command:", "comand:"))]).await);
    let dir = desk.dir.path().join("root/wrong");
    fs::write(dir.join("scenario.yaml"), WEB).unwrap();
    fs::write(dir.join("Pulumi.yaml"), "name: x").unwrap();
    desk.library.resolve("file://wrong").await.expect("scenario.yaml goes first where both are");
}

#[tokio::test]
async fn what_additional_lacks_is_told_before_anything_runs() {
    let desk = desk();
    let dir = desk.dir.path().join("root/needs");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("scenario.yaml"), WEB.replace(" | default('FLAG{none}')", "")).unwrap();
    let pinned = desk.library.resolve("file://needs").await.unwrap();
    let error = desk.library.prepare(&pinned, &Identity::from_bits(1), &Additional::new()).await.unwrap_err();
    assert_eq!(error.code(), "SCENARIO_PREPROCESSING");
    insta::assert_snapshot!(error);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_and_several_libraries_share_a_cache() {
    let desk = desk();
    let mut config = Config::new(desk.dir.path().join("cache"), FlagKey::new([1; 32]));
    config.local_root = Some(desk.dir.path().join("root"));
    let second = Library::new(config).unwrap();
    let all =
        (0..20).map(|n| if n % 2 == 0 { desk.library.resolve("file://web") } else { second.resolve("file://web") });
    let all = futures::future::join_all(all).await;
    let first = all[0].as_ref().unwrap();
    assert!(all.iter().all(|pinned| pinned.as_ref().unwrap() == first));
    assert_eq!(fs::read_dir(desk.dir.path().join("cache/drafts")).unwrap().count(), 0);
}

#[test]
fn a_report_lists_files_and_doubts() {
    let desk = desk();
    let report = validate(&desk.dir.path().join("root/web")).unwrap();
    assert!(report.is_sound() && report.warnings.is_empty(), "{report:?}");
    let files: Vec<_> = report.files.iter().map(|file| (file.path.as_str(), file.executable)).collect();
    assert_eq!(files, [("run.sh", true), ("scenario.yaml", false)]);

    fs::remove_file(desk.dir.path().join("root/web/run.sh")).unwrap();
    assert_eq!(validate(&desk.dir.path().join("root/web")).unwrap().warnings.len(), 1);
    assert!(validate(Path::new("/nowhere")).is_err());
}
