//! What other processes can see of the manager.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::{
        fs::{MetadataExt as _, chown},
        process::CommandExt as _,
    },
    process::{Command, Stdio},
};

const NOBODY: u32 = 65534;

#[test]
fn environment_and_memory_are_hidden_from_processes_of_the_same_user() {
    let dir = tempfile::tempdir().unwrap();
    // The copy can be executed by any user, wherever the checkout is.
    let binary = dir.path().join("gauntlet-manager");
    fs::copy(env!("CARGO_BIN_EXE_gauntlet-manager"), &binary).unwrap();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    let mut command = Command::new(&binary);
    if rustix::process::geteuid().is_root() {
        // Files in /proc of a process of root belong to root in any case.
        for path in [dir.path(), &data] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut manager = command
        .args(["--bind", "127.0.0.1", "--port", "0", "--debug-address", "off", "--dir"])
        .arg(&data)
        .env("OTEL_SDK_DISABLED", "true")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log: Vec<String> = BufReader::new(manager.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.contains("listening"))
        .collect();
    // The kernel gives files of processes that can't be dumped to root.
    let owner = |file: &str| fs::metadata(format!("/proc/{}/{file}", manager.id())).map(|meta| meta.uid()).ok();
    let owners = [owner("environ"), owner("mem")];
    manager.kill().unwrap();
    manager.wait().unwrap();
    assert_eq!(owners, [Some(0), Some(0)], "{log:?}");
}
