//! `cargo xtask stack up | down | status`, and the stack beside `cargo xtask dev`.
//!
//! One process owns the four components: they end with it. While it runs it holds a lock; its id and ports stand in a file beside that.

use std::fs::{self, File, OpenOptions, TryLockError};
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

const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start it, building what is missing; it stays until `down`
    Up(Up),
    /// End it
    Down,
    /// Say what runs, where, and whether it is ready
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Stay in the foreground until Ctrl-C
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    choice: PortChoice,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PortChoice {
    /// Another port of the stack than the documented one, such as prometheus=9190; may be repeated
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
    let port = Port::named(name).ok_or_else(|| format!("no port is named {name:?}; there are {}", names()))?;
    match number.parse() {
        Ok(0) | Err(_) => Err(format!("{number:?} is no port: choose 1 to 65535")),
        Ok(number) => Ok((port, number)),
    }
}

fn home() -> PathBuf {
    workspace_root().join(".cache/stack")
}

/// The running stack and the right to run it.
pub(crate) struct Held {
    stack: Stack,
    _lock: File,
}

impl Held {
    /// Keeps it up until `is_over`, and reports a component that ends before.
    pub(crate) fn keep(mut self, is_over: impl Fn() -> bool, progress: &mut dyn Progress) {
        let mut ended = Vec::new();
        while !is_over() {
            for (name, process) in self.stack.processes() {
                if !process.is_running() && !ended.contains(&name) {
                    progress.report(&format!("{name} has ended: see {}", process.log().display()));
                    ended.push(name);
                }
            }
            thread::sleep(POLL);
        }
    }
}

/// Installs and builds what is missing, then starts the stack. `None` when another process runs it already.
pub(crate) fn bring_up(ports: Ports, progress: &mut dyn Progress) -> Result<Option<Held>> {
    let Some(lock) = take_lock()? else { return Ok(None) };
    Tools::from_env().ensure(tools::OBSERVABILITY, progress)?;
    let stack = Stack::start(Options { ports, ..Options::deployed(home()) }, progress)?;
    let ports: Value = Port::ALL.iter().map(|port| (port.name().to_owned(), json!(stack.port(*port)))).collect();
    fs::write(state_path(), json!({"pid": process::id(), "ports": ports}).to_string())
        .context("write the stack's state file")?;
    Ok(Some(Held { stack, _lock: lock }))
}

impl Drop for Held {
    fn drop(&mut self) {
        // It is only read while the lock is held, so that one which stays behind misleads nobody.
        let _ = fs::remove_file(state_path());
    }
}

fn state_path() -> PathBuf {
    home().join("state.json")
}

/// The lock, also when another command holds it for the moment in which it looks whether the stack runs.
fn take_lock() -> Result<Option<File>> {
    for _ in 0..5 {
        if let Some(lock) = try_lock()? {
            return Ok(Some(lock));
        }
        thread::sleep(POLL);
    }
    Ok(None)
}

/// The lock of who runs the stack; `None` while another process holds it.
fn try_lock() -> Result<Option<File>> {
    fs::create_dir_all(home()).with_context(|| format!("create {}", home().display()))?;
    let path = home().join("lock");
    let file =
        OpenOptions::new().create(true).append(true).open(&path).with_context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// The ports of a stack that is up, whoever runs it.
pub(crate) fn running() -> Result<Option<Ports>> {
    Ok(if try_lock()?.is_none() { state().map(|(_, ports)| ports) } else { None })
}

/// The process that runs the stack and its ports, once it is up.
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
        let Some(held) = bring_up(self.choice.ports(), &mut screen)? else {
            bail!("the stack already runs: cargo xtask stack status")
        };
        held.keep(|| stop.asked(), &mut screen);
        Ok(ExitCode::SUCCESS)
    }

    fn background(self) -> Result<ExitCode> {
        if try_lock()?.is_none() {
            say("the stack already runs");
            return status();
        }
        // Here, where its progress is seen; the process that stays finds everything there.
        let stop = Stop::listen()?;
        Tools::from_env().ensure(tools::OBSERVABILITY, &mut Screen(&stop))?;
        let log_path = home().join("up.log");
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let errors = log.try_clone().context("open the log a second time")?;
        let mut daemon = process::Command::new(std::env::current_exe().context("find this binary")?);
        daemon.args(["stack", "up", "--foreground"]);
        for (port, number) in &self.choice.ports {
            daemon.arg("--port").arg(format!("{}={number}", port.name()));
        }
        // Out of the terminal's group: it is to outlive this command and its Ctrl-C.
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
                    "to report to it: export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{} OTEL_METRIC_EXPORT_INTERVAL=10000",
                    ports.get(Port::OtlpGrpc)
                ));
                say("it stays up until: cargo xtask stack down");
                return Ok(ExitCode::SUCCESS);
            }
            if stop.asked() {
                end(i32::try_from(daemon.id()).ok().and_then(Pid::from_raw))?;
                bail!("given up on request");
            }
            thread::sleep(POLL);
        }
    }
}

fn down() -> Result<ExitCode> {
    if try_lock()?.is_some() {
        say("the stack does not run");
        return Ok(ExitCode::SUCCESS);
    }
    let Some((pid, _)) = state() else { bail!("the stack is just starting or ending: try again in a moment") };
    end(Some(pid))?;
    say(&format!("the stack has ended; its data and logs stay in {}", home().display()));
    Ok(ExitCode::SUCCESS)
}

/// Asks the process that runs the stack to end, and waits until it has; each component has 10 s.
fn end(pid: Option<Pid>) -> Result<()> {
    let pid = pid.context("the stack's process id is not one")?;
    rustix::process::kill_process(pid, Signal::TERM).context("end the stack")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while try_lock()?.is_none() {
        if Instant::now() > deadline {
            rustix::process::kill_process(pid, Signal::KILL).context("kill the stack")?;
            bail!("the stack did not end within a minute and was killed");
        }
        thread::sleep(POLL);
    }
    Ok(())
}

fn status() -> Result<ExitCode> {
    if try_lock()?.is_some() {
        say("the stack does not run: cargo xtask stack up");
        return Ok(ExitCode::FAILURE);
    }
    let Some((pid, ports)) = state() else {
        say("the stack is starting");
        return Ok(ExitCode::FAILURE);
    };
    println!("process {pid}, data and logs in {}", home().display());
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
    fn ports_are_chosen_by_name() {
        assert_eq!(parse_port("prometheus=9190"), Ok((Port::Prometheus, 9190)));
        assert_eq!(parse_port("prometheus"), Err("write NAME=NUMBER, such as prometheus=9190".to_owned()));
        assert_eq!(parse_port("prometheus=0"), Err("\"0\" is no port: choose 1 to 65535".to_owned()));
        assert_eq!(parse_port("prometheus=65536"), Err("\"65536\" is no port: choose 1 to 65535".to_owned()));
        assert!(
            parse_port("prom=1")
                .is_err_and(|error| error.starts_with("no port is named \"prom\"; there are otlp-grpc, "))
        );
    }
}
