//! What an operation reads does not grow with what else runs: the one test of a process of its own, for it counts what that process, and
//! the supervisors that it waited for, have read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
#![allow(dead_code, reason = "what the other tests share with this one")]

#[path = "provision/support.rs"]
mod support;

use std::process::{Child, Command, Stdio};

use gauntlet_domain::{Identity, Provisioner as _};

use crate::support::{LaunchExt as _, Rig, challenge, launch};

/// How many other processes, beside those that run anyway.
const OTHERS: u64 = 400;

/// Reads of this process, its threads, and the children that it has waited for.
fn reads() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap().parse().unwrap()
}

async fn reads_of_a_life(rig: &Rig, generation: u64) -> u64 {
    let (manager, plan) = (rig.manager(), rig.greeter());
    let before = reads();
    manager.launch(&launch(1, generation, &plan)).await.unwrap();
    manager.launch(&launch(1, generation, &plan)).await.unwrap();
    manager.relaunch(&launch(1, generation, &rig.greeter().greeting("other"))).await.unwrap();
    assert_eq!(manager.list().await.unwrap().len(), 1);
    manager.halt().await.unwrap();
    manager.launch(&launch(1, generation, &plan)).await.unwrap();
    manager.down(&challenge("a challenge"), &Identity::from_bits(1), generation).await.unwrap();
    reads() - before
}

struct Others(Vec<Child>);

impl Drop for Others {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test]
async fn what_an_operation_reads_does_not_grow_with_other_processes() {
    for rig in Rig::each() {
        let alone = reads_of_a_life(&rig, 1).await;
        let mut other = Command::new("sleep");
        other.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let others = Others((0..OTHERS).map(|_| other.spawn().unwrap()).collect());
        let beside = reads_of_a_life(&rig, 2).await;
        drop(others);
        // How often readiness is asked for differs from run to run. One search of all processes would read each of the others.
        assert!(beside < alone + OTHERS, "{beside} reads beside {OTHERS} other processes, {alone} alone");
    }
}
