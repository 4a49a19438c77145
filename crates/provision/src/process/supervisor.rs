//! The supervisor: one small process per instance, which outlives the manager that started it.
//!
//! The supervisor starts the instance's program, keeps its output and records how it ended. On SIGTERM it ends the whole instance. It is the
//! reaper of all its descendants, so it finds each of them, whatever session or process group they are in. The first process is the instance:
//! when it exits, the supervisor kills the rest. If the manager can create control groups, the supervisor creates one, which limits the instance,
//! and from which all processes can be killed even if the supervisor itself is killed.
//!
//! A supervisor is started before its instance is known: it loads, starts the process that becomes the program ([`program`]), and waits for
//! its arguments on standard input.
//!
//! It runs as the program `gauntlet-shim`, or as a hidden mode of a program whose `main` calls [`run_if_requested`] first.

mod log;
mod program;
mod watch;

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use gauntlet_domain::Limits;
use gauntlet_sandbox::Level;
use rustix::process::Signal;

use self::{
    log::append_log,
    program::{InstancePorts, UnassignedProgram},
    watch::Watch,
};
use super::{
    cgroup::{Group, Groups},
    exceeded, handover,
    output::Output,
    procfs,
    record::{self, End, Launch, LockRole, ProcessId, RECORD, Record, STATE, State},
};

/// The first argument of a supervisor; the level of isolation follows, and where to create its control group if it has one. On standard input it receives the instance's directory, the
/// number of consecutive restarts, and with them the sockets that hold the instance's ports.
pub(super) const SUPERVISE: &str = "__instance-shim";

/// How long to wait for the supervisor lock, which a manager may hold for a moment to check it.
const SUPERVISOR_LOCK_TIMEOUT: Duration = Duration::from_millis(500);
const LOCK_PAUSE: Duration = Duration::from_millis(2);
/// How long the processes of an instance that could not be started may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Supervises an instance and never returns, if this process was started for that; otherwise returns at once. Call it first in `main`, before
/// any thread is started.
pub fn run_if_requested() {
    gauntlet_sandbox::run_if_requested();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match args.as_slice() {
        [mode, level, groups @ ..] if mode == SUPERVISE => wait_for_instance(level, groups.first()),
        _ => return,
    };
    match result {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            // A supervisor's standard error is discarded; its log has the error, too.
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
    /// The program is in it.
    group: Option<Group>,
}

fn wait_for_instance(level: &OsStr, groups: Option<&OsString>) -> io::Result<()> {
    let level = level.to_str().and_then(|level| level.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
    let prepared = prepare(level, groups);
    let Some((arguments, ports)) = handover::receive(io::stdin())? else {
        // The manager has ended, or doesn't need it.
        return prepared.map_or(Ok(()), |prepared| dismiss(prepared.program, prepared.group.as_ref()));
    };
    let [dir, restarts] = arguments.as_slice() else { return Err(io::ErrorKind::InvalidInput.into()) };
    let dir = Path::new(dir);
    let restarts = restarts.to_str().and_then(|text| text.parse().ok()).unwrap_or(0);
    let group = prepared.as_ref().ok().and_then(|prepared| prepared.group.clone());
    let supervised = prepared.and_then(|prepared| supervise(prepared, dir, restarts, ports)).or_else(|error| {
        // Nothing else knows this group if the state could not be written.
        group.map_or(Ok(false), |group| group.kill(KILL_TIMEOUT))?;
        Err(error)
    });
    supervised.inspect_err(|error| append_log(dir, &format!("failed: {error}")))
}

/// Does everything that doesn't depend on the instance.
fn prepare(level: Level, groups: Option<&OsString>) -> io::Result<Prepared> {
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
    let groups = groups.map(|groups| Groups::from_argument(&groups.to_string_lossy())).transpose()?;
    let group = groups.map(|groups| groups.of(supervisor));
    let program = UnassignedProgram::start(level).map_err(io::Error::from).and_then(|program| match &group {
        Some(group) => group.create().and_then(|()| group.add(program.pid().as_raw_nonzero().get())).map(|()| program),
        None => Ok(program),
    });
    Ok(Prepared { pid, supervisor, boot: procfs::boot(), signals, stop, program, group })
}

/// Ends the program, which has no instance, and removes its group.
fn dismiss(program: io::Result<UnassignedProgram>, group: Option<&Group>) -> io::Result<()> {
    if let Ok(program) = program {
        program.dismiss();
    }
    group.map_or(Ok(()), |group| group.kill(KILL_TIMEOUT).map(drop))
}

fn supervise(prepared: Prepared, dir: &Path, restarts: u32, ports: Option<OwnedFd>) -> io::Result<()> {
    let Prepared { pid, supervisor, boot, mut signals, stop, program, group } = prepared;
    // Without the lock, another supervisor has the instance; without a record, it was removed.
    let (Some(_lock), Some(record)) = (wait_for_lock(dir)?, record::read::<Record>(dir, RECORD)?) else {
        return dismiss(program, group.as_ref());
    };
    let ports = InstancePorts::receive(ports)?;
    if !ports.match_record(&record) {
        // The supervisor of the other launch waits for the lock.
        return dismiss(program, group.as_ref());
    }
    // Lets an operator find the instance of a supervisor (`ls -l /proc/PID/cwd`).
    std::env::set_current_dir(dir)?;
    let started_at = Instant::now();
    let limited = program.and_then(|program| match &group {
        Some(group) => {
            let Launch { limits, isolation, .. } = &record.launch;
            let processes = limits.processes.map(|processes| processes.saturating_add(isolation.own_threads()));
            group.limit(&Limits { processes, ..limits.clone() }).map(|()| program)
        }
        None => Ok(program),
    });
    let isolation = record.launch.isolation;
    let mut state = State { boot, supervisor, child: None, isolation, group: group.clone(), restarts, end: None };
    // Recorded before anything of the instance runs: if this process is killed, a manager can kill the rest by its first process.
    if let Ok(program) = &limited {
        state.child = procfs::identify(program.pid().as_raw_nonzero().get());
        record::write(dir, STATE, &state)?;
    }
    let started = limited.and_then(|program| program.assign(dir, &record, ports));
    let mut end = match started {
        Err(error) => {
            group.map_or(Ok(false), |group| group.kill(KILL_TIMEOUT))?;
            End { reason: format!("could not be started: {error}"), complete: true, ..End::default() }
        }
        Ok((program, pipe)) => {
            let output = Output::create(dir, record.launch.output)?;
            let mut watch = Watch::new(dir, program, pipe, output, group);
            let exit = watch.until_exit(&mut signals, &stop, record.launch.grace)?;
            let complete = watch.kill_descendants(pid, &mut signals)?;
            if !stop.load(Ordering::Acquire) {
                watch.drain();
            }
            End { reason: watch.reason(exit), complete, exit, usage: watch.usage(), ..End::default() }
        }
    };
    end.requested = stop.load(Ordering::Acquire);
    end.ran_for = started_at.elapsed();
    exceeded::explain(&mut end, &record.launch.limits);
    state.end = Some(end);
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
