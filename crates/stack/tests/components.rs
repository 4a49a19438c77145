//! Starts, stops and restarts the real etcd and registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use gauntlet_stack::{Etcd, Registry, RegistryOptions, http};

fn healthy(etcd: &Etcd) -> bool {
    http::get_json(&format!("{}/health", etcd.url())).is_ok_and(|answer| answer["health"] == "true")
}

#[test]
fn killed_etcd_restarts_on_the_same_port() {
    let dir = tempfile::tempdir().unwrap();
    let mut etcd = Etcd::start(dir.path()).unwrap();
    assert!(healthy(&etcd));
    etcd.process.kill().unwrap();
    assert!(!healthy(&etcd));
    etcd.process.start().unwrap();
    assert!(healthy(&etcd));
}

#[test]
fn three_member_cluster_survives_the_loss_of_one_member() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = Etcd::cluster(dir.path(), 3).unwrap();
    assert!(members.iter().all(healthy));
    members[0].process.kill().unwrap();
    members[1].process.stop().unwrap();
    members[1].process.start().unwrap();
    assert!(!healthy(&members[0]) && healthy(&members[1]) && healthy(&members[2]));
}

#[test]
fn registry_requires_its_user_if_it_has_one() {
    let (open, closed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = Registry::start(open.path(), &RegistryOptions::default()).unwrap();
    let closed = Registry::start(closed.path(), &RegistryOptions::with_user()).unwrap();
    let base = |registry: &Registry| format!("http://{}/v2/", registry.address());
    assert_eq!(http::get_json(&base(&open)).unwrap(), serde_json::json!({}));
    let refused = http::get_json(&base(&closed)).unwrap_err().to_string();
    assert!(refused.contains("401"), "{refused}");
    let user = format!("{}:{}@", RegistryOptions::USER, RegistryOptions::PASSWORD);
    let with_user = base(&closed).replacen("http://", &format!("http://{user}"), 1);
    assert_eq!(http::get_json(&with_user).unwrap(), serde_json::json!({}));
}

#[test]
fn error_of_a_component_that_cannot_start_contains_its_log() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("data"), "not a directory").unwrap();
    let error = Etcd::start(dir.path()).unwrap_err().to_string();
    assert!(error.contains("etcd m0 exited while starting") && error.contains("etcd.log"), "{error}");
}
