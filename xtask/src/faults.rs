//! `cargo xtask faults`: the fault test of real processes, of which CI runs one round, for any time.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use gauntlet_stack::{Tool, Tools, process::spawn_bound};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{consts::SIGHUP, consts::SIGINT, consts::SIGTERM, iterator::Signals};

use crate::command::{cargo, run};
use crate::console::say;
use crate::test_binary;

const STORM: &str = "faults::storm::random_faults_lose_duplicate_and_leak_nothing";
/// How long to wait for killed processes to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The end of `--help`.
pub(crate) const HELP: &str = "\
    Runs three managers and three etcd members as real processes, with clients. After every few faults it compares the acknowledged \
    operations with the store, and the store with the running processes. It stops at the first violation and reports what was \
    injected, acknowledged, lost, duplicated and left over.\n\n\
    Managers are killed, or paused during an operation for longer than their lease; what a paused manager writes afterwards must be \
    rejected. Members are killed, paused, or partitioned from each other, from their clients, or from both.\n\n\
    Partitions need network namespaces: run as root, with ip, unshare and nsenter. Otherwise members are stopped instead, and the \
    report lists the faults that were left out.\n\n\
    Ctrl-C stops after the current round and prints the report; a second Ctrl-C stops at once. Neither leaves processes behind.";

#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// Minutes to run, plus the time to finish the last round
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Seed for the choice of faults; each run prints its seed
    #[arg(long)]
    seed: Option<u64>,
    /// Inject only these faults, named as in the report, such as ManagerPaused,LeaderKilled
    #[arg(long, value_delimiter = ',', value_name = "FAULT,...")]
    only: Vec<String>,
}

impl Faults {
    pub(crate) fn run(self) -> Result<ExitCode> {
        Tools::from_env().ensure(&[Tool::Etcd, Tool::Etcdctl, Tool::Ip], &mut say)?;
        run(cargo().args(["build", "--workspace", "--bins"]))?;
        let mut storm = test_binary::single_test("gauntlet-e2e", "e2e", STORM)?;
        let scratch = ScratchDir::create()?;
        storm
            .env("TMPDIR", &scratch.0)
            .env("GAUNTLET_FAULTS_MINUTES", self.minutes.to_string())
            .env("GAUNTLET_FAULTS_ONLY", self.only.join(","));
        if let Some(seed) = self.seed {
            storm.env("GAUNTLET_FAULTS_SEED", seed.to_string());
        }
        // In a process group of its own, so that Ctrl-C reaches only this process, which passes it on below.
        storm.process_group(0);
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("listen for signals")?;
        let has_passed = wait(spawn_bound(storm).context("run the fault test")?, &mut signals)?;
        Ok(if has_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Waits for the test and passes signals on: the first SIGINT stops it after its round, everything else kills it.
fn wait(mut storm: Child, signals: &mut Signals) -> Result<bool> {
    let pid =
        i32::try_from(storm.id()).ok().and_then(Pid::from_raw).context("the fault test has no valid process id")?;
    let mut is_stopping = false;
    loop {
        if let Some(status) = storm.try_wait().context("wait for the fault test")? {
            return Ok(status.success());
        }
        for signal in signals.pending() {
            if is_stopping || signal != SIGINT {
                say("stopping at once");
                storm.kill().context("kill the fault test")?;
            } else {
                is_stopping = true;
                say("stopping after the current round; press Ctrl-C again to stop at once");
                // Fails only if the test has just exited.
                let _ = kill_process(pid, Signal::INT);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The directory that contains everything the test writes. Instances outlive their managers, and would outlive a killed test; dropping this
/// kills them.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn create() -> Result<ScratchDir> {
        let dir = std::env::temp_dir().join(format!("gauntlet-faults-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(ScratchDir(dir))
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        loop {
            let left = processes_below(&self.0);
            if left.is_empty() || Instant::now() >= deadline {
                break;
            }
            for process in left {
                // Fails only if the process has just exited.
                let _ = kill_process(process, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(50));
        }
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say(&format!("cannot remove {}: {error}", self.0.display()));
        }
    }
}

/// The processes whose working directory or one of whose arguments is within `dir`.
fn processes_below(dir: &Path) -> Vec<Pid> {
    let is_below = |process: &Path| {
        let is_cwd = fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        is_cwd || String::from_utf8_lossy(&arguments).split('\0').any(|argument| Path::new(argument).starts_with(dir))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = entries.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)));
    processes.filter(|(_, path)| is_below(path)).filter_map(|(id, _): (i32, _)| Pid::from_raw(id)).collect()
}
