//! A component as a child process, which can be stopped, killed and started again. Its output goes to a log file.
//!
//! A component inherits only the environment variables that every program needs: an `OTEL_*` or `ETCD_*` variable of the caller would
//! configure it too.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::{Doing as _, Error, Result, http, tail};

const POLL: Duration = Duration::from_millis(50);

/// How to run a component.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The name in errors.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its environment, in addition to `PATH`, `HOME`, `TMPDIR` and `LANG`.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory; `None` is that of this process.
    pub dir: Option<PathBuf>,
    /// The file to which its stdout and stderr are appended.
    pub log: PathBuf,
    /// How to tell that it is ready.
    pub ready: Ready,
    /// How long to wait until it is ready.
    pub ready_within: Duration,
    /// How long to wait between SIGTERM and SIGKILL.
    pub stop_within: Duration,
}

impl Spec {
    /// A component without arguments and with the default timeouts: 60 s to become ready, 10 s to stop.
    pub fn new(name: &str, program: impl Into<PathBuf>, log: impl Into<PathBuf>, ready: Ready) -> Spec {
        Spec {
            name: name.to_owned(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            dir: None,
            log: log.into(),
            ready,
            ready_within: Duration::from_secs(60),
            stop_within: Duration::from_secs(10),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Spec {
        self.args.push(arg.into());
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Spec {
        self.env.push((name.into(), value.into()));
        self
    }
}

/// How to tell that a component is ready.
#[derive(Debug, Clone)]
pub enum Ready {
    /// A GET request to this URL returns a 2xx status.
    Http(String),
    /// This loopback port accepts connections.
    Tcp(u16),
    /// It is ready as soon as it is started.
    Spawned,
}

impl Ready {
    /// Checks once. Takes at most two seconds.
    pub fn is_met(&self) -> bool {
        match self {
            Ready::Http(url) => http::answers(url),
            Ready::Tcp(port) => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
                TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
            }
            Ready::Spawned => true,
        }
    }
}

/// A component that was started at least once. Dropping it stops the component, which also ends when this process ends.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    child: Option<Child>,
}

impl Process {
    /// Starts the component and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::NotReady`] if it exits or isn't ready in time, and is then killed; [`Error::Io`] if it can't be started.
    pub fn run(spec: Spec) -> Result<Process> {
        let mut process = Process::spawn(spec)?;
        process.wait_ready()?;
        Ok(process)
    }

    /// Starts the component without waiting, so that several can start in parallel. Call [`Process::wait_ready`] afterwards.
    pub(crate) fn spawn(spec: Spec) -> Result<Process> {
        let mut process = Process { spec, child: None };
        process.launch()?;
        Ok(process)
    }

    /// Starts the component again after [`Process::stop`] or [`Process::kill`], with the same ports and data, and waits until it is ready.
    /// Does nothing if it runs.
    ///
    /// # Errors
    /// As [`Process::run`].
    pub fn start(&mut self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        self.launch()?;
        self.wait_ready()
    }

    /// Sends SIGTERM and waits; sends SIGKILL after [`Spec::stop_within`]. Returns the exit status, or `None` if it didn't run.
    ///
    /// # Errors
    /// [`Error::Io`] if waiting for it fails.
    pub fn stop(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let doing = || format!("stop {}", self.spec.name);
        signal(child, Signal::TERM);
        let deadline = Instant::now() + self.spec.stop_within;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().doing(doing)? {
                self.child = None;
                return Ok(Some(status));
            }
            thread::sleep(POLL);
        }
        self.kill()
    }

    /// Sends SIGKILL and waits, to simulate a crash. Returns the exit status, or `None` if it didn't run.
    ///
    /// # Errors
    /// [`Error::Io`] if waiting for it fails.
    pub fn kill(&mut self) -> Result<Option<ExitStatus>> {
        let Some(mut child) = self.child.take() else { return Ok(None) };
        signal(&child, Signal::KILL);
        child.wait().map(Some).doing(|| format!("kill {}", self.spec.name))
    }

    /// Sends a signal, such as SIGSTOP to simulate a component that hangs. Does nothing if it doesn't run.
    pub fn signal(&self, which: Signal) {
        if let Some(child) = &self.child {
            signal(child, which);
        }
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The process id, until the component is stopped or killed.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The file with its output.
    pub fn log(&self) -> &Path {
        &self.spec.log
    }

    /// The spec, for changes that take effect at the next [`Process::start`].
    pub fn spec_mut(&mut self) -> &mut Spec {
        &mut self.spec
    }

    fn launch(&mut self) -> Result<()> {
        let spec = &self.spec;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&spec.log)
            .doing(|| format!("open log {}", spec.log.display()))?;
        let errors = log.try_clone().doing(|| format!("open log {}", spec.log.display()))?;
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).stdin(Stdio::null()).stdout(log).stderr(errors).env_clear();
        // Outside the terminal's process group, Ctrl-C doesn't reach it: its owner stops the components in order.
        command.process_group(0);
        for name in ["PATH", "HOME", "TMPDIR", "LANG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(spec.env.iter().map(|(name, value)| (name, value)));
        if let Some(dir) = &spec.dir {
            command.current_dir(dir);
        }
        self.child = Some(spawn_bound(command).doing(|| format!("start {} ({})", spec.name, spec.program.display()))?);
        Ok(())
    }

    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.spec.ready_within;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().doing(|| format!("wait for {}", self.spec.name))?
            {
                self.child = None;
                return Err(self.not_ready(format!("exited while starting ({status})")));
            }
            if self.spec.ready.is_met() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.kill()?;
                return Err(self.not_ready(format!("was not ready within {} s", self.spec.ready_within.as_secs())));
            }
            thread::sleep(POLL);
        }
    }

    fn not_ready(&self, what: String) -> Error {
        Error::NotReady { name: self.spec.name.clone(), what, log: self.spec.log.clone(), tail: tail(&self.spec.log) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Drop can't return an error, and the child ends with this process in any case.
        let _ = self.stop();
    }
}

fn signal(child: &Child, which: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Fails only if it has already exited.
        let _ = rustix::process::kill_process(pid, which);
    }
}

/// Starts a child that the kernel kills when this process ends, for whatever reason.
///
/// The kernel ties the child to the thread that starts it, so a dedicated thread, which never ends, starts all children.
///
/// # Errors
/// The system's error if the program can't be started.
pub fn spawn_bound(command: Command) -> io::Result<Child> {
    type Request = (Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                bind_to_parent(&mut command);
                // The caller waits below, so the receiver exists.
                let _ = answer.send(command.spawn());
            }
        });
        requests
    });
    let (answer, receive) = mpsc::sync_channel(1);
    let ended = || io::Error::other("the thread that starts processes has ended");
    spawner.send((command, answer)).map_err(|_| ended())?;
    receive.recv().map_err(|_| ended())?
}

#[allow(
    unsafe_code,
    reason = "pre_exec has no safe form; the closure makes two async-signal-safe system calls and allocates nothing"
)]
fn bind_to_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec the closure only calls prctl and getppid.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have exited before the call above took effect.
            if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use super::*;

    fn shell(dir: &Path, script: &str, ready: Ready) -> Spec {
        Spec::new("the shell", "/bin/sh", dir.join("log"), ready).arg("-c").arg(script)
    }

    fn exits_within(pid: u32, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        // A zombie has exited too.
        let runs = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while runs() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        !runs()
    }

    #[test]
    fn exit_while_starting_is_reported_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let error = Process::run(shell(dir.path(), "echo no such port >&2; exit 3", Ready::Tcp(1))).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("the shell exited while starting (exit status: 3)") && text.contains("no such port"),
            "{text}"
        );
    }

    #[test]
    fn component_that_is_never_ready_is_killed_and_reported() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shell(dir.path(), "sleep 1000", Ready::Tcp(1));
        spec.ready_within = Duration::from_millis(200);
        assert!(Process::run(spec).unwrap_err().to_string().contains("was not ready within"));
    }

    #[test]
    fn stopped_component_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::run(shell(dir.path(), "echo up; exec sleep 1000", Ready::Spawned)).unwrap();
        let first = process.id().unwrap();
        assert!(process.stop().unwrap().is_some());
        assert!(!process.is_running());
        assert!(process.stop().unwrap().is_none());
        process.start().unwrap();
        assert_ne!(process.id().unwrap(), first);
        assert!(process.is_running());
    }

    #[test]
    fn component_that_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shell(dir.path(), "trap '' TERM; echo up; while :; do sleep 0.05; done", Ready::Spawned);
        spec.stop_within = Duration::from_millis(300);
        let mut process = Process::run(spec).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::read_to_string(process.log()).unwrap().is_empty() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(process.stop().unwrap().unwrap().signal(), Some(9));
    }

    #[test]
    fn drop_stops_the_component() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::run(shell(dir.path(), "exec sleep 1000", Ready::Spawned)).unwrap();
        let pid = process.id().unwrap();
        drop(process);
        assert!(exits_within(pid, Duration::from_secs(5)));
    }

    /// Runs the test binary again as a parent, and kills it: its child must not outlive it.
    #[test]
    fn child_ends_when_its_parent_is_killed() {
        const ROLE: &str = "GAUNTLET_STACK_TEST_PARENT";
        if let Some(dir) = std::env::var_os(ROLE) {
            let dir = PathBuf::from(dir);
            let process = Process::run(shell(&dir, "exec sleep 1000", Ready::Spawned)).unwrap();
            std::fs::write(dir.join("pid.part"), process.id().unwrap().to_string()).unwrap();
            std::fs::rename(dir.join("pid.part"), dir.join("pid")).unwrap();
            thread::sleep(Duration::from_secs(100));
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut parent = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::tests::child_ends_when_its_parent_is_killed"])
            .env(ROLE, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let pid: u32 = loop {
            assert!(Instant::now() < deadline, "the parent has not started a child");
            match std::fs::read_to_string(dir.path().join("pid")) {
                Ok(pid) => break pid.parse().unwrap(),
                Err(_) => thread::sleep(POLL),
            }
        };
        parent.kill().unwrap();
        parent.wait().unwrap();
        assert!(exits_within(pid, Duration::from_secs(5)));
    }
}
