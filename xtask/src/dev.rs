//! `cargo xtask dev`

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, IsTerminal as _, Write as _, stderr, stdin};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use gauntlet_stack::{Etcd, Port, Ports, Progress, Tool, Tools, process::spawn_bound, tools, workspace_root};
use rustix::process::{Pid, Signal};

use crate::console::{Screen, Stop, say};
use crate::stack::{PortChoice, bring_up, running};
use crate::test::{cargo, run};

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Leave out collector, Jaeger, Prometheus and Alertmanager
    #[arg(long)]
    no_stack: bool,
    /// Install and build what the stack needs without asking
    #[arg(long, short)]
    yes: bool,
    /// Where state is kept
    #[arg(long, value_enum, default_value_t = Backend::Embedded)]
    backend: Backend,
    #[command(flatten)]
    choice: PortChoice,
    /// Handed to `gauntlet dev` as they are
    #[arg(last = true)]
    rest: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// In a file of this process
    Embedded,
    /// In a real etcd, started beside it
    Etcd,
}

impl Dev {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let root = workspace_root();
        let data = root.join(".data");
        fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
        let _held = hold(&data)?;
        let tools = Tools::from_env();
        // Before anything starts: the question is the only thing that waits for a person.
        let has_stack = !self.no_stack && self.may_add_stack(&tools)?;
        let stop = Stop::listen()?;
        let notices = Notices::create(data.join("notices.log"), stop.clone())?;
        let collector_ready = data.join("collector-ready");
        match fs::remove_file(&collector_ready) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", collector_ready.display()));
            }
            _ => {}
        }

        // The main job sends its last telemetry while it ends: the collector outlives it.
        let has_ended = Arc::new(AtomicBool::new(false));
        let beside = has_stack.then(|| {
            let (ports, mut notices, ready) = (self.choice.ports(), notices.clone(), collector_ready.clone());
            let has_ended = Arc::clone(&has_ended);
            thread::spawn(move || beside(ports, &mut notices, &ready, &has_ended))
        });
        let export_after = has_stack.then_some(collector_ready.as_path());
        let outcome = self.foreground(&tools, &notices, &stop, &data, export_after);
        // A build that is still going on is given up; a stack that is up is ended by who waits for this.
        stop.ask();
        has_ended.store(true, Ordering::Relaxed);
        if let Some(beside) = beside {
            say("ending the stack");
            if beside.join().is_err() {
                say("the thread that runs the stack has panicked");
            }
        }
        outcome
    }

    /// Says what the stack needs that is not there, and asks once on a terminal. Whether the stack is to come up.
    fn may_add_stack(&self, tools: &Tools) -> Result<bool> {
        if running()?.is_some() {
            return Ok(true);
        }
        let plan = tools.plan(tools::OBSERVABILITY);
        if plan.is_empty() {
            return Ok(true);
        }
        if !plan.obstacles.is_empty() {
            let missing = plan.obstacles.join("; ");
            say(&format!("collector, Jaeger, Prometheus and Alertmanager are left out; missing: {missing}"));
            return Ok(false);
        }
        say(
            "the stack beside it (collector, Jaeger, Prometheus, Alertmanager; --no-stack leaves it out) needs, in the background:",
        );
        for line in plan.lines() {
            say(&format!("  {line}"));
        }
        let is_wanted = self.yes || !stdin().is_terminal() || !stderr().is_terminal() || agreed()?;
        if !is_wanted {
            say("without the stack");
        }
        Ok(is_wanted)
    }

    /// Builds and runs the main job; the stack comes up meanwhile.
    fn foreground(
        &self,
        tools: &Tools,
        notices: &Notices,
        stop: &Stop,
        data: &Path,
        export_after: Option<&Path>,
    ) -> Result<ExitCode> {
        run(cargo().args(["build", "--bins"]))?;
        let root = workspace_root();
        let binaries =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from).join("debug");
        let mut gauntlet = Command::new(binaries.join("gauntlet"));
        gauntlet
            .arg("dev")
            .arg("--data")
            .arg(data)
            .arg("--scenarios")
            .arg(root.join("examples"))
            .arg("--programs")
            .arg(&binaries);
        let etcd = match self.backend {
            Backend::Embedded => None,
            Backend::Etcd => {
                tools.ensure(&[Tool::Etcd], &mut Screen(stop))?;
                let etcd = Etcd::start(data.join("etcd"))?;
                say(&format!("etcd ready: {}", etcd.url()));
                Some(etcd)
            }
        };
        match &etcd {
            Some(etcd) => gauntlet.args(["--backend", "etcd", "--etcd-endpoints", &etcd.url()]),
            None => gauntlet.args(["--backend", "embedded"]),
        };
        gauntlet.args(&self.rest);
        gauntlet.env("GAUNTLET_DEV_NOTICES", &notices.path);
        if let Some(ready) = export_after {
            let ports = running()?.unwrap_or_else(|| self.choice.ports());
            export_to(&mut gauntlet, ports.get(Port::OtlpGrpc), ready);
        }
        if stop.asked() {
            return Ok(ExitCode::SUCCESS);
        }
        notices.on_screen.store(false, Ordering::Relaxed);
        // In the group of the terminal: it reads keys, and Ctrl-C reaches it without our doing.
        let child = spawn_bound(gauntlet).context("run gauntlet dev")?;
        let status = wait(child, stop)?;
        notices.on_screen.store(true, Ordering::Relaxed);
        Ok(exit_code(status, stop))
    }
}

/// Asks whether to go on; Enter is yes.
fn agreed() -> Result<bool> {
    eprint!("> Go on? [Y/n] ");
    let mut answer = String::new();
    // A terminal that went away answers nothing at all.
    let length = stdin().read_line(&mut answer).context("read the answer")?;
    Ok(length > 0 && is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes")
}

/// Sends telemetry to our collector once the file is there. A collector of the user's own, named by the environment, is sent to at once.
fn export_to(gauntlet: &mut Command, port: u16, ready: &Path) {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if !is_set("OTEL_EXPORTER_OTLP_ENDPOINT") {
        gauntlet.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}"));
        gauntlet.env("GAUNTLET_DEV_EXPORT_AFTER", ready);
    }
    for (name, value) in [("OTEL_METRIC_EXPORT_INTERVAL", "5000"), ("OTEL_BSP_SCHEDULE_DELAY", "1000")] {
        if !is_set(name) {
            gauntlet.env(name, value);
        }
    }
}

/// Keeps a second `cargo xtask dev` from the data of the first, before either has built anything.
fn hold(data: &Path) -> Result<File> {
    let path = data.join("xtask.lock");
    let cannot = || format!("lock {}", path.display());
    let file = OpenOptions::new().create(true).append(true).open(&path).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("cargo xtask dev already runs on {}: end it with Ctrl-C in its terminal", data.display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
    }
}

/// Brings the stack up beside the main job and keeps it until the main job has ended. `ready` exists once the collector can be sent to.
fn beside(ports: Ports, notices: &mut Notices, ready: &Path, has_ended: &AtomicBool) {
    let stop = notices.stop.clone();
    let outcome = match bring_up(ports, notices) {
        Ok(Some(held)) => mark(ready).map(|()| held.keep(|| has_ended.load(Ordering::Relaxed), notices)),
        Ok(None) => use_running(&stop, notices, ready),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if !stop.asked() => notices.report(&format!("the stack is not up: {error:#}")),
        _ => {}
    }
}

/// Waits until the stack that another command runs is up.
fn use_running(stop: &Stop, notices: &mut Notices, ready: &Path) -> Result<()> {
    notices.report("the stack runs already (cargo xtask stack status): using that");
    while !stop.asked() {
        if running()?.is_some() {
            return mark(ready);
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn mark(ready: &Path) -> Result<()> {
    fs::write(ready, "").with_context(|| format!("write {}", ready.display()))
}

/// Waits for the main job. Ctrl-C in a terminal has reached it too; what it can't know of, or does not follow, it is told.
fn wait(mut child: Child, stop: &Stop) -> Result<ExitStatus> {
    const TO_ITSELF: Duration = Duration::from_secs(5);
    const TO_END: Duration = Duration::from_secs(20);
    let pid =
        i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the process id of gauntlet dev is not one")?;
    let mut asked_at = None;
    let mut told = false;
    loop {
        if let Some(status) = child.try_wait().context("wait for gauntlet dev")? {
            return Ok(status);
        }
        if stop.asked() {
            let since = asked_at.get_or_insert_with(Instant::now).elapsed();
            if !told && (stop.terminated() || since > TO_ITSELF) {
                told = true;
                // Fails only when it has just ended.
                let _ = rustix::process::kill_process(pid, Signal::TERM);
            }
            if since > TO_ITSELF + TO_END {
                say("gauntlet dev does not end: killing it");
                child.kill().context("kill gauntlet dev")?;
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn exit_code(status: ExitStatus, stop: &Stop) -> ExitCode {
    match status.code() {
        Some(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        // Ended by the very signal that asked for it.
        None if stop.asked() && status.signal().is_some() => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

/// What goes on beside the main job: on the screen, or appended to a file that `gauntlet dev` shows while it owns the screen.
#[derive(Clone)]
struct Notices {
    path: PathBuf,
    file: Arc<Mutex<File>>,
    on_screen: Arc<AtomicBool>,
    stop: Stop,
}

impl Notices {
    fn create(path: PathBuf, stop: Stop) -> Result<Notices> {
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Notices { path, file: Arc::new(Mutex::new(file)), on_screen: Arc::new(AtomicBool::new(true)), stop })
    }
}

impl Progress for Notices {
    fn report(&mut self, line: &str) {
        if self.on_screen.load(Ordering::Relaxed) {
            say(line);
        } else if let Ok(mut file) = self.file.lock() {
            // One line a write; a full disk must not end the stack.
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.asked()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn enter_agrees_and_other_words_do_not() {
        assert!(["\n", "y\n", "Yes\n"].into_iter().all(is_yes));
        assert!(!["n\n", "no\n", "what\n"].into_iter().any(is_yes));
    }

    #[test]
    fn our_collector_is_not_sent_to_before_it_is_ready() {
        let mut gauntlet = Command::new("gauntlet");
        export_to(&mut gauntlet, 4317, Path::new("/data/collector-ready"));
        let set = |wanted: &str| gauntlet.get_envs().find(|(name, _)| *name == wanted).and_then(|(_, value)| value);
        // The environment of the tests may name a collector.
        if std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT").is_none() {
            assert_eq!(set("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap(), "http://127.0.0.1:4317");
            assert_eq!(set("GAUNTLET_DEV_EXPORT_AFTER").unwrap(), "/data/collector-ready");
        }
    }
}
