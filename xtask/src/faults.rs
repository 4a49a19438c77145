//! `cargo xtask faults`: the storm of faults that CI has one round of, for as long as one likes.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tool, Tools, process::spawn_bound, workspace_root};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{consts::SIGHUP, consts::SIGINT, consts::SIGTERM, iterator::Signals};

use crate::console::say;
use crate::test::{cargo, run};
use crate::{binary, runner};

const STORM: &str = "faults::storm::nothing_acknowledged_is_lost_nothing_is_doubled_and_nothing_is_left_over";
/// What ends by itself once all it stood on is gone.
const TO_END: Duration = Duration::from_secs(10);

/// What `--help` says at its end.
pub(crate) const HELP: &str = "\
    Three managers and three etcd members run as real processes with clients beside them. After every few faults all that was \
    acknowledged is compared with what is stored, and what is stored with what runs. It stops at the first promise that is broken; \
    the report says what was injected, acknowledged, lost, doubled and left over.\n\n\
    Managers are killed (-9), and paused at work for longer than their lease: their fence must be seen to refuse what they come back \
    with. Members are killed, paused, and cut off from each other, from their clients or from both.\n\n\
    Partitions need network namespaces: root, with ip, unshare and nsenter. Where there are none, members are stopped instead, and \
    the report says which faults were left out.\n\n\
    Ctrl-C ends it after the round that is under way, with its report; twice, at once. Nothing is left either way.";

#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// How long, in minutes; it ends after the round that is under way then
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// What the choice of faults follows from; the seed of each run is printed at its start
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults, by the names that the report has, such as ManagerPaused,LeaderKilled
    #[arg(long, value_delimiter = ',', value_name = "FAULT,...")]
    only: Vec<String>,
}

impl Faults {
    pub(crate) fn run(self) -> Result<ExitCode> {
        Tools::from_env().ensure(&[Tool::Etcd, Tool::Etcdctl, Tool::Ip], &mut say)?;
        run(cargo().args(["build", "--workspace", "--bins"]))?;
        let mut here = cargo();
        here.current_dir(workspace_root());
        let Some(test) = binary::of_tests(here, "gauntlet-e2e", &["--test".to_owned(), "e2e".to_owned()])? else {
            bail!("the tests do not build: the errors are above");
        };
        runner::require(&test, STORM)?;
        let place = Place::make()?;
        let mut storm = Command::new(test);
        storm
            .args(["--exact", STORM, "--nocapture"])
            .current_dir(workspace_root().join("crates/e2e"))
            .env("TMPDIR", &place.0)
            .env("GAUNTLET_FAULTS_MINUTES", self.minutes.to_string())
            .env("GAUNTLET_FAULTS_ONLY", self.only.join(","))
            // What is broken is said in words.
            .env("RUST_BACKTRACE", "0");
        if let Some(seed) = self.seed {
            storm.env("GAUNTLET_FAULTS_SEED", seed.to_string());
        }
        // What Ctrl-C means to it is told below.
        storm.process_group(0);
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("listen for signals")?;
        let ended_well = wait(spawn_bound(storm).context("run the storm")?, &mut signals)?;
        Ok(if ended_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Waits for the storm, and asks it to end when asked to.
fn wait(mut storm: Child, signals: &mut Signals) -> Result<bool> {
    let pid = i32::try_from(storm.id()).ok().and_then(Pid::from_raw).context("the storm's process id is not one")?;
    let mut asked = false;
    loop {
        if let Some(status) = storm.try_wait().context("wait for the storm")? {
            return Ok(status.success());
        }
        for signal in signals.pending() {
            if asked || signal != SIGINT {
                say("ending it at once");
                storm.kill().context("end the storm")?;
            } else {
                asked = true;
                say("ending it after the round that is under way; Ctrl-C again ends it at once");
                // Fails only when it has just ended.
                let _ = kill_process(pid, Signal::INT);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The directory below which all is kept. Instances outlive their managers, and would outlive a storm that is killed: they end with this.
struct Place(PathBuf);

impl Place {
    fn make() -> Result<Place> {
        let dir = std::env::temp_dir().join(format!("gauntlet-faults-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Place(dir))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ends = Instant::now() + TO_END;
        loop {
            let left = processes_below(&self.0);
            if left.is_empty() || Instant::now() >= ends {
                break;
            }
            for process in left {
                // Fails only when it has just ended.
                let _ = kill_process(process, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(50));
        }
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say(&format!("{} could not be removed: {error}", self.0.display()));
        }
    }
}

/// The processes that run in a directory, or with what is below it as an argument.
fn processes_below(dir: &Path) -> Vec<Pid> {
    let below = |process: &Path| {
        let stands = fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        stands || String::from_utf8_lossy(&arguments).split('\0').any(|argument| Path::new(argument).starts_with(dir))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = entries.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)));
    processes.filter(|(_, path)| below(path)).filter_map(|(id, _): (i32, _)| Pid::from_raw(id)).collect()
}
