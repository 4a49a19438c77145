//! The supervisor's side: starts a stage, and runs a program in it.

use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::Command,
    sync::mpsc,
};

use nix::sched::CloneFlags;
use rustix::{
    fs::{MemfdFlags, SealFlags},
    process::{DumpableBehavior, Pid, Resource, Rlimit, WaitOptions},
};

use crate::{
    Exit, Failure, Level, Spec,
    control::{self, Report, Request, SupervisorEnd},
    failure::StepExt as _,
    forward::{self, Forwarder},
    root::INNER_ID,
    stage::STAGE,
};

/// A stage that waits for its program. Dropping it ends it.
#[derive(Debug)]
pub struct Stage {
    level: Level,
    pid: Pid,
    control: SupervisorEnd,
    output: PipeReader,
    /// The thread in the sandbox's network; none at levels without one.
    network: Option<Network>,
}

/// A program in its sandbox.
#[derive(Debug)]
pub struct Running {
    pid: Pid,
    control: SupervisorEnd,
    forwarder: Option<PipeReader>,
}

/// The thread in a sandbox's network.
#[derive(Debug)]
struct Network {
    jobs: mpsc::Sender<Forwarder>,
    /// Receives the error that ends the forwarder; closed once it has ended.
    ended: PipeReader,
}

impl Stage {
    /// Starts a stage. This process must have a single thread: at level `userns` it moves itself to a user namespace. At levels with
    /// namespaces, it also makes itself invisible to debuggers.
    ///
    /// The stage ends with this process.
    ///
    /// # Errors
    /// The step that failed. At level `none` and `landlock`, only a failure to start a process.
    pub fn start(level: Level) -> Result<Self, Failure> {
        let (control, stdin) = control::pair().step("create the control socket")?;
        let (output, writer) = io::pipe().step("create a pipe")?;
        rustix::io::ioctl_fionbio(&output, true).step("create a pipe")?;
        let program =
            if level.has_namespaces() { Executable::copy().step("open this program")? } else { Executable::File };
        let mut command = Command::new(program.path());
        command
            .arg0("gauntlet-init")
            .args([STAGE, level.name()])
            .env_clear()
            .stdin(stdin)
            .stdout(writer.try_clone().step("create a pipe")?)
            .stderr(writer);
        if !level.has_namespaces() {
            let pid = spawn(&mut command).step("start the stage")?;
            return Ok(Self { level, pid, control, output, network: None });
        }
        if level == Level::Userns {
            enter_user_namespace()?;
        } else if !rustix::process::geteuid().is_root() {
            return Err(Failure::new("check for root", rustix::io::Errno::PERM));
        }
        // Before this, the maps of its own user namespace could not be written.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("hide this process")?;
        let (jobs, receiver) = mpsc::channel();
        let (ended, failed) = io::pipe().step("create a pipe")?;
        let (started, pid) = mpsc::channel();
        std::thread::Builder::new()
            .name("sandbox-network".to_owned())
            .spawn(move || run_network(program, command, &started, &receiver, failed))
            .step("start a thread")?;
        let pid = pid.recv().map_err(io::Error::other).step("start the stage")??;
        Ok(Self { level, pid, control, output, network: Some(Network { jobs, ended }) })
    }

    /// The process that becomes process 1 of the sandbox, or the program itself at levels without namespaces.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its isolation.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Starts the program, and returns it with its output.
    ///
    /// The stage holds `hold`, at most 16 descriptors, until the last process of the sandbox has ended; at levels without namespaces, until the program has started.
    /// `forward` are the ports of the machine that are forwarded to the sandbox's network, until they are stopped or this process ends. At levels
    /// without a network of their own, there is nothing to forward.
    ///
    /// # Errors
    /// The step that failed. No process of the sandbox is left then.
    pub fn run(
        mut self,
        spec: &Spec,
        hold: Vec<OwnedFd>,
        forward: Option<forward::Setup>,
    ) -> Result<(Running, PipeReader), Failure> {
        let prepare = |setup: forward::Setup| {
            raise_open_files(&setup)?;
            Forwarder::new(setup)
        };
        let forwarder = forward.map(prepare).transpose().step("forward ports");
        let started = forwarder.and_then(|forwarder| self.start_program(spec, hold).map(|()| forwarder));
        let Self { pid, control, output, network, .. } = self;
        let forwarder = match started {
            Ok(forwarder) => forwarder,
            Err(failure) => {
                drop(control);
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                return Err(failure);
            }
        };
        let forwarder = match (network, forwarder) {
            (Some(network), Some(forwarder)) => {
                network.jobs.send(forwarder).map_err(io::Error::other).step("forward ports")?;
                Some(network.ended)
            }
            _ => None,
        };
        Ok((Running { pid, control, forwarder }, output))
    }

    fn start_program(&mut self, spec: &Spec, hold: Vec<OwnedFd>) -> Result<(), Failure> {
        // Closed here before the program starts: it may need what is held.
        self.control.send_spec(spec, hold).step("send the specification")?;
        loop {
            match self.control.receive().step("wait for the stage")? {
                Some(Report::NeedsIds) => {
                    let outside = if self.level == Level::Uid { spec.uid } else { 0 };
                    map_ids(self.pid.as_raw_pid().to_string().as_str(), INNER_ID, outside)?;
                    self.control.send(Request::IdsMapped).step("report the ids")?;
                }
                Some(Report::Failed(failure)) => return Err(failure),
                Some(Report::Started) => return Ok(()),
                // At levels without namespaces, exec closes it. A probe that succeeded ends.
                None if !self.level.has_namespaces() || spec.program.is_none() => return Ok(()),
                None | Some(Report::Ended(_)) => {
                    return Err(Failure::new("wait for the stage", io::Error::other("it was killed")));
                }
            }
        }
    }

    /// Ends it without a program, and reaps it.
    pub fn dismiss(self) {
        drop(self.control);
        let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::empty());
    }
}

impl Running {
    /// Process 1 of the sandbox, or the program at levels without namespaces. Once it is reaped, no process of its PID namespace is left.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends SIGTERM to every process of the sandbox, without waiting. Only for levels with namespaces.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub fn terminate(&mut self) -> io::Result<()> {
        self.control.send(Request::Terminate)
    }

    /// Becomes readable when the forwarder has ended, with the text of its error if it failed. `None` if nothing is forwarded.
    pub fn forwarder(&mut self) -> Option<&mut PipeReader> {
        self.forwarder.as_mut()
    }

    /// How the program ended; call it once process 1 has exited. `None` if process 1 was killed, or there are no namespaces.
    pub fn exit(&mut self) -> Option<Exit> {
        match self.control.receive() {
            Ok(Some(Report::Ended(exit))) => Some(exit),
            _ => None,
        }
    }
}

/// The program of the stage: a sealed copy of this one in memory, so that nothing inside can reach the file; the file itself where the kernel
/// allows no programs in memory.
enum Executable {
    Memory(OwnedFd),
    File,
}

impl Executable {
    fn copy() -> io::Result<Self> {
        let name = c"gauntlet-init";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let created = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
            // Before Linux 6.3.
            Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
            created => created,
        };
        // The setting vm.memfd_noexec forbids it.
        let Ok(memory) = created else { return Ok(Self::File) };
        let mut copy = File::from(memory);
        io::copy(&mut File::open("/proc/self/exe")?, &mut copy)?;
        rustix::fs::fcntl_add_seals(&copy, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
        Ok(Self::Memory(copy.into()))
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Memory(memory) => format!("/proc/self/fd/{}", memory.as_fd().as_raw_fd()).into(),
            Self::File => "/proc/self/exe".into(),
        }
    }
}

/// Lets this process open as many files as the forwarder needs, as far as its own hard limit allows.
fn raise_open_files(setup: &forward::Setup) -> io::Result<()> {
    let needed = u64::try_from(setup.limits.descriptors(setup.ports.len())).unwrap_or(u64::MAX);
    let Rlimit { current, maximum } = rustix::process::getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < needed) {
        let current = Some(maximum.map_or(needed, |maximum| maximum.min(needed)));
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    }
    Ok(())
}

fn spawn(command: &mut Command) -> io::Result<Pid> {
    let child = command.spawn()?;
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("no process id"))
}

/// The thread whose network is the sandbox's. Processes that it starts are in the new PID namespace, and it can't start threads.
///
/// It never ends before its process: the stage gets SIGKILL when the thread that started it ends.
fn run_network(
    program: Executable,
    mut command: Command,
    started: &mpsc::Sender<Result<Pid, Failure>>,
    jobs: &mpsc::Receiver<Forwarder>,
    mut failed: PipeWriter,
) {
    let mut start = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID)
            .step("unshare network and pid namespaces")?;
        forward::prepare_network().step("configure the network")?;
        spawn(&mut command).step("start the stage")
    };
    let pid = start();
    // The command holds the stage's end of the control socket.
    drop((program, command));
    let has_failed = pid.is_err();
    if started.send(pid).is_err() || has_failed {
        return;
    }
    if let Ok(forwarder) = jobs.recv()
        && let Err(error) = forwarder.run()
    {
        let _ = failed.write_all(error.to_string().as_bytes());
    }
    drop(failed);
    loop {
        std::thread::park();
    }
}

/// Moves this process to a user namespace of its own, in which it is root.
fn enter_user_namespace() -> Result<(), Failure> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER).step("unshare user namespace")?;
    // Any other id inside would lose its capabilities with the exec of the stage.
    write_maps("self", (0, uid), (0, gid))
}

fn map_ids(process: &str, inside: u32, outside: u32) -> Result<(), Failure> {
    write_maps(process, (inside, outside), (inside, outside))
}

fn write_maps(process: &str, uid: (u32, u32), gid: (u32, u32)) -> Result<(), Failure> {
    let write = |name: &str, text: String| {
        std::fs::write(format!("/proc/{process}/{name}"), text).step(format!("write {name}"))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("{} {} 1", uid.0, uid.1))?;
    write("gid_map", format!("{} {} 1", gid.0, gid.1))
}
