//! The embedded store survives SIGKILL of its manager at random moments.

use std::{sync::atomic::AtomicBool, time::Duration};

use gauntlet_testing::processes::KillInstances;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::{Value, json};

use super::{
    census,
    load::{Client, Driver, Ledger},
    scenario::{quick_scenario, write_scenarios},
};
use crate::harness::{Backend, POLL, World};

const CYCLES: usize = 20;

#[test]
fn sigkill_loses_no_acknowledged_write() {
    let world = World::bare(Backend::Embedded);
    write_scenarios(&world);
    let dir = world.path("data/process/instances");
    let mut manager = world.manager("m1");
    let _instances = KillInstances(dir.clone());
    manager.create_challenge("plain", &quick_scenario(), &json!({ "timeout": "600s" }));
    manager.create_challenge("pooled", &quick_scenario(), &json!({ "timeout": "600s", "min": "2", "max": "20" }));
    let seed: u32 = rand::random();
    let mut rng = SmallRng::seed_from_u64(seed.into());
    let urls = [manager.url.clone()];
    let mut drivers = [0, 1, 2].map(|at| Driver::new(&format!("driver-{at}"), &urls, u64::from(seed) + at));
    let ledger = Ledger::default();
    for _ in 0..CYCLES {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for driver in &mut drivers {
                scope.spawn(|| driver.drive(&ledger, &stop));
            }
            // The kill comes during a call or between calls.
            std::thread::sleep(Duration::from_millis(rng.random_range(20..400)));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            manager.process.kill().unwrap();
        });
        manager.process.start().unwrap();
        drivers.iter().for_each(|driver| driver.verify(&ledger, &urls));
    }
    let mut client = Client::new(&urls, 0);
    for id in ["plain", "pooled"] {
        let (status, body) =
            client.call_until_available("DELETE", &format!("/api/v1/challenge/{id}"), &Value::Null).unwrap();
        assert!(matches!(status, 200 | 404), "{status} {body}");
    }
    POLL.try_until_blocking(|| census::take_census(&dir, &[])).unwrap();
    println!("{CYCLES} kills, {ledger}");
    ledger.assert_no_violations();
}
