//! The supervisor: one small process per instance, which outlives the manager that started it.
//!
//! The supervisor starts the instance's program, keeps its output and records how it ended. On SIGTERM it ends the whole instance. It is the
//! reaper of all its descendants, so it finds each of them, whatever session or process group they are in. The first process is the instance:
//! when it exits, the supervisor kills the rest. If the manager passes a control group, the supervisor moves the descendants into it, so that
//! they can be killed even if the supervisor itself is killed.
//!
//! A supervisor is started before its instance is known: it loads, starts the process that becomes the program ([`program`]), and waits for
//! its arguments on standard input.
//!
//! It runs as the program `gauntlet-shim`, or as a hidden mode of a program whose `main` calls [`run_if_requested`] first.

mod group;
mod log;
mod program;
mod watch;

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::Signal;

use self::{log::append_log, program::UnassignedProgram, watch::Watch};
use super::{
    cgroup::Group,
    handover,
    output::Output,
    procfs,
    record::{self, End, LockRole, ProcessId, RECORD, Record, STATE, State},
};

/// The first argument of a supervisor. On standard input it receives the instance's directory, the number of consecutive restarts, the control
/// group if there is one, and with them the sockets that hold the instance's ports.
pub(super) const SUPERVISE: &str = "__instance-shim";

/// How long to wait for the supervisor lock, which a manager may hold for a moment to check it.
const SUPERVISOR_LOCK_TIMEOUT: Duration = Duration::from_millis(500);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// Supervises an instance and never returns, if this process was started for that; otherwise returns at once. Call it first in `main`, before
/// any thread is started.
pub fn run_if_requested() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match args.as_slice() {
        [mode] if mode == SUPERVISE => wait_for_instance(),
        [mode, supervisor] if mode == program::BECOME_PROGRAM => program::become_program(supervisor),
        _ => return,
    };
    match result {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            // A supervisor's standard error is discarded; the program's is kept as its output.
            eprintln!("gauntlet: {error}");
            std::process::exit(126);
        }
    }
}

/// A supervisor without an instance.
struct Prepared {
    /// This process.
    pid: i32,
    supervisor: ProcessId,
    boot: String,
    signals: UnixStream,
    stop: Arc<AtomicBool>,
    program: io::Result<UnassignedProgram>,
}

fn wait_for_instance() -> io::Result<()> {
    let prepared = prepare();
    let Some((arguments, ports)) = handover::receive(io::stdin())? else {
        // The manager has ended, or doesn't need it.
        if let Ok(Prepared { program: Ok(program), .. }) = prepared {
            program.dismiss();
        }
        return Ok(());
    };
    let [dir, restarts, cgroup @ ..] = arguments.as_slice() else { return Err(io::ErrorKind::InvalidInput.into()) };
    let dir = Path::new(dir);
    let restarts = restarts.to_str().and_then(|text| text.parse().ok()).unwrap_or(0);
    let cgroup = cgroup.first().map(PathBuf::from);
    let supervised = prepared.and_then(|prepared| supervise(prepared, dir, restarts, cgroup, ports));
    supervised.inspect_err(|error| append_log(dir, &format!("failed: {error}")))
}

/// Does everything that doesn't depend on the instance.
fn prepare() -> io::Result<Prepared> {
    close_inherited()?;
    // Fails only for a process group leader, which is detached enough.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    std::env::set_current_dir("/")?;
    let pid = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(pid))?;
    let pid = pid.as_raw_nonzero().get();
    // From here on SIGTERM stops the instance instead of killing the supervisor.
    let (signals, stop) = register_signals()?;
    let supervisor = procfs::identify(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    Ok(Prepared { pid, supervisor, boot: procfs::boot(), signals, stop, program: UnassignedProgram::start(pid) })
}

fn supervise(
    prepared: Prepared,
    dir: &Path,
    restarts: u32,
    cgroup: Option<PathBuf>,
    ports: Option<OwnedFd>,
) -> io::Result<()> {
    let Prepared { pid, supervisor, boot, mut signals, stop, program } = prepared;
    // Without the lock, another supervisor has the instance; without a record, it was removed.
    let (Some(_lock), Some(record)) = (wait_for_lock(dir)?, record::read::<Record>(dir, RECORD)?) else {
        program.map(UnassignedProgram::dismiss).ok();
        return Ok(());
    };
    // Lets an operator find the instance of a supervisor (`ls -l /proc/PID/cwd`).
    std::env::set_current_dir(dir)?;
    let started_at = Instant::now();
    // The program loads while the state is written.
    let started = program.and_then(|program| program.assign(dir, &record, ports));
    let mut state = State { boot, supervisor, child: None, cgroup, all_in_cgroup: false, restarts, end: None };
    let (reason, complete) = match started {
        Err(error) => (format!("could not be started: {error}"), true),
        Ok((child, pipe)) => {
            state.child = procfs::identify(child.as_raw_nonzero().get());
            record::write(dir, STATE, &state)?;
            let group = state.cgroup.clone().map(Group::new);
            let output = Output::create(dir, record.launch.output)?;
            let mut watch = Watch::new(dir, child, pipe, output, group.clone());
            // In a thread of its own: the kernel may take more than 10 ms.
            let moving = group.map(|group| {
                let (dir, mut state) = (dir.to_owned(), state.clone());
                std::thread::Builder::new().spawn(move || group::move_descendants(&dir, &mut state, &group, pid))
            });
            let reason = watch.until_exit(&mut signals, &stop, record.launch.grace)?;
            match moving {
                Some(Ok(moving)) => drop(moving.join()),
                Some(Err(error)) => {
                    append_log(dir, &format!("cannot move the instance into its control group: {error}"))
                }
                None => {}
            }
            let complete = watch.kill_descendants(pid, &mut signals)?;
            (reason, complete)
        }
    };
    let requested = stop.load(Ordering::Acquire);
    state.end = Some(End { reason, complete, requested, ran_for: started_at.elapsed() });
    record::write(dir, STATE, &state)
}

/// Closes descriptors that the manager's parent left open: an instance must neither use them nor keep them open.
fn close_inherited() -> io::Result<()> {
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // No value owns one of them yet. That of the listing is closed already, so closing it fails.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// Waits for the supervisor lock; `None` if another process keeps it, or the directory has been removed.
fn wait_for_lock(dir: &Path) -> io::Result<Option<File>> {
    let deadline = Instant::now() + SUPERVISOR_LOCK_TIMEOUT;
    loop {
        match record::try_supervisor_lock(dir, LockRole::Supervisor) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
}

/// Returns a stream that becomes readable on SIGCHLD and SIGTERM, and a flag that is set on SIGTERM.
fn register_signals() -> io::Result<(UnixStream, Arc<AtomicBool>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    signal_hook::flag::register(Signal::TERM.as_raw(), Arc::clone(&stop))?;
    signal_hook::low_level::pipe::register(Signal::TERM.as_raw(), write.try_clone()?)?;
    signal_hook::low_level::pipe::register(Signal::CHILD.as_raw(), write)?;
    Ok((read, stop))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn unusable_lock_is_an_error_unless_the_instance_was_removed() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("instances/one");
        assert!(wait_for_lock(&dir).unwrap().is_none());
        // A directory in place of the lock file.
        std::fs::create_dir_all(record::supervisor_lock_path(&dir)).unwrap();
        assert_eq!(wait_for_lock(&dir).unwrap_err().kind(), io::ErrorKind::IsADirectory);
    }
}
