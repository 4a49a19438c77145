//! A data directory and the store that it belongs to.

use gauntlet_stack::{Etcd, Process, Ready, Spec, ports::Reserved};
use serde_json::json;

use crate::harness::{Backend, World, address, binary, fetch, local};

/// What a manager says that is started on the world's directory and another store, and does not get ready.
fn refused(world: &World, etcd: &Etcd) -> String {
    let port = Reserved::any().unwrap();
    let (log, ready) = (world.path("refused.log"), Ready::Tcp(port.number()));
    let spec = [
        ("OTEL_SDK_DISABLED", "true".to_owned()),
        ("BIND", "127.0.0.1".to_owned()),
        ("PORT", port.number().to_string()),
        ("DEBUG_ADDRESS", "off".to_owned()),
        ("ETCD_ENDPOINTS", etcd.url()),
        ("DIR", world.path("data").display().to_string()),
    ]
    .into_iter()
    .fold(Spec::new("refused", binary("gauntlet-manager"), &log, ready), |spec, (name, value)| spec.env(name, value));
    assert!(Process::run(spec).is_err(), "it started");
    std::fs::read_to_string(log).unwrap()
}

#[test]
fn a_directory_of_another_store_is_refused() {
    let world = World::bare(Backend::Embedded);
    let etcd = Etcd::start(world.path("etcd")).unwrap();
    let manager = world.manager("embedded");
    manager.create_challenge("web", &local("web"), &json!({}));
    let instance = manager.create_instance("web", "me").ok();
    let url = address(instance["connectionInfo"].as_str().unwrap()).to_owned();
    drop(manager);

    let said = refused(&world, &etcd);
    let directory = world.path("data/process").canonicalize().unwrap().display().to_string();
    for part in ["holds the instances of store", "and this is store", &directory, "give another directory"] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    fetch(&url).expect("the instance was left alone");

    let manager = world.manager("embedded");
    assert_eq!(manager.get("/api/v1/instance/web/me").ok(), instance);
    manager.delete("/api/v1/instance/web/me").ok();
}
