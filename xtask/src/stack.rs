//! `cargo xtask stack up | down | status`, and the stack beside `cargo xtask dev`.
//!
//! One process owns the four components, which stop with it. It holds a lock while it runs; a file beside the lock contains its id and ports.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{self, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use gauntlet_stack::{Options, Port, Ports, Progress, Stack, Tools, observability, tools, workspace_root};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::console::{Screen, Stop, say};
use crate::lock;

const POLL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Install and build what is missing, then start the stack; it runs until `cargo xtask stack down`
    Up(Up),
    /// Stop the stack
    Down,
    /// Show whether the stack is ready, its ports, and where its data and logs are
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Run in the foreground until Ctrl-C
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    choice: PortChoice,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PortChoice {
    /// Use another port than the documented one, such as prometheus=9190; may be repeated
    #[arg(long = "port", value_name = "NAME=NUMBER", value_parser = parse_port)]
    ports: Vec<(Port, u16)>,
}

impl PortChoice {
    pub(crate) fn ports(&self) -> Ports {
        let mut ports = Ports::documented();
        for (port, number) in &self.ports {
            ports.set(*port, *number);
        }
        ports
    }
}

impl Command {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Command::Up(up) if up.foreground => up.foreground(),
            Command::Up(up) => up.background(),
            Command::Down => down(),
            Command::Status => status(),
        }
    }
}

fn parse_port(text: &str) -> Result<(Port, u16), String> {
    let names = || Port::ALL.map(Port::name).join(", ");
    let (name, number) = text.split_once('=').ok_or("write NAME=NUMBER, such as prometheus=9190")?;
    let port = Port::named(name).ok_or_else(|| format!("unknown port {name:?}; the ports are {}", names()))?;
    match number.parse() {
        Ok(0) | Err(_) => Err(format!("{number:?} is not a port number; choose 1 to 65535")),
        Ok(number) => Ok((port, number)),
    }
}

fn stack_dir() -> PathBuf {
    workspace_root().join(".cache/stack")
}

/// The running stack and its lock.
pub(crate) struct RunningStack {
    stack: Stack,
    _lock: File,
}

impl RunningStack {
    /// Runs the stack until `is_over`, and reports components that exit before.
    pub(crate) fn watch(mut self, is_over: impl Fn() -> bool, progress: &mut dyn Progress) {
        let mut exited = Vec::new();
        while !is_over() {
            for (name, process) in self.stack.processes() {
                if !process.is_running() && !exited.contains(&name) {
                    progress.report(&format!("{name} has exited; its log is {}", process.log().display()));
                    exited.push(name);
                }
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Installs and builds what is missing, then starts the stack. Returns `None` if another process runs it already.
pub(crate) fn bring_up(ports: Ports, progress: &mut dyn Progress) -> Result<Option<RunningStack>> {
    let Some(lock) = lock_with_retries()? else { return Ok(None) };
    Tools::from_env().ensure(tools::OBSERVABILITY, progress)?;
    let stack = Stack::start(Options { ports, ..Options::deployed(stack_dir()) }, progress)?;
    let ports: Value = Port::ALL.iter().map(|port| (port.name().to_owned(), json!(stack.port(*port)))).collect();
    fs::write(state_path(), json!({"pid": process::id(), "ports": ports}).to_string())
        .context("write the stack's state file")?;
    Ok(Some(RunningStack { stack, _lock: lock }))
}

impl Drop for RunningStack {
    fn drop(&mut self) {
        // A file that stays behind is harmless: it is only read while the lock is held.
        let _ = fs::remove_file(state_path());
    }
}

fn state_path() -> PathBuf {
    stack_dir().join("state.json")
}

/// Takes the lock, even if a command that only checks for the stack holds it at this moment.
fn lock_with_retries() -> Result<Option<File>> {
    for _ in 0..5 {
        if let Some(lock) = try_lock()? {
            return Ok(Some(lock));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(None)
}

/// Takes the lock. Returns `None` while another process runs the stack.
fn try_lock() -> Result<Option<File>> {
    let dir = stack_dir();
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    lock::try_lock(&dir.join("lock"))
}

/// The ports of the running stack, whichever process runs it.
pub(crate) fn running() -> Result<Option<Ports>> {
    Ok(if try_lock()?.is_none() { state().map(|(_, ports)| ports) } else { None })
}

/// The process that runs the stack and the ports, once the stack is ready.
fn state() -> Option<(Pid, Ports)> {
    let state: Value = serde_json::from_str(&fs::read_to_string(state_path()).ok()?).ok()?;
    let pid = Pid::from_raw(i32::try_from(state.get("pid")?.as_i64()?).ok()?)?;
    let mut ports = Ports::documented();
    for port in Port::ALL {
        let number = state.get("ports")?.get(port.name())?.as_u64()?;
        ports.set(port, u16::try_from(number).ok()?);
    }
    Some((pid, ports))
}

impl Up {
    fn foreground(self) -> Result<ExitCode> {
        let stop = Stop::listen()?;
        let mut screen = Screen(&stop);
        let Some(running) = bring_up(self.choice.ports(), &mut screen)? else {
            bail!("the stack is already running; see cargo xtask stack status")
        };
        running.watch(|| stop.is_requested(), &mut screen);
        Ok(ExitCode::SUCCESS)
    }

    fn background(self) -> Result<ExitCode> {
        if try_lock()?.is_none() {
            say("the stack is already running");
            return status();
        }
        // Built here, where the user sees the progress. The background process then finds everything built.
        let stop = Stop::listen()?;
        Tools::from_env().ensure(tools::OBSERVABILITY, &mut Screen(&stop))?;
        let log_path = stack_dir().join("up.log");
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let errors = log.try_clone().context("open the log a second time")?;
        let mut daemon = process::Command::new(std::env::current_exe().context("find this binary")?);
        daemon.args(["stack", "up", "--foreground"]);
        for (port, number) in &self.choice.ports {
            daemon.arg("--port").arg(format!("{}={number}", port.name()));
        }
        // In a process group of its own, so that it outlives this command and does not get its Ctrl-C.
        let mut daemon = daemon
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .context("start the stack")?;
        loop {
            if let Some(status) = daemon.try_wait().context("wait for the stack")? {
                bail!("the stack did not start ({status}):\n{}", fs::read_to_string(&log_path).unwrap_or_default());
            }
            if let Some((_, ports)) = state() {
                eprint!("{}", fs::read_to_string(&log_path).unwrap_or_default());
                say(&format!(
                    "to send telemetry to it: export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{} OTEL_METRIC_EXPORT_INTERVAL=10000",
                    ports.get(Port::OtlpGrpc)
                ));
                say("stop it with: cargo xtask stack down");
                return Ok(ExitCode::SUCCESS);
            }
            if stop.is_requested() {
                terminate(i32::try_from(daemon.id()).ok().and_then(Pid::from_raw))?;
                bail!("stopped on request");
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

fn down() -> Result<ExitCode> {
    if try_lock()?.is_some() {
        say("the stack is not running");
        return Ok(ExitCode::SUCCESS);
    }
    let Some((pid, _)) = state() else { bail!("the stack is starting or stopping; try again in a moment") };
    terminate(Some(pid))?;
    say(&format!("the stack has stopped; its data and logs are kept in {}", stack_dir().display()));
    Ok(ExitCode::SUCCESS)
}

/// Terminates the process that runs the stack and waits for its exit. It gives each component 10 s.
fn terminate(pid: Option<Pid>) -> Result<()> {
    let pid = pid.context("the stack has no valid process id")?;
    rustix::process::kill_process(pid, Signal::TERM).context("terminate the stack")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while try_lock()?.is_none() {
        if Instant::now() > deadline {
            rustix::process::kill_process(pid, Signal::KILL).context("kill the stack")?;
            bail!("the stack did not stop within a minute and was killed");
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn status() -> Result<ExitCode> {
    if try_lock()?.is_some() {
        say("the stack is not running; start it with cargo xtask stack up");
        return Ok(ExitCode::FAILURE);
    }
    let Some((pid, ports)) = state() else {
        say("the stack is starting");
        return Ok(ExitCode::FAILURE);
    };
    println!("process {pid}; data and logs in {}", stack_dir().display());
    let mut all_ready = true;
    for (name, ready) in observability::readiness(&ports) {
        let is_ready = ready.is_met();
        all_ready &= is_ready;
        println!("  {} {name}", if is_ready { "ready    " } else { "NOT READY" });
    }
    for port in Port::ALL {
        println!("  {:<22} 127.0.0.1:{}", port.name(), ports.get(port));
    }
    Ok(if all_ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_option_is_parsed_by_name() {
        assert_eq!(parse_port("prometheus=9190"), Ok((Port::Prometheus, 9190)));
        assert_eq!(parse_port("prometheus"), Err("write NAME=NUMBER, such as prometheus=9190".to_owned()));
        assert_eq!(parse_port("prometheus=0"), Err("\"0\" is not a port number; choose 1 to 65535".to_owned()));
        assert_eq!(parse_port("prometheus=65536"), Err("\"65536\" is not a port number; choose 1 to 65535".to_owned()));
        assert!(
            parse_port("prom=1")
                .is_err_and(|error| error.starts_with("unknown port \"prom\"; the ports are otlp-grpc, "))
        );
    }
}
