//! The lifecycle of challenges and instances, on both backends.

use gauntlet_api::v1::instance::{
    CreateInstanceRequest, DeleteInstanceRequest, Instance, RenewInstanceRequest, RetrieveInstanceRequest,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tonic::Code;

use crate::harness::{Backend, Manager, World, address, eventually, fetch, local};
use gauntlet_testing::processes;

async fn create(manager: &Manager, challenge: &str, source: &str) -> Result<Instance, tonic::Status> {
    let request =
        CreateInstanceRequest { challenge_id: challenge.into(), source_id: source.into(), ..Default::default() };
    manager.instances().await.create_instance(request).await.map(tonic::Response::into_inner)
}

fn full_lifecycle(backend: Backend) {
    let world = World::bare(backend).with_registry();
    let manager = world.manager("m1");
    let reference = world.push("web");

    // Over REST.
    let challenge = manager.create_challenge("web", &reference, &json!({ "timeout": "600s" }));
    assert_eq!(challenge["scenario"], reference);
    assert_eq!(challenge["timeout"], "600s");

    world.runtime.block_on(async {
        // Over gRPC.
        let alice = create(&manager, "web", "alice").await.unwrap();
        let bob = create(&manager, "web", "bob").await.unwrap();
        assert_ne!(alice.flags, bob.flags, "every instance has its own flag");
        assert_ne!(alice.connection_info, bob.connection_info);
        let page = address(&alice.connection_info).to_owned();
        fetch(&page).unwrap();
        assert_eq!(create(&manager, "web", "alice").await.unwrap_err().code(), Code::AlreadyExists);

        let mut client = manager.instances().await;
        let (challenge_id, source_id) = ("web".to_owned(), "alice".to_owned());
        let renewed = client
            .renew_instance(RenewInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() })
            .await;
        let until = |instance: &Instance| instance.until.map(|until| (until.seconds, until.nanos)).unwrap();
        assert!(until(renewed.unwrap().get_ref()) > until(&alice), "renewal extends until");

        client
            .delete_instance(DeleteInstanceRequest { challenge_id: challenge_id.clone(), source_id: source_id.clone() })
            .await
            .unwrap();
        assert!(fetch(&page).is_err(), "deleting an instance stops its process");
        let deleted = client.retrieve_instance(RetrieveInstanceRequest { challenge_id, source_id }).await;
        assert_eq!(deleted.unwrap_err().code(), Code::NotFound);
        fetch(address(&bob.connection_info)).unwrap();
    });

    manager.delete("/api/v1/challenge/web").ok();
    assert_eq!(manager.get("/api/v1/challenge").lines(), Vec::<serde_json::Value>::new());
    assert_eq!(world.instances(), 0, "no instance is left");
}

#[test]
fn full_lifecycle_embedded() {
    full_lifecycle(Backend::Embedded);
}

#[test]
fn full_lifecycle_etcd() {
    full_lifecycle(Backend::Etcd);
}

fn survives_a_killed_manager(backend: Backend) {
    let world = World::bare(backend);
    let mut manager = world.manager("m1");
    manager.create_challenge("vault", &local("vault"), &json!({}));
    let before = manager.create_instance("vault", "team").ok();
    assert_eq!(before["flags"].as_array().unwrap().len(), 2);
    assert!(before.get("flag").is_none(), "`flag` is set only for a single flag");
    let page = address(before["connectionInfo"].as_str().unwrap()).to_owned();
    fetch(&page).unwrap();

    manager.process.kill().unwrap();
    fetch(&page).expect("the instance keeps running without its manager");
    manager.process.start().unwrap();
    assert_eq!(manager.get("/api/v1/instance/vault/team").ok(), before);
    assert_eq!(manager.create_instance("vault", "team").status, 409);
    assert_eq!(world.instances(), 1, "the instance is not launched twice");

    eventually("the restarted manager deletes the instance", || {
        let response = manager.delete("/api/v1/instance/vault/team");
        if response.status == 200 { Ok(()) } else { Err(response.text) }
    });
    assert!(fetch(&page).is_err());
}

#[test]
fn survives_a_killed_manager_embedded() {
    survives_a_killed_manager(Backend::Embedded);
}

#[test]
fn survives_a_killed_manager_etcd() {
    survives_a_killed_manager(Backend::Etcd);
}

#[test]
fn exited_instance_is_restarted_at_once() {
    let world = World::bare(Backend::Embedded);
    // With this interval the reconciler does not run again during the test.
    let manager = world.manager_with("m1", &[("RECONCILE_EVERY", "1h".to_owned())]);
    manager.create_challenge("vault", &local("vault"), &json!({}));
    let before = manager.create_instance("vault", "team").ok();
    let page = address(before["connectionInfo"].as_str().unwrap()).to_owned();
    let program_pid = || {
        let directories = std::fs::read_dir(world.path("data/process/instances")).map_err(|error| error.to_string())?;
        let state = directories.flatten().find_map(|dir| std::fs::read(dir.path().join("state.json")).ok());
        let state: serde_json::Value = serde_json::from_slice(&state.ok_or("no state")?).map_err(|e| e.to_string())?;
        state["child"]["pid"].as_i64().map(|pid| pid as i32).ok_or_else(|| "no program is running".to_owned())
    };
    let killed = eventually("the pid of the program is recorded", program_pid);
    kill_process(Pid::from_raw(killed).unwrap(), Signal::KILL).unwrap();
    eventually("the program runs again", || match program_pid()? {
        pid if pid == killed => Err("still the killed process".to_owned()),
        _ => fetch(&page),
    });
    assert_eq!(manager.get("/api/v1/instance/vault/team").ok()["connectionInfo"], before["connectionInfo"]);
}

#[test]
fn restarted_manager_is_healthy_once_its_instances_run() {
    let world = World::bare(Backend::Embedded);
    let mut manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({ "min": "3", "max": "3" }));
    eventually("the pool is filled", || if world.instances() == 3 { Ok(()) } else { Err(String::new()) });
    manager.process.kill().unwrap();
    eventually("every process has exited", || {
        let running = processes::below(&world.path("data/process"));
        for process in running.iter().filter_map(|process| Pid::from_raw(*process)) {
            let _ = kill_process(process, Signal::KILL);
        }
        if running.is_empty() { Ok(()) } else { Err(format!("{running:?}")) }
    });
    manager.process.start().unwrap();
    let claimed = manager.create_instance("web", "a").ok();
    fetch(address(claimed["connectionInfo"].as_str().unwrap())).unwrap();
}

fn pools_and_updates(backend: Backend) {
    let world = World::bare(backend);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({ "min": "2", "max": "3", "timeout": "600s" }));
    let running = || world.instances();
    let wait_for_count = |count: usize| {
        eventually("the pool has its size", || {
            if running() == count { Ok(()) } else { Err(format!("{} of {count}", running())) }
        });
    };
    wait_for_count(2);
    assert_eq!(manager.get("/api/v1/instance").lines().len(), 0, "pooled instances are not listed");

    let claimed = manager.create_instance("web", "a").ok();
    fetch(address(claimed["connectionInfo"].as_str().unwrap())).unwrap();
    wait_for_count(3);
    manager.create_instance("web", "b").ok();
    // Two claimed instances and a pooled one reach max: the pool is not replenished.
    manager.create_instance("web", "c").ok();
    wait_for_count(3);

    let before = manager.get("/api/v1/instance/web/a").ok();
    let unchanged = manager.patch("/api/v1/challenge/web", &json!({})).ok();
    assert_eq!(unchanged["instances"].as_array().unwrap().len(), 3);
    let after = manager.get("/api/v1/instance/web/a").ok();
    assert_ne!(after["until"], before["until"], "every update recomputes until");
    assert_eq!(
        after["connectionInfo"], before["connectionInfo"],
        "an update without changes leaves the instance alone"
    );

    for (strategy, replaces) in [("update_in_place", false), ("blue_green", true), ("recreate", true)] {
        let before = manager.get("/api/v1/instance/web/a").ok();
        let update =
            json!({ "additional": { "motd": strategy }, "updateMask": "additional", "updateStrategy": strategy });
        manager.patch("/api/v1/challenge/web", &update).ok();
        let after = manager.get("/api/v1/instance/web/a").ok();
        fetch(address(after["connectionInfo"].as_str().unwrap())).unwrap();
        assert_eq!(after["flags"] != before["flags"], replaces, "{strategy}: only a new identity has new flags");
    }
    wait_for_count(3);
    manager.delete("/api/v1/challenge/web").ok();
    wait_for_count(0);
}

#[test]
fn pools_and_updates_embedded() {
    pools_and_updates(Backend::Embedded);
}

#[test]
fn pools_and_updates_etcd() {
    pools_and_updates(Backend::Etcd);
}

#[test]
fn failed_scenario_leaves_no_processes() {
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    manager.create_challenge("broken", &local("broken"), &json!({}));
    let response = manager.create_instance("broken", "a");
    assert_eq!((response.status, &response.json()["code"]), (500, &json!(13)), "{}", response.text);
    assert!(!response.text.contains("no good"), "the cause is logged, not shown to players: {}", response.text);
    assert_eq!(manager.get("/api/v1/instance/broken/a").status, 404);
    assert_eq!(world.instances(), 0);
    let log = std::fs::read_to_string(manager.process.log()).unwrap();
    assert!(log.contains("no good"), "the log has no cause:\n{log}");
}

#[test]
fn pulumi_scenario_is_refused_with_an_explanation() {
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    std::fs::create_dir_all(world.path("scenarios/pulumi")).unwrap();
    std::fs::write(world.path("scenarios/pulumi/Pulumi.yaml"), "name: x\nruntime: go\n").unwrap();
    let response = manager.post("/api/v1/challenge", &json!({ "id": "p", "scenario": local("pulumi") }));
    assert_eq!(response.status, 400, "{}", response.text);
    assert_eq!(response.json()["details"][0]["reason"], "SCENARIO_NON_MATCHING_SPECIFICATION");
    assert!(response.text.contains("Pulumi"), "{}", response.text);
}
