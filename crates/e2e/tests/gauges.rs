//! The gauges `challenges` and `instances` equal the store: after a restart, and with two managers.

use serde_json::json;

use crate::harness::{Backend, Manager, World, eventually, local};

/// Queries Prometheus with an expression that yields one sample.
fn value(world: &mut World, expression: &str) -> Result<f64, String> {
    let samples = world.stack().prometheus.query(expression).map_err(|error| error.to_string())?;
    match samples.as_slice() {
        [] => Err(format!("{expression}: no sample")),
        [(_, value)] => Ok(*value),
        several => Err(format!("{expression}: {} series: {several:?}", several.len())),
    }
}

/// Waits until the gauges equal what the API lists. `challenges` must be one series, whichever manager exports it.
fn wait_for_equal_gauges(world: &mut World, manager: &Manager, when: &str) {
    eventually(when, || {
        let challenges = manager.get("/api/v1/challenge").lines().len();
        let claimed = manager.get("/api/v1/instance").lines().len();
        let gauge = value(world, "challenges")?;
        let claimed_gauge = value(world, "sum(instances{pool=\"false\"})")
            .or_else(|error| if claimed == 0 { Ok(0.0) } else { Err(error) })?;
        let not_ready = value(world, "sum(instances{pool=\"false\",state!=\"ready\"}) or vector(0)")?;
        if (gauge, claimed_gauge, not_ready) == (challenges as f64, claimed as f64, 0.0) {
            Ok(())
        } else {
            Err(format!(
                "challenges {gauge} of {challenges}, instances {claimed_gauge} of {claimed}, not ready {not_ready}"
            ))
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
    wait_for_equal_gauges(&mut world, &manager, "after creates");

    manager.process.kill().unwrap();
    manager.process.start().unwrap();
    wait_for_equal_gauges(&mut world, &manager, "after a crash and a restart");

    manager.delete("/api/v1/instance/one/a").ok();
    manager.delete("/api/v1/challenge/two").ok();
    wait_for_equal_gauges(&mut world, &manager, "after deletes");
    manager.delete("/api/v1/challenge/one").ok();
    wait_for_equal_gauges(&mut world, &manager, "after everything is deleted");
}

#[test]
fn gauges_of_two_managers_are_one_series() {
    let mut world = World::observed(Backend::Etcd);
    let (first, mut second) = (world.manager("m1"), world.manager("m2"));
    first.create_challenge("web", &local("web"), &json!({ "min": "1" }));
    for source in ["a", "b"] {
        second.create_instance("web", source).ok();
    }
    wait_for_equal_gauges(&mut world, &first, "with two managers");
    eventually("the pooled instance is counted separately", || {
        let pooled = value(&mut world, "sum(instances{pool=\"true\",state=\"ready\"})")?;
        if pooled == 1.0 { Ok(()) } else { Err(format!("{pooled} pooled instances, not 1")) }
    });
    second.process.kill().unwrap();
    first.delete("/api/v1/instance/web/a").ok();
    wait_for_equal_gauges(&mut world, &first, "after one of two managers was killed");
}
