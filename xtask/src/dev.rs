//! `cargo xtask dev`: manager, janitor and example challenges in the foreground, the observability stack beside them.

use std::fs::{self, File};
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

use crate::command::{cargo, run};
use crate::console::{Screen, Stop, say};
use crate::lock::try_lock;
use crate::stack::{PortChoice, bring_up, running};

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Do not start collector, Jaeger, Prometheus and Alertmanager
    #[arg(long)]
    no_stack: bool,
    /// Install and build what the stack needs without asking
    #[arg(long, short)]
    yes: bool,
    /// Where state is stored
    #[arg(long, value_enum, default_value_t = Backend::Embedded)]
    backend: Backend,
    #[command(flatten)]
    choice: PortChoice,
    /// Arguments for `gauntlet dev`
    #[arg(last = true)]
    rest: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// In a file
    Embedded,
    /// In an etcd that this command starts
    Etcd,
}

impl Dev {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let root = workspace_root();
        let data = root.join(".data");
        fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
        let _lock = lock(&data)?;
        let tools = Tools::from_env();
        // Before anything starts, because this may ask the user.
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

        // The collector outlives `gauntlet dev`, which exports its last telemetry while it shuts down.
        let has_ended = Arc::new(AtomicBool::new(false));
        let stack = has_stack.then(|| {
            let (ports, mut notices, ready) = (self.choice.ports(), notices.clone(), collector_ready.clone());
            let has_ended = Arc::clone(&has_ended);
            thread::spawn(move || run_stack(ports, &mut notices, &ready, &has_ended))
        });
        let export_after = has_stack.then_some(collector_ready.as_path());
        let outcome = self.foreground(&tools, &notices, &stop, &data, export_after);
        // Cancels a stack that is still being built. One that is running is stopped by its thread.
        stop.request();
        has_ended.store(true, Ordering::Relaxed);
        if let Some(stack) = stack {
            say("stopping the stack");
            if stack.join().is_err() {
                say("the thread that runs the stack panicked");
            }
        }
        outcome
    }

    /// Returns whether to start the stack. If something must be installed or built for it, prints that and asks, if there is a terminal.
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
            say(&format!("starting without collector, Jaeger, Prometheus and Alertmanager; missing: {missing}"));
            return Ok(false);
        }
        say(
            "the observability stack (collector, Jaeger, Prometheus, Alertmanager) needs, in the background (--no-stack skips it):",
        );
        for line in plan.lines() {
            say(&format!("  {line}"));
        }
        let is_wanted = self.yes || !stdin().is_terminal() || !stderr().is_terminal() || confirm()?;
        if !is_wanted {
            say("continuing without the stack");
        }
        Ok(is_wanted)
    }

    /// Builds and runs `gauntlet dev`, while the stack starts.
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
                say(&format!("etcd is ready at {}", etcd.url()));
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
        if stop.is_requested() {
            return Ok(ExitCode::SUCCESS);
        }
        notices.on_screen.store(false, Ordering::Relaxed);
        // It stays in the terminal's process group, because it reads keys. The terminal sends it Ctrl-C directly.
        let child = spawn_bound(gauntlet).context("run gauntlet dev")?;
        let status = wait(child, stop)?;
        notices.on_screen.store(true, Ordering::Relaxed);
        Ok(exit_code(status, stop))
    }
}

/// Asks whether to continue. Enter means yes.
fn confirm() -> Result<bool> {
    eprint!("> Continue? [Y/n] ");
    let mut answer = String::new();
    // A closed terminal reads as an empty answer without a newline.
    let length = stdin().read_line(&mut answer).context("read the answer")?;
    Ok(length > 0 && is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes")
}

/// Exports telemetry to the stack's collector once the file `ready` exists. A collector set in the environment is used instead, at once.
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

/// Locks the data directory, before anything is built.
fn lock(data: &Path) -> Result<File> {
    let Some(lock) = try_lock(&data.join("xtask.lock"))? else {
        bail!("cargo xtask dev is already running on {}; stop it with Ctrl-C in its terminal", data.display())
    };
    Ok(lock)
}

/// Starts the stack, and runs it until `gauntlet dev` has ended. Creates the file `ready` once the collector accepts telemetry.
fn run_stack(ports: Ports, notices: &mut Notices, ready: &Path, has_ended: &AtomicBool) {
    let stop = notices.stop.clone();
    let outcome = match bring_up(ports, notices) {
        Ok(Some(running)) => {
            create_marker(ready).map(|()| running.watch(|| has_ended.load(Ordering::Relaxed), notices))
        }
        Ok(None) => wait_for_running_stack(&stop, notices, ready),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if !stop.is_requested() => notices.report(&format!("the stack did not start: {error:#}")),
        _ => {}
    }
}

/// Waits until the stack of another command is ready.
fn wait_for_running_stack(stop: &Stop, notices: &mut Notices, ready: &Path) -> Result<()> {
    notices.report("using the stack that is already running (cargo xtask stack status)");
    while !stop.is_requested() {
        if running()?.is_some() {
            return create_marker(ready);
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn create_marker(ready: &Path) -> Result<()> {
    fs::write(ready, "").with_context(|| format!("write {}", ready.display()))
}

/// Waits for `gauntlet dev`. After a request to stop it gets SIGTERM, unless the terminal has sent it Ctrl-C and it exits by itself.
fn wait(mut child: Child, stop: &Stop) -> Result<ExitStatus> {
    const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(5);
    const TERMINATE_TIMEOUT: Duration = Duration::from_secs(20);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("gauntlet dev has no valid process id")?;
    let mut requested_at = None;
    let mut is_terminated = false;
    loop {
        if let Some(status) = child.try_wait().context("wait for gauntlet dev")? {
            return Ok(status);
        }
        if stop.is_requested() {
            let since = requested_at.get_or_insert_with(Instant::now).elapsed();
            if !is_terminated && (stop.is_terminated() || since > INTERRUPT_TIMEOUT) {
                is_terminated = true;
                // Fails only if it has just exited.
                let _ = rustix::process::kill_process(pid, Signal::TERM);
            }
            if since > INTERRUPT_TIMEOUT + TERMINATE_TIMEOUT {
                say("gauntlet dev does not stop: killing it");
                child.kill().context("kill gauntlet dev")?;
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn exit_code(status: ExitStatus, stop: &Stop) -> ExitCode {
    match status.code() {
        Some(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        // Terminated by the signal that requested the stop.
        None if stop.is_requested() && status.signal().is_some() => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

/// Progress of the stack: printed, or appended to a file that `gauntlet dev` shows while it owns the terminal.
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
            // One write for each line. Errors are ignored: a full disk must not stop the stack.
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.is_requested()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn enter_and_yes_confirm_and_other_answers_do_not() {
        assert!(["\n", "y\n", "Yes\n"].into_iter().all(is_yes));
        assert!(!["n\n", "no\n", "what\n"].into_iter().any(is_yes));
    }

    #[test]
    fn export_waits_until_the_collector_is_ready() {
        let mut gauntlet = Command::new("gauntlet");
        export_to(&mut gauntlet, 4317, Path::new("/data/collector-ready"));
        let set = |wanted: &str| gauntlet.get_envs().find(|(name, _)| *name == wanted).and_then(|(_, value)| value);
        // The environment of this test may set a collector.
        if std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT").is_none() {
            assert_eq!(set("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap(), "http://127.0.0.1:4317");
            assert_eq!(set("GAUNTLET_DEV_EXPORT_AFTER").unwrap(), "/data/collector-ready");
        }
    }
}
