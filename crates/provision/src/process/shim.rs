//! The supervisor: one small process per instance, which outlives the manager that started it.
//!
//! It starts the instance's program, keeps its output, records how it ended, and when told to stop (SIGTERM) ends it whole: as the reaper
//! of orphans below it, it sees every descendant, whatever session or group that moved to. The instance is its first process: when that
//! ends, everything else of it is killed. Where the manager says so, the descendants are in a control group too, by which they are ended
//! should the supervisor be killed.
//!
//! It runs either as the program `gauntlet-shim` or as a hidden mode of a program whose `main` calls [`run_if_requested`] first.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions},
    io::{self, PipeReader, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::OpenOptionsExt as _,
            net::UnixStream,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, Resource, Rlimit, Signal, WaitOptions},
};

use super::{
    cgroup::Group,
    handover::{self, Sender},
    output::Output,
    ports::Held,
    procfs,
    record::{self, End, LOG, MARKER, ProcessId, RECORD, Record, STATE, State, WORK, Who},
};

/// The mode of the supervisor. It waits for its arguments: the instance's directory, the number of starts in a row, and the control group if
/// it is to have one; with them come the ports that are held for the instance.
pub(super) const SUPERVISE: &str = "__instance-shim";
/// The mode between the supervisor and the program: limits itself, then becomes the program. The supervisor's process id follows. It waits
/// for the instance's directory.
const BECOME: &str = "__instance-exec";

/// For how long a supervisor tries to get the lock that a manager may be looking at.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// For how long what was killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How often what does not end is looked for again.
const KILL_PAUSE: Duration = Duration::from_millis(10);
/// How often descendants are looked for that are not in the control group yet.
const GATHER_TRIES: usize = 100;
/// Between SIGXCPU, by which a program ends that does nothing about it, and SIGKILL.
const CPU_GRACE: u64 = 2;
/// The supervisor's log begins again above this size.
const LOG_BYTES: u64 = 16 << 10;

/// Call this first in `main`, before any thread is started: if this process was started to supervise an instance, it does that and never
/// returns; otherwise it returns at once.
pub fn run_if_requested() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match args.as_slice() {
        [mode] if mode == SUPERVISE => wait_for_instance(),
        [mode, supervisor] if mode == BECOME => become_program(supervisor),
        _ => return,
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

/// Adds a line to the supervisor's log.
fn note(dir: &Path, text: &str) {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join(LOG))?;
        if file.metadata()?.len() > LOG_BYTES {
            file.set_len(0)?;
        }
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        writeln!(file, "{}.{:03} {}{text}", at.as_secs(), at.subsec_millis(), record::log_prefix(std::process::id()))
    };
    // There is nowhere else to say that this failed.
    let _ = write();
}

/// A supervisor that has no instance yet, and what becomes the instance's program.
struct Prepared {
    me: i32,
    shim: ProcessId,
    boot: String,
    signals: UnixStream,
    stop: Arc<AtomicBool>,
    program: io::Result<Unassigned>,
}

fn wait_for_instance() -> io::Result<()> {
    let prepared = prepare();
    let Some((arguments, ports)) = handover::receive(io::stdin())? else {
        // Started ahead, and not needed.
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
    // Its standard error leads nowhere.
    supervised.inspect_err(|error| note(dir, &format!("failed: {error}")))
}

/// Everything that can be done before the instance is known.
fn prepare() -> io::Result<Prepared> {
    close_inherited()?;
    // Fails only if it leads a group already, which then is as good.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    std::env::set_current_dir("/")?;
    let me = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(me))?;
    let me = me.as_raw_nonzero().get();
    // From here on a SIGTERM is an order to end the instance, not the end of the supervisor.
    let (signals, stop) = listen()?;
    let shim = procfs::identify(me).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    Ok(Prepared { me, shim, boot: procfs::boot(), signals, stop, program: Unassigned::start(me) })
}

fn supervise(
    prepared: Prepared,
    dir: &Path,
    restarts: u32,
    cgroup: Option<PathBuf>,
    ports: Option<OwnedFd>,
) -> io::Result<()> {
    let Prepared { me, shim, boot, mut signals, stop, program } = prepared;
    // Not to be had: somebody else supervises it, or it was taken down before this began.
    let (Some(_lock), Some(record)) = (wait_for_lock(dir)?, record::read::<Record>(dir, RECORD)?) else {
        program.map(Unassigned::dismiss).ok();
        return Ok(());
    };
    // By it an operator finds the instance of a supervisor.
    std::env::set_current_dir(dir)?;
    let began = Instant::now();
    let started = program.and_then(|program| program.assign(dir, &record, ports));
    // The program is on its way meanwhile.
    let mut state = State { boot, shim, child: None, cgroup, gathered: false, restarts, end: None };
    let (how, whole) = match started {
        Err(error) => (format!("could not be started: {error}"), true),
        Ok((child, pipe)) => {
            state.child = procfs::identify(child.as_raw_nonzero().get());
            record::write(dir, STATE, &state)?;
            let group = state.cgroup.clone().map(Group::new);
            let output = Output::begin(dir, record.launch.output)?;
            let mut watch = Watch { dir, child, pipe: Some(pipe), output, group: group.clone(), silent: false };
            // Beside everything else: the kernel may take 10 ms and more for it.
            let gathering = group.map(|group| {
                let (dir, mut state) = (dir.to_owned(), state.clone());
                std::thread::Builder::new().spawn(move || gather(&dir, &mut state, &group, me))
            });
            let how = watch.until_it_ends(&mut signals, &stop, record.launch.grace)?;
            match gathering {
                Some(Ok(gathering)) => drop(gathering.join()),
                Some(Err(error)) => note(dir, &format!("cannot put the instance into its control group: {error}")),
                None => {}
            }
            let whole = watch.end_whole(me, &mut signals)?;
            (how, whole)
        }
    };
    let told = stop.load(Ordering::Acquire);
    state.end = Some(End { how, whole, told, after: began.elapsed() });
    record::write(dir, STATE, &state)
}

/// Puts everything that runs into its control group and records that. The program does not wait for it: what is not in the group yet is a
/// descendant all the same.
fn gather(dir: &Path, state: &mut State, group: &Group, me: i32) {
    let fill = || -> io::Result<bool> {
        group.renew(KILL_PATIENCE)?;
        // Twice nobody: one whose parent ended while the first look was taken is seen by the second.
        let mut looks = 0;
        for _ in 0..GATHER_TRIES {
            let there = group.processes()?;
            let missing: Vec<_> =
                procfs::descendants(me).into_iter().filter(|process| !there.contains(&process.pid)).collect();
            if missing.is_empty() {
                looks += 1;
                if looks == 2 {
                    return Ok(true);
                }
                continue;
            }
            looks = 0;
            missing.iter().try_for_each(|process| group.add(process.pid))?;
        }
        Ok(false)
    };
    let filled = fill().and_then(|all| {
        if !all {
            return Err(io::Error::other("it forks too fast"));
        }
        state.gathered = true;
        record::write(dir, STATE, state)
    });
    if let Err(error) = filled {
        note(dir, &format!("could not put all of the instance into its control group: {error}"));
    }
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
        match record::take_run_lock(dir, Who::Supervisor) {
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

/// The process that becomes the program, once it is given the instance's directory.
struct Unassigned {
    child: Pid,
    output: PipeReader,
    sender: Sender,
}

impl Unassigned {
    fn start(supervisor: i32) -> io::Result<Self> {
        let sender = Sender::new()?;
        let (output, writer) = io::pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let child = Command::new("/proc/self/exe")
            .arg(BECOME)
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

    /// Lets it become the program.
    fn assign(self, dir: &Path, record: &Record, ports: Option<OwnedFd>) -> io::Result<(Pid, PipeReader)> {
        if record.version != record::VERSION {
            self.dismiss();
            return Err(io::Error::other("the manager and its supervisor are not of the same release"));
        }
        self.sender.send(&[dir.as_os_str()], ports)?;
        Ok((self.child, self.output))
    }

    /// Ends it.
    fn dismiss(self) {
        drop(self.sender);
        let _ = rustix::process::waitpid(Some(self.child), WaitOptions::empty());
    }
}

struct Watch<'a> {
    dir: &'a Path,
    child: Pid,
    pipe: Option<PipeReader>,
    output: Output,
    group: Option<Group>,
    /// Output could not be kept, which has been noted.
    silent: bool,
}

impl Watch<'_> {
    /// Keeps output until the program has ended, by itself or because it was told to and its grace is over.
    fn until_it_ends(&mut self, signals: &mut UnixStream, stop: &AtomicBool, grace: Duration) -> io::Result<String> {
        let mut deadline = None;
        loop {
            let timeout = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
            self.wait(signals, timeout)?;
            self.pump();
            if let (Some(how), _) = self.reap() {
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

    /// Until a signal came, something was written, or that time is over.
    fn wait(&self, signals: &mut UnixStream, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let polled = {
            let mut fds = vec![PollFd::new(&*signals, PollFlags::IN)];
            fds.extend(self.pipe.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            rustix::event::poll(&mut fds, timeout.as_ref())
        };
        let mut drain = [0; 64];
        while signals.read(&mut drain).is_ok_and(|read| read > 0) {}
        match polled {
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
                Ok(read) if read > 0 => {
                    let kept = self.output.keep(buffer.get(..read).unwrap_or_default());
                    if let Err(error) = &kept
                        && !self.silent
                    {
                        note(self.dir, &format!("cannot keep the instance's output: {error}"));
                    }
                    self.silent = kept.is_err();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Everybody closed it.
                _ => self.pipe = None,
            }
        }
    }

    /// Reaps whatever has ended. Answers how the program did, if it was among them, and whether there is a child left.
    fn reap(&self) -> (Option<String>, bool) {
        let mut how = None;
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.child => {
                    how = Some(describe(ExitStatus::from_raw(status.as_raw())));
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return (how, true),
                Err(_) => return (how, false),
            }
        }
    }

    /// Kills whatever is left below, until nothing is; false if something would not go. Every descendant becomes a child when its parent
    /// ends: without a child there is no descendant.
    fn end_whole(&mut self, me: i32, signals: &mut UnixStream) -> io::Result<bool> {
        let deadline = Instant::now() + KILL_PATIENCE;
        while self.reap().1 {
            if Instant::now() >= deadline {
                note(self.dir, "could not end all of the instance");
                return Ok(false);
            }
            for process in procfs::descendants(me) {
                if let Some(pid) = Pid::from_raw(process.pid) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            // Without waiting if the kill was all that it took.
            if self.reap().1 {
                self.wait(signals, Some(KILL_PAUSE))?;
            }
            self.pump();
        }
        self.pump();
        let removed = match &self.group {
            Some(group) => group.end(deadline.saturating_duration_since(Instant::now())).map(drop),
            None => Ok(()),
        };
        if let Err(error) = &removed {
            note(self.dir, &format!("could not remove the control group: {error}"));
        }
        Ok(removed.is_ok())
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) if signal == Signal::XCPU.as_raw() => "used up its CPU time".to_owned(),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or(0)),
    }
}

/// Waits for the instance, limits this process and becomes the program; returns only if that fails, or there is no instance.
fn become_program(supervisor: &OsStr) -> io::Result<()> {
    // If the supervisor is killed, nobody is left to end the instance whole: it goes too.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.as_deref().map(OsStr::new) != Some(supervisor) {
        return Err(io::Error::other("its supervisor has ended"));
    }
    rustix::thread::set_no_new_privs(true)?;
    let Some((arguments, ports)) = handover::receive(io::stdin())? else { return Ok(()) };
    // Held until the program begins.
    let _held = ports.as_ref().map(Held::take_over);
    let dir = arguments.first().map(Path::new).ok_or(io::ErrorKind::InvalidInput)?;
    let Record { launch, .. } =
        record::read::<Record>(dir, RECORD)?.ok_or_else(|| io::Error::other("its record is gone"))?;
    limit(Resource::Core, Some(0), 0)?;
    limit(Resource::Nofile, launch.limits.open_files, 0)?;
    limit(Resource::Cpu, launch.limits.cpu_seconds, CPU_GRACE)?;
    limit(Resource::As, launch.limits.memory, 0)?;
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

/// The hard limit is above what is wanted by the `grace`.
fn limit(resource: Resource, wanted: Option<u64>, grace: u64) -> io::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    // Above what this process itself may have it cannot go.
    let most = rustix::process::getrlimit(resource).maximum;
    let allowed = |value: u64| Some(most.map_or(value, |most| most.min(value)));
    let (current, maximum) = (allowed(wanted), allowed(wanted.saturating_add(grace)));
    Ok(rustix::process::setrlimit(resource, Rlimit { current, maximum })?)
}
