//! The sweep, from the janitor's root span to the manager's.

use serde_json::{Value, json};

use crate::{
    harness::{Backend, World, eventually, local},
    traces::Trace,
};

fn sweeps(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    manager.create_challenge("short", &local("web"), &json!({ "timeout": "1s" }));
    manager.create_challenge("long", &local("web"), &json!({ "timeout": "600s" }));
    manager.create_instance("short", "a").ok();
    manager.create_instance("long", "a").ok();

    eventually("the expired instance is swept", || {
        let swept = world.janitor(&manager.url);
        assert!(swept.status.success(), "{}", String::from_utf8_lossy(&swept.stderr));
        match manager.get("/api/v1/instance/short/a").status {
            404 => Ok(()),
            status => Err(format!("still {status}")),
        }
    });
    assert_eq!(manager.get("/api/v1/instance/long/a").status, 200, "what has time left stays");

    let trace = eventually("the sweep's trace is whole", || {
        let found = world
            .stack()
            .jaeger
            .get("/api/traces?service=gauntlet-janitor&operation=janitor.expire&limit=5&lookback=1h");
        let found: Value = found.map_err(|error| error.to_string())?;
        let trace = Trace::of(found["data"].get(0).ok_or("no trace yet")?);
        trace.find("gauntlet-manager", "gauntlet.v1.Sweeper/DeleteExpired").ok_or("not at the manager yet")?;
        trace.find("gauntlet-manager", "provision.down").ok_or("not at the provisioner yet")?;
        trace.find("gauntlet-janitor", "janitor.sweep").ok_or("no root yet")?;
        trace.whole()?;
        Ok(trace)
    });
    trace.find("gauntlet-manager", "gauntlet.v1.Sweeper/ListExpired").expect("the sweep asks for what has expired");
    trace.in_the_table();
    let down = trace.find("gauntlet-manager", "provision.down").unwrap();
    let path = trace.path(down);
    for step in ["janitor.sweep", "janitor.expire", "gauntlet.v1.Sweeper/DeleteExpired", "provision.down"] {
        assert!(path.iter().any(|name| name == step), "{step} is not on the way to provision.down: {path:?}");
    }
}

#[test]
fn sweeps_embedded() {
    sweeps(Backend::Embedded);
}

#[test]
fn sweeps_etcd() {
    sweeps(Backend::Etcd);
}

#[test]
fn janitor_without_a_server_fails_with_the_cause() {
    let world = World::bare(Backend::Embedded);
    let mut manager = world.manager("m1");
    manager.process.stop().unwrap();
    let swept = world.janitor(&manager.url);
    assert!(!swept.status.success());
}
