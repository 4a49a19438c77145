//! Sweeps of the janitor, and the trace of a sweep across janitor and manager.

use serde_json::{Value, json};

use crate::{
    harness::{Backend, World, eventually, local},
    traces::Trace,
};

fn sweep_deletes_expired_instances(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    manager.create_challenge("short", &local("web"), &json!({ "timeout": "1s" }));
    manager.create_challenge("long", &local("web"), &json!({ "timeout": "600s" }));
    manager.create_instance("short", "a").ok();
    manager.create_instance("long", "a").ok();

    eventually("the expired instance is deleted", || {
        let output = world.janitor(&manager.url);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        match manager.get("/api/v1/instance/short/a").status {
            404 => Ok(()),
            status => Err(format!("its status is {status}, not 404")),
        }
    });
    assert_eq!(manager.get("/api/v1/instance/long/a").status, 200, "an instance that has not expired is kept");

    let trace = eventually("the trace of the sweep is complete", || {
        let response = world
            .stack()
            .jaeger
            .get("/api/traces?service=gauntlet-janitor&operation=janitor.expire&limit=5&lookback=1h");
        let response: Value = response.map_err(|error| error.to_string())?;
        let trace = Trace::from_json(response["data"].get(0).ok_or("no trace yet")?);
        trace.find("gauntlet-manager", "gauntlet.v1.Sweeper/DeleteExpired").ok_or("no span of the manager yet")?;
        trace.find("gauntlet-manager", "provision.down").ok_or("no span of the provisioner yet")?;
        trace.find("gauntlet-janitor", "janitor.sweep").ok_or("no root span yet")?;
        trace.check_complete()?;
        Ok(trace)
    });
    trace.find("gauntlet-manager", "gauntlet.v1.Sweeper/ListExpired").expect("the sweep lists expired instances");
    trace.assert_documented();
    let down = trace.find("gauntlet-manager", "provision.down").unwrap();
    let path = trace.path(down);
    for step in ["janitor.sweep", "janitor.expire", "gauntlet.v1.Sweeper/DeleteExpired", "provision.down"] {
        assert!(path.iter().any(|name| name == step), "{step} is not an ancestor of provision.down: {path:?}");
    }
}

#[test]
fn sweep_deletes_expired_instances_embedded() {
    sweep_deletes_expired_instances(Backend::Embedded);
}

#[test]
fn sweep_deletes_expired_instances_etcd() {
    sweep_deletes_expired_instances(Backend::Etcd);
}

#[test]
fn janitor_without_a_server_fails_with_the_cause() {
    let world = World::bare(Backend::Embedded);
    let mut manager = world.manager("m1");
    manager.process.stop().unwrap();
    let output = world.janitor(&manager.url);
    assert!(!output.status.success());
}
