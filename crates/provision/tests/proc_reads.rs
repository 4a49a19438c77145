//! The number of reads of an operation doesn't grow with the number of other processes. The test is a separate binary, because it counts the
//! read syscalls of the whole process and of the supervisors it has reaped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
#![allow(dead_code, reason = "parts that only other tests use")]

#[path = "provision/support.rs"]
mod support;

use std::process::{Child, Command, Stdio};

use gauntlet_domain::{Identity, Provisioner as _};

use crate::support::{Fixture, LaunchExt as _, challenge, launch};

/// The number of unrelated processes to start.
const OTHERS: u64 = 400;

/// Returns the number of read syscalls made by this process and by the children it has reaped.
fn reads() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap().parse().unwrap()
}

async fn reads_of_a_lifecycle(fixture: &Fixture, generation: u64) -> u64 {
    let (manager, plan) = (fixture.manager(), fixture.greeter());
    let before = reads();
    manager.launch(&launch(1, generation, &plan)).await.unwrap();
    manager.launch(&launch(1, generation, &plan)).await.unwrap();
    manager.relaunch(&launch(1, generation, &fixture.greeter().greeting("other"))).await.unwrap();
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
async fn reads_of_an_operation_do_not_grow_with_other_processes() {
    for fixture in Fixture::with_and_without_cgroups() {
        let alone = reads_of_a_lifecycle(&fixture, 1).await;
        let mut other = Command::new("sleep");
        other.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let others = Others((0..OTHERS).map(|_| other.spawn().unwrap()).collect());
        let beside = reads_of_a_lifecycle(&fixture, 2).await;
        drop(others);
        // The number of probes varies between runs. A scan of `/proc` would add at least one read for each of the other processes.
        assert!(beside < alone + OTHERS, "{beside} reads with {OTHERS} other processes, {alone} without");
    }
}
