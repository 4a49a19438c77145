//! `challenges` and `instances` say what is stored: after a restart, and with two managers.

use serde_json::json;

use crate::harness::{Backend, Manager, World, eventually, local};

/// Prometheus's value of an expression that yields one sample.
fn value(world: &mut World, expression: &str) -> Result<f64, String> {
    let samples = world.stack().prometheus.query(expression).map_err(|error| error.to_string())?;
    match samples.as_slice() {
        [] => Err(format!("{expression}: nothing")),
        [(_, value)] => Ok(*value),
        several => Err(format!("{expression}: {} series: {several:?}", several.len())),
    }
}

/// Waits until Prometheus says what the API says; `challenges` must be one series whoever reports it.
fn agrees(world: &mut World, manager: &Manager, when: &str) {
    eventually(when, || {
        let challenges = manager.get("/api/v1/challenge").lines().len();
        let claimed = manager.get("/api/v1/instance").lines().len();
        let seen = value(world, "challenges")?;
        let seen_claimed = value(world, "sum(instances{pool=\"false\"})")
            .or_else(|why| if claimed == 0 { Ok(0.0) } else { Err(why) })?;
        let states = value(world, "sum(instances{pool=\"false\",state!=\"ready\"}) or vector(0)")?;
        if (seen, seen_claimed, states) == (challenges as f64, claimed as f64, 0.0) {
            Ok(())
        } else {
            Err(format!("challenges {seen} of {challenges}, instances {seen_claimed} of {claimed}, not ready {states}"))
        }
    });
}

#[test]
fn gauges_equal_the_store_after_a_restart() {
    let mut world = World::observed(Backend::Embedded);
    let mut manager = world.manager("m1");
    for id in ["one", "two"] {
        manager.create_challenge(id, &local("web"), &json!({}));
    }
    for source in ["a", "b", "c"] {
        manager.create_instance("one", source).ok();
    }
    agrees(&mut world, &manager, "after creates");

    manager.process.kill().unwrap();
    manager.process.start().unwrap();
    agrees(&mut world, &manager, "after a crash and a restart");

    manager.delete("/api/v1/instance/one/a").ok();
    manager.delete("/api/v1/challenge/two").ok();
    agrees(&mut world, &manager, "after deletes");
    manager.delete("/api/v1/challenge/one").ok();
    agrees(&mut world, &manager, "when all is gone");
}

#[test]
fn gauges_of_two_managers_are_one_series() {
    let mut world = World::observed(Backend::Etcd);
    let (first, mut second) = (world.manager("m1"), world.manager("m2"));
    first.create_challenge("web", &local("web"), &json!({ "min": "1" }));
    for source in ["a", "b"] {
        second.create_instance("web", source).ok();
    }
    agrees(&mut world, &first, "with two managers");
    eventually("pooled ones are told apart", || {
        let pooled = value(&mut world, "sum(instances{pool=\"true\",state=\"ready\"})")?;
        if pooled == 1.0 { Ok(()) } else { Err(format!("{pooled} pooled")) }
    });
    second.process.kill().unwrap();
    first.delete("/api/v1/instance/web/a").ok();
    agrees(&mut world, &first, "after one of two managers was killed");
}
