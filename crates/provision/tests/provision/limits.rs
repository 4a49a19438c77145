//! Instances that reach a limit of the whole instance, where control groups limit it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use gauntlet_domain::{Fact, Limits, Probe};
use gauntlet_provision::process::{LimitBackend, Process};
use gauntlet_testing::{eventually_blocking, fakes::RecordedFacts};

use crate::support::{Fixture, LaunchExt as _, challenge, launch, provision_error, remove};

/// Whether the instances of this fixture are limited as a whole: as root or with delegated controllers.
fn limited(fixture: &Fixture) -> bool {
    let backend = fixture.manager().limit_backend();
    if backend == LimitBackend::Rlimit {
        println!("no controllers of control groups here: not tried");
    }
    backend > LimitBackend::Rlimit
}

/// The directory that counts the instance's processes.
fn pids_dir(state: &serde_json::Value) -> PathBuf {
    let group = &state["group"];
    group["controllers"]["v1"]["pids"].as_str().or(group["unified"].as_str()).unwrap().into()
}

fn state(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(dir.join("state.json")).unwrap()).unwrap()
}

#[test]
fn manager_does_not_start_with_weaker_limits_than_required() {
    let mut fixture = Fixture::without_cgroups();
    fixture.config.require_limits = LimitBackend::Cgroup1;
    let error = provision_error(Process::new(fixture.config.clone()).unwrap_err());
    assert!(error.contains("instances would be limited by rlimit, and cgroup1 is required"), "{error}");
}

#[tokio::test]
async fn fork_bomb_stays_within_its_processes_and_ends_with_its_instance() {
    let fixture = Fixture::new();
    if !limited(&fixture) {
        return;
    }
    let manager = fixture.manager();
    fixture.program("bomb", "while :; do $0 & done");
    let mut plan = fixture.script("echo ready; trap '' CHLD; $SCENARIO_DIR/bomb 2> /dev/null; exec sleep 1000");
    plan.limits.processes = Some(20);
    plan.probe = Probe::Output { contains: "ready".to_owned() };
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let pids = pids_dir(&state(&fixture.instance_dir()));
    let number = |file: &str| std::fs::read_to_string(pids.join(file)).unwrap().trim().parse::<u64>().unwrap();
    eventually_blocking("the bomb has reached its limit", || {
        std::fs::read_to_string(pids.join("pids.events")).unwrap().trim() != "max 0"
    });
    // With the threads of process 1 of its sandbox.
    assert!(number("pids.current") <= 20 + 2);
    // Another instance and the manager are not affected.
    manager.launch(&launch(2, 1, &fixture.greeter())).await.unwrap();
    remove(&manager, 1).await;
    remove(&manager, 2).await;
    assert!(!pids.exists());
}

#[tokio::test]
async fn groups_of_killed_supervisors_are_removed_in_every_hierarchy() {
    let fixture = Fixture::new();
    if !limited(&fixture) {
        return;
    }
    let manager = fixture.manager();
    let plan = fixture.script("setsid env -i sleep 1000 & exec $GREETER");
    manager.launch(&launch(1, 1, &plan)).await.unwrap();
    let pids = pids_dir(&state(&fixture.instance_dir()));
    let (supervisor, _) = fixture.pids(&fixture.instance_dir()).unwrap();
    crate::support::send_signal(supervisor, rustix::process::Signal::KILL);
    eventually_blocking("the supervisor has exited", || !gauntlet_testing::processes::is_running(supervisor));
    fixture.manager().claim("store").await.unwrap();
    assert!(!pids.exists());
}

/// Launches a script that goes on after it is ready, waits until it has ended, and returns how.
async fn end_of(fixture: &Fixture, script: &str, limits: Limits) -> serde_json::Value {
    let manager = fixture.manager();
    let mut plan = fixture.script(script);
    plan.limits = limits;
    plan.probe = Probe::Output { contains: "ready".to_owned() };
    // Fails if the program ends before it is seen to be ready.
    let _ = manager.launch(&launch(1, 1, &plan)).await;
    let dir = fixture.instance_dir();
    eventually_blocking("the instance has ended", || !state(&dir)["end"].is_null());
    state(&dir)["end"].clone()
}

#[tokio::test]
async fn memory_hog_is_killed_and_the_reason_names_the_limit() {
    let fixture = Fixture::new();
    if !limited(&fixture) {
        return;
    }
    let limits = Limits { memory: Some(32 << 20), ..Default::default() };
    let script = "echo ready; x=x; while :; do x=$x$x; done";
    let end = end_of(&fixture, script, limits).await;
    assert_eq!(end["exceeded"], serde_json::json!(["memory"]), "{end}");
    assert_eq!(end["exit"], serde_json::json!({"signal": 9}));
    assert!(end["how"].as_str().unwrap().contains("memory (33554432 bytes)"), "{end}");
    assert!(end["usage"]["memory_peak"].as_u64().unwrap() <= 32 << 20);
}

#[tokio::test]
async fn cpu_hog_gets_its_share_and_the_end_says_so() {
    let fixture = Fixture::new();
    if !limited(&fixture) {
        return;
    }
    let limits = Limits { cpu_quota: Some(2), ..Default::default() };
    let end = end_of(&fixture, "echo ready; i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done", limits).await;
    assert_eq!(end["exceeded"], serde_json::json!(["cpu_quota"]), "{end}");
    assert!(end["how"].as_str().unwrap().contains("exit status 0; it reached its limits: cpu_quota (2%)"), "{end}");
}

#[tokio::test]
async fn reached_limit_is_counted_once_however_often_the_instance_is_stopped() {
    let fixture = Fixture::new();
    let limits = Limits { disk: Some(1 << 20), ..Default::default() };
    end_of(&fixture, "echo ready; exec head -c 2000000 /dev/zero > large", limits).await;
    let facts = Arc::new(RecordedFacts::default());
    let manager = fixture.manager().with_facts(facts.clone());
    manager.halt().await.unwrap();
    // Both stop what is left of the earlier run.
    manager.launch(&launch(1, 2, &fixture.greeter())).await.unwrap();
    let reached = Fact::LimitReached { challenge: challenge("a challenge"), limit: "disk" };
    assert_eq!(facts.take(), [reached]);
    remove(&manager, 1).await;
    assert_eq!(facts.all(), []);
}

#[tokio::test]
async fn failure_of_a_launch_names_the_limit_that_was_reached() {
    let fixture = Fixture::new();
    let mut plan = fixture.script("exec head -c 2000000 /dev/zero > large");
    plan.limits.disk = Some(1 << 20);
    let error = provision_error(fixture.manager().launch(&launch(1, 1, &plan)).await.unwrap_err());
    assert!(error.contains("was ended by signal 25; it reached its limits: disk (1048576 bytes)"), "{error}");
}

#[tokio::test]
async fn file_beyond_the_disk_limit_ends_the_program_and_the_end_says_so() {
    let limits = Limits { disk: Some(1 << 20), ..Default::default() };
    let script = "echo ready; exec head -c 2000000 /dev/zero > large";
    let end = end_of(&Fixture::new(), script, limits.clone()).await;
    assert_eq!(end["exceeded"], serde_json::json!(["disk"]), "{end}");
    let fixture = Fixture::on_host();
    let end = end_of(&fixture, script, limits).await;
    assert_eq!(end["exceeded"], serde_json::json!(["disk"]), "{end}");
    assert_eq!(fixture.instance_dir().join("work/large").metadata().unwrap().len(), 1 << 20);
}
