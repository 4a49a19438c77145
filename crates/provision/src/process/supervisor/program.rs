//! The process that becomes the instance's program. It is started before the instance is known, then limits itself and calls exec.
//!
//! A process of its own, because it must set its parent death signal itself, and without unsafe code nothing runs between fork and exec.

use std::{
    ffi::OsStr,
    io::{self, PipeReader},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions};

use crate::process::{
    handover::{self, Sender},
    ports::HeldPorts,
    record::{self, Launch, MARKER, RECORD, Record, WORK},
};

/// The first argument of this process; the supervisor's process id follows. On standard input it receives the instance's directory, and the
/// sockets that hold the instance's ports.
pub(super) const BECOME_PROGRAM: &str = "__instance-exec";

/// CPU seconds between SIGXCPU, which ends a program that doesn't handle it, and SIGKILL.
const CPU_GRACE: u64 = 2;
/// Bytes of locked memory, and of message queues: memory of the kernel that other limits don't count.
const KERNEL_BYTES: u64 = 64 << 10;

/// A process that becomes the program of the instance that it is assigned.
pub(super) struct UnassignedProgram {
    child: Pid,
    output: PipeReader,
    sender: Sender,
}

impl UnassignedProgram {
    pub(super) fn start(supervisor: i32) -> io::Result<Self> {
        let sender = Sender::new()?;
        let (output, writer) = io::pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let child = Command::new("/proc/self/exe")
            .arg(BECOME_PROGRAM)
            .arg(supervisor.to_string())
            .env_clear()
            .stdin(sender.stdin()?)
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0)
            .spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Ok(Self { child: pid.ok_or_else(|| io::Error::other("no process id"))?, output, sender })
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.as_raw_nonzero().get()
    }

    /// Lets it become the program. Returns its process id and its output.
    ///
    /// # Errors
    /// If a manager of another release wrote the record, or sending fails.
    pub(super) fn assign(self, dir: &Path, record: &Record, ports: Option<OwnedFd>) -> io::Result<(Pid, PipeReader)> {
        if record.version != record::VERSION {
            self.dismiss();
            return Err(io::Error::other("the manager and its supervisor are of different releases"));
        }
        self.sender.send(&[dir.as_os_str()], ports)?;
        Ok((self.child, self.output))
    }

    /// Ends it without an instance, and reaps it.
    pub(super) fn dismiss(self) {
        drop(self.sender);
        let _ = rustix::process::waitpid(Some(self.child), WaitOptions::empty());
    }
}

/// Waits for the instance, limits this process and calls exec. Returns only if that fails, or if there is no instance.
pub(super) fn become_program(supervisor: &OsStr) -> io::Result<()> {
    // Without its supervisor, nothing would end the whole instance, so the program ends too.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.as_deref().map(OsStr::new) != Some(supervisor) {
        return Err(io::Error::other("the supervisor has exited"));
    }
    rustix::thread::set_no_new_privs(true)?;
    let Some((arguments, ports)) = handover::receive(io::stdin())? else { return Ok(()) };
    // Closed by exec: the ports are held until the program starts.
    let _held = ports.as_ref().map(HeldPorts::receive);
    let dir = arguments.first().map(Path::new).ok_or(io::ErrorKind::InvalidInput)?;
    let Record { launch, .. } =
        record::read::<Record>(dir, RECORD)?.ok_or_else(|| io::Error::other("its record was removed"))?;
    limit_process(&launch)?;
    let error = Command::new(&launch.program)
        .args(&launch.args)
        .env_clear()
        .envs(&launch.env)
        .env(MARKER, dir)
        .current_dir(dir.join(WORK))
        .stdin(Stdio::null())
        .exec();
    Err(io::Error::new(error.kind(), format!("{}: {error}", launch.program.display())))
}

/// Limits this process, and each of those that it starts.
fn limit_process(launch: &Launch) -> io::Result<()> {
    let limits = &launch.limits;
    for (resource, soft, grace) in [
        // At 0, a handler of core dumps (`|` in core_pattern) would run, outside of the instance: at 1 it doesn't. core(5)
        (Resource::Core, Some(1), 0),
        (Resource::Nofile, limits.open_files, 0),
        (Resource::Cpu, limits.cpu_seconds, CPU_GRACE),
        (Resource::As, launch.address_space, 0),
        (Resource::Fsize, limits.disk, 0),
        (Resource::Memlock, Some(KERNEL_BYTES), 0),
        (Resource::Msgqueue, Some(KERNEL_BYTES), 0),
        (Resource::Nice, Some(0), 0),
        (Resource::Rtprio, Some(0), 0),
    ] {
        limit(resource, soft, grace)?;
    }
    Ok(())
}

/// Sets the soft limit to `soft` and the hard limit to `soft + grace`, as far as this process's own hard limit allows.
fn limit(resource: Resource, soft: Option<u64>, grace: u64) -> io::Result<()> {
    let Some(soft) = soft else { return Ok(()) };
    let own_maximum = rustix::process::getrlimit(resource).maximum;
    let allowed = |value: u64| Some(own_maximum.map_or(value, |maximum| maximum.min(value)));
    let (current, maximum) = (allowed(soft), allowed(soft.saturating_add(grace)));
    Ok(rustix::process::setrlimit(resource, Rlimit { current, maximum })?)
}
