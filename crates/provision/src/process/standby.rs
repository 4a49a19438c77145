//! Supervisors that are started before there is an instance for them.
//!
//! Starting a supervisor and the process that becomes the program takes longer than a small program takes to start. So a manager that has
//! launched an instance keeps one such pair waiting. If it is in use, a launch starts another pair.

use std::{
    ffi::OsStr,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use gauntlet_sandbox::Level;

use super::{cgroup::Groups, handover::Sender, ports, ready::StartedSupervisor, supervisor};

/// How long a supervisor that isn't needed may take to exit before it is killed.
const DISMISS_TIMEOUT: Duration = Duration::from_secs(1);
const DISMISS_PAUSE: Duration = Duration::from_millis(1);

/// At most one waiting supervisor. It exits when the last clone is dropped, or when the manager ends.
#[derive(Debug, Clone)]
pub(super) struct Standby {
    program: PathBuf,
    level: Level,
    /// Where supervisors create their control groups.
    groups: Option<Groups>,
    waiting: Arc<Mutex<Option<Waiting>>>,
}

impl Standby {
    /// Supervisors that wait can isolate an instance at `level`.
    pub(super) fn new(program: PathBuf, level: Level, groups: Option<Groups>) -> Self {
        Self { program, level, groups, waiting: Arc::default() }
    }

    /// Returns the waiting supervisor, or starts one; always for an instance at another level. Blocks.
    pub(super) fn take(&self, level: Level) -> io::Result<Waiting> {
        if level != self.level {
            return Waiting::start(&self.program, level, self.groups.as_ref());
        }
        let waiting = self.lock().take();
        if let Some(mut waiting) = waiting {
            if waiting.is_running() {
                return Ok(waiting);
            }
            // It was killed.
            self.groups.as_ref().inspect(|groups| groups.remove_abandoned());
        }
        Waiting::start(&self.program, self.level, self.groups.as_ref())
    }

    /// Starts a supervisor if none waits. Blocks.
    pub(super) fn refill(&self) {
        let mut waiting = self.lock();
        if waiting.is_none() {
            // On failure, the next launch starts its own and reports the error.
            *waiting = Waiting::start(&self.program, self.level, self.groups.as_ref()).ok();
        }
    }

    /// Dismisses the waiting supervisor, if there is one.
    pub(super) fn clear(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A supervisor that waits for an instance. Dropping it dismisses the supervisor.
#[derive(Debug)]
pub(super) struct Waiting(Option<(Child, Sender)>);

impl Waiting {
    fn start(program: &Path, level: Level, groups: Option<&Groups>) -> io::Result<Self> {
        let sender = Sender::new()?;
        let mut command = Command::new(program);
        command
            .args([supervisor::SUPERVISE, level.name()])
            .args(groups.map(Groups::to_argument))
            .env_clear()
            .stdin(sender.stdin()?)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self(Some((ports::spawn(&mut command)?, sender))))
    }

    fn is_running(&mut self) -> bool {
        self.0.as_mut().is_some_and(|(child, _)| matches!(child.try_wait(), Ok(None)))
    }

    /// Passes it the arguments of an instance and the descriptor of its held ports. From then on it outlives the manager.
    pub(super) fn assign(mut self, arguments: &[&OsStr], ports: Option<OwnedFd>) -> io::Result<StartedSupervisor> {
        let Some((child, sender)) = self.0.take() else {
            return Err(io::Error::other("the supervisor has an instance already"));
        };
        match sender.send(arguments, ports) {
            Ok(()) => Ok(StartedSupervisor(child)),
            Err(error) => {
                dismiss(child);
                Err(error)
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some((child, sender)) = self.0.take() else { return };
        drop(sender);
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(|| dismiss(child))),
            Err(_) => dismiss(child),
        }
    }
}

/// Reaps a supervisor whose sender was dropped; kills it if it doesn't exit in time. Blocks.
fn dismiss(mut child: Child) {
    let deadline = Instant::now() + DISMISS_TIMEOUT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(DISMISS_PAUSE),
            _ => return,
        }
    }
    let _ = child.kill().and_then(|()| child.wait());
}
