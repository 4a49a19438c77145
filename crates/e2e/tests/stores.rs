//! A data directory belongs to one store.

use std::path::Path;

use gauntlet_stack::{Etcd, Process, Ready, Spec, ports::Reserved};
use serde_json::json;

use crate::harness::{Backend, World, address, binary, eventually, fetch, local, rest};

/// Starts a manager on the given data directory and etcd. Waits only until it listens, not until it is healthy.
fn start_manager_on_etcd(
    world: &World,
    dir: &Path,
    etcd: &str,
    port: &Reserved,
    log: &Path,
) -> Result<Process, gauntlet_stack::Error> {
    let spec = [
        ("OTEL_SDK_DISABLED", "true".to_owned()),
        ("BIND", "127.0.0.1".to_owned()),
        ("PORT", port.number().to_string()),
        ("DEBUG_ADDRESS", "off".to_owned()),
        ("ETCD_ENDPOINTS", etcd.to_owned()),
        ("DIR", dir.display().to_string()),
        ("SCENARIO_ROOT", world.path("scenarios").display().to_string()),
    ]
    .into_iter()
    .fold(Spec::new("manager", binary("gauntlet-manager"), log, Ready::Tcp(port.number())), |spec, (name, value)| {
        spec.env(name, value)
    });
    Process::run(spec)
}

#[test]
fn directory_of_another_store_is_refused() {
    let world = World::bare(Backend::Embedded);
    let etcd = Etcd::start(world.path("etcd")).unwrap();
    let manager = world.manager("embedded");
    manager.create_challenge("web", &local("web"), &json!({}));
    let instance = manager.create_instance("web", "me").ok();
    let url = address(instance["connectionInfo"].as_str().unwrap()).to_owned();
    drop(manager);

    let log = world.path("refused.log");
    let refused = start_manager_on_etcd(&world, &world.path("data"), &etcd.url(), &Reserved::any().unwrap(), &log);
    assert!(refused.is_err(), "the manager started");
    let output = std::fs::read_to_string(log).unwrap();
    let directory = world.path("data/process").canonicalize().unwrap().display().to_string();
    for part in ["contains the instances of store", "but this is store", &directory, "use another directory"] {
        assert!(output.contains(part), "{part:?} is not in:\n{output}");
    }
    fetch(&url).expect("the instance keeps running");

    let manager = world.manager("embedded");
    assert_eq!(manager.get("/api/v1/instance/web/me").ok(), instance);
    manager.delete("/api/v1/instance/web/me").ok();
}

#[test]
fn manager_started_before_etcd_serves_once_etcd_is_up() {
    let world = World::bare(Backend::Embedded);
    // Makes the default data directory belong to the embedded store. The managers cannot compare the stores before etcd is up.
    drop(world.manager("embedded"));
    let (client, peer) = (Reserved::any().unwrap(), Reserved::any().unwrap());
    let url = format!("http://127.0.0.1:{}", client.number());
    let managers = ["new", "data"].map(|dir| {
        let port = Reserved::any().unwrap();
        let process =
            start_manager_on_etcd(&world, &world.path(dir), &url, &port, &world.path(&format!("{dir}.log"))).unwrap();
        (format!("http://127.0.0.1:{}", port.number()), process, port)
    });
    let [new, foreign] = managers.each_ref().map(|(url, ..)| url.as_str());
    let health = |url: &str| rest(url, "GET", "/healthcheck", None).unwrap();
    for url in [new, foreign] {
        assert!(health(url).text.contains("etcd does not answer"), "{}", health(url).text);
    }
    let _etcd = Etcd::start_on(world.path("etcd"), client.number(), peer.number()).unwrap();
    eventually("the manager on the new directory serves", || {
        if health(new).status == 200 { Ok(()) } else { Err(health(new).text) }
    });
    let challenge = json!({ "id": "web", "scenario": local("web") }).to_string();
    let created = rest(new, "POST", "/api/v1/challenge", Some(challenge.as_bytes())).unwrap();
    assert_eq!(created.status, 200, "{}", created.text);
    eventually("the health of the other manager names the directory", || {
        let health = health(foreign);
        if health.status == 503 && health.text.contains("its data directory") { Ok(()) } else { Err(health.text) }
    });
}
