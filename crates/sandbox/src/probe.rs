//! Which level this machine allows, found by trying.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Read as _, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    Failure, HostPaths, Level, ResourceLimits, Root, Spec, Stage, View, failure::StepExt as _, landlock_rules,
};

/// The first argument of a process that probes; the level and the user follow.
const PROBE: &str = "__sandbox-probe";
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The strongest level up to the ceiling that works.
    pub best: Level,
    /// Why stronger levels don't work, strongest first.
    pub refused: Vec<(Level, Failure)>,
    /// Whether the kernel has Landlock, which levels with namespaces use as a second line of defence.
    pub landlock: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer(Result<(), Failure>);

/// Runs the whole sequence of each level up to `ceiling`, strongest first, until one works. `supervisor` is a program whose `main` calls
/// [`run_if_requested`](crate::run_if_requested) first; `system` is [`Root::system`], and `uid` a user for level `uid`. Blocks for some
/// milliseconds, at most for a few seconds. `spawn` starts the processes that try.
pub fn probe(
    supervisor: &Path,
    system: &Path,
    uid: u32,
    ceiling: Level,
    spawn: impl Fn(&mut Command) -> io::Result<Child>,
) -> Probe {
    let mut refused = Vec::new();
    let mut best = Level::None;
    for level in Level::ALL.into_iter().filter(|level| *level <= ceiling) {
        match probe_level(supervisor, system, level, uid, &spawn) {
            Ok(()) => {
                best = level;
                break;
            }
            Err(failure) => refused.push((level, failure.explained(level))),
        }
    }
    Probe { best, refused, landlock: landlock_rules::is_available() }
}

impl Probe {
    /// Why the level doesn't work; `None` if it does, or if a stronger one does.
    pub fn refusal(&self, level: Level) -> Option<&Failure> {
        self.refused.iter().find(|(refused, _)| *refused == level).map(|(_, failure)| failure)
    }

    /// Why stronger levels than the best don't work, for the operator; empty if none is stronger.
    pub fn explanation(&self) -> String {
        let texts: Vec<_> = self.refused.iter().map(|(level, failure)| format!("{level}: {failure}")).collect();
        texts.join("; ")
    }
}

impl Failure {
    /// With the usual cause, if the error has one.
    fn explained(mut self, level: Level) -> Self {
        use rustix::io::Errno;
        let hint = if level == Level::Uid && self.step == "check for root" {
            "needs root"
        } else if self.step.starts_with("unshare") && self.is(Errno::PERM) {
            "not allowed here: kernel.unprivileged_userns_clone is 0, or a container's seccomp filter denies it"
        } else if self.step.starts_with("unshare") && self.is(Errno::NOSPC) {
            "user.max_user_namespaces is 0"
        } else if self.step == "mount proc" && self.is(Errno::PERM) {
            "a container that masks parts of /proc"
        } else if self.is(Errno::PERM) && level == Level::Userns {
            "AppArmor restricts user namespaces: kernel.apparmor_restrict_unprivileged_userns"
        } else {
            return self;
        };
        self.error = format!("{} ({hint})", self.error);
        self
    }
}

fn probe_level(
    supervisor: &Path,
    system: &Path,
    level: Level,
    uid: u32,
    spawn: impl Fn(&mut Command) -> io::Result<Child>,
) -> Result<(), Failure> {
    let step = "probe";
    let mut command = Command::new(supervisor);
    command
        .args([PROBE, level.name()])
        .arg(uid.to_string())
        .arg(system)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = spawn(&mut command).step(step)?;
    let text = read_to_end(&mut child);
    let _ = child.kill();
    let _ = child.wait();
    let answer = text.and_then(|text| Ok(serde_json::from_slice::<Answer>(&text)?));
    answer.step(step)?.0
}

/// Reads a child's output, at most for [`TIMEOUT`].
fn read_to_end(child: &mut Child) -> io::Result<Vec<u8>> {
    let mut output = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let (sender, text) = mpsc::channel();
    // Ends with the child, which the caller kills.
    std::thread::Builder::new().spawn(move || {
        let mut text = Vec::new();
        let read = output.read_to_end(&mut text);
        let _ = sender.send(read.map(|_| text));
    })?;
    text.recv_timeout(TIMEOUT).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Probes one level and exits, if this process was started for that; otherwise returns at once.
pub(crate) fn run_probe_if_requested() {
    let args: Vec<OsString> = std::env::args_os().skip(1).take(4).collect();
    let [mode, level, uid, system] = args.as_slice() else { return };
    if mode != PROBE {
        return;
    }
    let level = level.to_str().and_then(|level| level.parse().ok());
    let uid = uid.to_str().and_then(|uid| uid.parse().ok());
    let answer = match (level, uid) {
        (Some(level), Some(uid)) => try_level(level, Path::new(system), uid),
        _ => Err(Failure::new("probe", io::ErrorKind::InvalidInput)),
    };
    let text = serde_json::to_vec(&Answer(answer)).unwrap_or_default();
    let written = io::stdout().write_all(&text).and_then(|()| io::stdout().flush());
    std::process::exit(if written.is_ok() { 0 } else { 1 });
}

fn try_level(level: Level, system: &Path, uid: u32) -> Result<(), Failure> {
    let root = Root {
        system: system.to_owned(),
        binds: Vec::new(),
        size: Some(1 << 20),
        inodes: Some(64),
        hostname: "probe".to_owned(),
    };
    let view = if level.has_namespaces() { View::Root(root) } else { View::Host(HostPaths::default()) };
    let spec = Spec {
        program: None,
        args: Vec::new(),
        env: BTreeMap::new(),
        directory: "/".into(),
        limits: ResourceLimits::default(),
        view,
        uid,
    };
    let (mut running, _) = Stage::start(level)?.run(&spec, Vec::new(), None)?;
    let _ = rustix::process::waitpid(Some(running.pid()), rustix::process::WaitOptions::empty());
    let _ = running.exit();
    Ok(())
}
