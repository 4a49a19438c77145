//! A collector that is away costs nobody anything but telemetry.

use serde_json::json;

use crate::harness::{Backend, World, eventually, local};

#[test]
fn calls_succeed_without_the_collector_and_spans_arrive_later() {
    let mut world = World::observed(Backend::Embedded);
    let mut manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));

    world.stack().collector.process.stop().unwrap();
    for source in ["a", "b", "c"] {
        manager.create_instance("web", source).ok();
    }
    let health = manager.get("/healthcheck");
    assert_eq!(health.status, 200, "telemetry is not health: {}", health.text);

    world.stack().collector.process.start().unwrap();
    eventually("spans arrive again", || {
        let call = manager.get("/api/v1/challenge/web");
        let trace = call.trace_parent.split('-').nth(1).unwrap().to_owned();
        eventually_there(&mut world, &trace)
    });

    world.stack().collector.process.kill().unwrap();
    manager.get("/api/v1/challenge/web").ok();
    let ended = manager.process.stop().unwrap().unwrap();
    assert!(ended.success(), "a shutdown without a collector is an ordinary one: {ended}");
}

/// One look at Jaeger a little later: the caller calls again when it is not there.
fn eventually_there(world: &mut World, trace: &str) -> Result<(), String> {
    std::thread::sleep(std::time::Duration::from_millis(900));
    let found = world.stack().jaeger.get(&format!("/api/traces/{trace}")).map_err(|error| error.to_string())?;
    if found["data"].as_array().is_some_and(|data| !data.is_empty()) {
        Ok(())
    } else {
        Err(format!("{trace} is not there"))
    }
}
