//! Random faults that are independent of any step.

use std::{sync::Arc, time::Duration};

use rand::RngExt as _;
use tokio::time::sleep;

use super::{Cluster, coverage::Event, world::World};

/// Expires leases, up to half a second late, as etcd does.
pub async fn etcd(world: Arc<World>) {
    loop {
        sleep(Duration::from_millis(500)).await;
        let now = world.now();
        let mut state = world.lock();
        for lease in state.etcd.expired_leases(now) {
            let gone = state.etcd.revoke(lease).len();
            state.log(now, "etcd", format_args!("lease {lease} expires with {gone} keys"));
            state.count(Event::LeaseExpired);
            if gone > 0 {
                state.count(Event::LeaseExpiredAtWork);
            }
        }
    }
}

/// Injects faults at random intervals until the fault phase ends, then ends partitions, pauses and outages.
pub async fn chaos(cluster: Arc<Cluster>) {
    let world = cluster.world.clone();
    while world.lock().faulty {
        sleep(Duration::from_millis(world.between(300, 6000))).await;
        let manager = cluster.any();
        let length = Duration::from_millis(world.between(300, 20_000));
        match world.between(0, 13) {
            0 | 1 => {
                manager.process.set_partitioned(true);
                let process = manager.process.clone();
                tokio::spawn(async move {
                    sleep(length).await;
                    process.set_partitioned(false);
                });
                world.lock().count(Event::Partition);
            }
            2 | 3 => manager.process.freeze(length + Duration::from_secs(5), "chaos"),
            4 => manager.process.kill("chaos"),
            5 | 6 => {
                let now = world.now();
                let mut state = world.lock();
                let leases = state.etcd.leases();
                if leases.is_empty() {
                    continue;
                }
                let lease = leases[state.rng.random_range(0..leases.len())];
                let gone = state.etcd.revoke(lease);
                state.observer.lost_early(&gone);
                let gone = gone.len();
                state.log(now, "etcd", format_args!("lease {lease} is lost with {gone} keys"));
                state.count(Event::LeaseLost);
                if gone > 0 {
                    state.count(Event::LeaseLostAtWork);
                }
            }
            7 => {
                let now = world.now();
                let mut state = world.lock();
                let watches = state.etcd.change_leader(now);
                state.log(now, "etcd", "the leader changes");
                state.count(Event::LeaderChange);
                state.coverage.event(Event::WatchBroken, watches);
            }
            8 => {
                let now = world.now();
                let mut state = world.lock();
                let watches = state.etcd.compact();
                state.log(now, "etcd", "is compacted");
                state.count(Event::Compaction);
                state.coverage.event(Event::WatchBroken, watches);
            }
            9 => {
                world.lock().etcd_down = true;
                world.log("etcd", format_args!("is down for {:?}", length / 3));
                let world = world.clone();
                tokio::spawn(async move {
                    sleep(length / 3).await;
                    world.lock().etcd_down = false;
                    world.log("etcd", "is up again");
                });
                cluster.world.lock().count(Event::Outage);
            }
            10 => {
                let manager = manager.clone();
                world.log(&manager.process.name, "shuts down");
                world.lock().count(Event::Restart);
                tokio::spawn(manager.process.clone().run_while_running(async move {
                    manager.store.shutdown().await;
                    manager.process.kill("shut down");
                }));
            }
            _ => {
                let now = world.now();
                let mut state = world.lock();
                let nth = state.rng.random();
                let Some(identity) = state.directories.exit(nth) else { continue };
                state.log(now, "machine", format_args!("{identity} exits by itself"));
                state.count(Event::Exited);
            }
        }
    }
    for manager in cluster.lives().iter() {
        manager.process.set_partitioned(false);
        manager.process.thaw();
    }
    world.lock().etcd_down = false;
}
