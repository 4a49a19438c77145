//! A component as a child process: started with its log in a file, waited for until it answers, stopped or killed, started again.
//!
//! The environment of this process is not handed on, save what a program needs to run: an `OTEL_*` or `ETCD_*` variable of the caller would
//! configure the component too.

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
    /// What errors call it.
    pub name: String,
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its environment, besides `PATH`, `HOME`, `TMPDIR` and `LANG`.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory; that of this process when `None`.
    pub dir: Option<PathBuf>,
    /// Where its stdout and stderr are appended.
    pub log: PathBuf,
    /// When it counts as ready.
    pub ready: Ready,
    /// How long it may take to become ready.
    pub ready_within: Duration,
    /// How long it may take to end after SIGTERM before it is killed.
    pub stop_within: Duration,
}

impl Spec {
    /// A component without arguments, with the usual deadlines: a minute to become ready, 10 s to stop.
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

/// When a component counts as ready.
#[derive(Debug, Clone)]
pub enum Ready {
    /// A GET of this address answers with a 2xx status.
    Http(String),
    /// Something accepts connections on this loopback port.
    Tcp(u16),
    /// At once.
    Spawned,
}

impl Ready {
    /// Whether it is so now. Waits two seconds at most.
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

/// A component that was started at least once. It ends when this value is dropped, and with this process.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    child: Option<Child>,
}

impl Process {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::NotReady`] when it ends or does not become ready in time (it is killed then); an I/O error when it can't be started.
    pub fn run(spec: Spec) -> Result<Process> {
        let mut process = Process::spawn(spec)?;
        process.wait_ready()?;
        Ok(process)
    }

    /// Starts it without waiting: several become ready side by side. Call [`Process::wait_ready`] afterwards.
    pub(crate) fn spawn(spec: Spec) -> Result<Process> {
        let mut process = Process { spec, child: None };
        process.launch()?;
        Ok(process)
    }

    /// Starts it again after [`Process::stop`] or [`Process::kill`], on the same ports and data, and waits until it is ready.
    /// Nothing happens while it runs.
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

    /// Asks it to end (SIGTERM) and waits; kills it when it takes longer than its spec allows. Returns how it ended: `None` when it did not run.
    ///
    /// # Errors
    /// An I/O error when it can't be waited for.
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

    /// Ends it at once (SIGKILL), as a crash would. Returns how it ended: `None` when it did not run.
    ///
    /// # Errors
    /// An I/O error when it can't be waited for.
    pub fn kill(&mut self) -> Result<Option<ExitStatus>> {
        let Some(mut child) = self.child.take() else { return Ok(None) };
        signal(&child, Signal::KILL);
        child.wait().map(Some).doing(|| format!("kill {}", self.spec.name))
    }

    /// Sends a signal, such as SIGSTOP to play a frozen component. Nothing happens when it does not run.
    pub fn signal(&self, which: Signal) {
        if let Some(child) = &self.child {
            signal(child, which);
        }
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Its process id while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.spec.log
    }

    /// How it is run; what is changed here holds from the next [`Process::start`] on.
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
        // Not in the group of the terminal: Ctrl-C is for who owns the component, who ends it in its own order.
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
                return Err(self.not_ready(format!("ended while starting ({status})")));
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
        // Nobody is left to hear of it, and the child ends with this process in any case.
        let _ = self.stop();
    }
}

fn signal(child: &Child, which: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // Only fails when it has already ended.
        let _ = rustix::process::kill_process(pid, which);
    }
}

/// Starts a child that the kernel kills when this process ends, however it ends.
///
/// The kernel binds the child to the thread that starts it, so one thread that never ends starts them all.
///
/// # Errors
/// What the system answers when the program can't be started.
pub fn spawn_bound(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                bind_to_parent(&mut command);
                // The caller waits below: it is there to receive.
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, receive) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes has ended");
    spawner.send((command, answer)).map_err(|_| gone())?;
    receive.recv().map_err(|_| gone())?
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
            // The parent may have ended before the line above took effect.
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

    fn gone_within(pid: u32, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        // A zombie, which nobody has waited for yet, has ended too.
        let runs = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while runs() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        !runs()
    }

    #[test]
    fn one_that_ends_while_starting_is_reported_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let error = Process::run(shell(dir.path(), "echo no such port >&2; exit 3", Ready::Tcp(1))).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("the shell ended while starting (exit status: 3)") && text.contains("no such port"),
            "{text}"
        );
    }

    #[test]
    fn one_that_never_answers_is_killed_and_reported() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shell(dir.path(), "sleep 1000", Ready::Tcp(1));
        spec.ready_within = Duration::from_millis(200);
        assert!(Process::run(spec).unwrap_err().to_string().contains("was not ready within"));
    }

    #[test]
    fn stops_on_sigterm_and_starts_again() {
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
    fn one_that_ignores_sigterm_is_killed() {
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
    fn dropping_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::run(shell(dir.path(), "exec sleep 1000", Ready::Spawned)).unwrap();
        let pid = process.id().unwrap();
        drop(process);
        assert!(gone_within(pid, Duration::from_secs(5)));
    }

    /// Runs itself as a parent that is then killed: its child must not outlive it.
    #[test]
    fn a_child_ends_with_a_parent_that_is_killed() {
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
            .args(["--exact", "process::tests::a_child_ends_with_a_parent_that_is_killed"])
            .env(ROLE, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let pid: u32 = loop {
            assert!(Instant::now() < deadline, "the parent has started no child");
            match std::fs::read_to_string(dir.path().join("pid")) {
                Ok(pid) => break pid.parse().unwrap(),
                Err(_) => thread::sleep(POLL),
            }
        };
        parent.kill().unwrap();
        parent.wait().unwrap();
        assert!(gone_within(pid, Duration::from_secs(5)));
    }
}
