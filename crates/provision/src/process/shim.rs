//! The supervisor: one small process per instance, which outlives the manager that started it.
//!
//! It starts the instance's program, keeps its output, records how it ended, and when told to stop (SIGTERM) ends it whole: as the reaper
//! of orphans below it, it sees every descendant, whatever session or group that moved to. The instance is its first process: when that
//! ends, everything else of it is killed.
//!
//! It runs either as the program `gauntlet-shim` or as a hidden mode of a program whose `main` calls [`run_if_requested`] first.

use std::{
    fs::File,
    io::{self, PipeReader, Read as _},
    os::unix::{
        net::UnixStream,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, Resource, Rlimit, Signal, WaitOptions},
};

use super::{
    output::Output,
    procfs,
    record::{self, End, MARKER, RECORD, Record, STATE, State, WORK},
};

/// The mode of the supervisor; the instance's directory follows.
pub(super) const SUPERVISE: &str = "__instance-shim";
/// The mode between the supervisor and the program: limits itself, then becomes the program.
const BECOME: &str = "__instance-exec";

/// For how long a supervisor tries to get the lock that a manager may be looking at.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// For how long what was killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Call this first in `main`, before any thread is started: if this process was started to supervise an instance, it does that and never
/// returns; otherwise it returns at once.
pub fn run_if_requested() {
    let mut args = std::env::args_os().skip(1);
    let (Some(mode), Some(dir), None) = (args.next(), args.next(), args.next()) else { return };
    let result = if mode == SUPERVISE {
        supervise(Path::new(&dir))
    } else if mode == BECOME {
        Err(become_program(Path::new(&dir)))
    } else {
        return;
    };
    match result {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            // The supervisor's own goes nowhere, the program's is kept as its output.
            eprintln!("gauntlet: {error}");
            std::process::exit(126);
        }
    }
}

fn supervise(dir: &Path) -> io::Result<()> {
    close_inherited()?;
    // Fails only if it leads a group already, which then is as good.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    std::env::set_current_dir("/")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    // Not to be had: somebody else supervises it, or it was taken down before this began.
    let Some(_lock) = wait_for_lock(dir)? else { return Ok(()) };
    let Some(record) = record::read::<Record>(dir, RECORD)? else { return Ok(()) };
    let me = rustix::process::getpid().as_raw_nonzero().get();
    let shim = procfs::identify(me).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    let mut state = State { boot: procfs::boot(), shim, child: None, end: None };
    // From here on a SIGTERM is an order to end it, not the end of the supervisor.
    let (mut signals, stop) = listen()?;
    record::write(dir, STATE, &state, false)?;
    let end = match start(dir, &record) {
        Err(error) => End { how: format!("could not be started: {error}"), whole: true },
        Ok((child, pipe)) => {
            state.child = procfs::identify(child.as_raw_nonzero().get());
            record::write(dir, STATE, &state, false)?;
            let mut watch = Watch { child, pipe: Some(pipe), output: Output::begin(dir, record.launch.output)? };
            let how = watch.until_it_ends(&mut signals, &stop, record.launch.grace)?;
            let whole = watch.end_whole();
            End { how, whole }
        }
    };
    state.end = Some(end);
    record::write(dir, STATE, &state, false)
}

/// Closes what whoever started the manager left open: an instance must neither have it nor keep it open.
fn close_inherited() -> io::Result<()> {
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // Nothing here owns one yet; the listing's own is closed already, which is no matter.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

fn wait_for_lock(dir: &Path) -> io::Result<Option<File>> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match record::run_lock(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            other => return other,
        }
    }
}

/// A stream that becomes readable with SIGCHLD and SIGTERM, and whether it was SIGTERM.
fn listen() -> io::Result<(UnixStream, Arc<AtomicBool>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    signal_hook::flag::register(Signal::TERM.as_raw(), Arc::clone(&stop))?;
    signal_hook::low_level::pipe::register(Signal::TERM.as_raw(), write.try_clone()?)?;
    signal_hook::low_level::pipe::register(Signal::CHILD.as_raw(), write)?;
    Ok((read, stop))
}

fn start(dir: &Path, record: &Record) -> io::Result<(Pid, PipeReader)> {
    if record.version != record::VERSION {
        return Err(io::Error::other("the manager and its supervisor are not of the same release"));
    }
    let (reader, writer) = io::pipe()?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    let child = Command::new("/proc/self/exe")
        .arg(BECOME)
        .arg(dir)
        .env_clear()
        .env(MARKER, dir)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    Ok((pid.ok_or_else(|| io::Error::other("no process id"))?, reader))
}

struct Watch {
    child: Pid,
    pipe: Option<PipeReader>,
    output: Output,
}

impl Watch {
    /// Keeps output until the program has ended, by itself or because it was told to and its grace is over.
    fn until_it_ends(&mut self, signals: &mut UnixStream, stop: &AtomicBool, grace: Duration) -> io::Result<String> {
        let mut deadline = None;
        loop {
            let timeout = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
            self.wait(signals, timeout)?;
            let mut drain = [0; 64];
            while signals.read(&mut drain).is_ok_and(|read| read > 0) {}
            self.pump();
            if let Some(how) = self.reap() {
                return Ok(how);
            }
            if stop.load(Ordering::Acquire) && deadline.is_none() {
                deadline = Some(Instant::now() + grace);
                let _ = rustix::process::kill_process_group(self.child, Signal::TERM);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok("was stopped and did not end by itself".to_owned());
            }
        }
    }

    fn wait(&self, signals: &UnixStream, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        fds.extend(self.pipe.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps what was written since; no more than a pipe holds, so that a flood does not drown signals.
    fn pump(&mut self) {
        let mut buffer = [0; 8192];
        for _ in 0..8 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut buffer) {
                // A disk that is full must not stop the instance.
                Ok(read) if read > 0 => drop(self.output.keep(buffer.get(..read).unwrap_or_default())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Everybody closed it.
                _ => self.pipe = None,
            }
        }
    }

    /// Reaps whatever has ended; answers how the program did, if it was among them.
    fn reap(&self) -> Option<String> {
        let mut how = None;
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid == self.child {
                how = Some(describe(ExitStatus::from_raw(status.as_raw())));
            }
        }
        how
    }

    /// Kills whatever is left below, until nothing is; false if something would not go.
    fn end_whole(&mut self) -> bool {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let deadline = Instant::now() + KILL_PATIENCE;
        loop {
            self.reap();
            let left = procfs::descendants(me);
            for process in &left {
                if let Some(pid) = Pid::from_raw(process.pid) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            self.pump();
            if left.is_empty() || Instant::now() >= deadline {
                return left.is_empty();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) if signal == Signal::XCPU.as_raw() => "used up its CPU time".to_owned(),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or(0)),
    }
}

/// Limits this process and becomes the program; returns only if that fails.
fn become_program(dir: &Path) -> io::Error {
    let prepared = || -> io::Result<Record> {
        // If the supervisor is killed, nobody is left to end the instance whole: it goes too.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        rustix::thread::set_no_new_privs(true)?;
        let record = record::read::<Record>(dir, RECORD)?.ok_or_else(|| io::Error::other("its record is gone"))?;
        let limits = &record.launch.limits;
        limit(Resource::Core, Some(0))?;
        limit(Resource::Nofile, limits.open_files)?;
        limit(Resource::Cpu, limits.cpu_seconds)?;
        limit(Resource::As, limits.memory)?;
        Ok(record)
    };
    let Record { launch, .. } = match prepared() {
        Ok(record) => record,
        Err(error) => return error,
    };
    let error = Command::new(&launch.program)
        .args(&launch.args)
        .env_clear()
        .envs(&launch.env)
        .env(MARKER, dir)
        .current_dir(dir.join(WORK))
        .exec();
    io::Error::new(error.kind(), format!("{}: {error}", launch.program.display()))
}

fn limit(resource: Resource, wanted: Option<u64>) -> io::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    // Above what this process itself may have it cannot go.
    let allowed = rustix::process::getrlimit(resource).maximum.map_or(wanted, |most| most.min(wanted));
    Ok(rustix::process::setrlimit(resource, Rlimit { current: Some(allowed), maximum: Some(allowed) })?)
}
