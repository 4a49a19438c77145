//! Supervisors that were started before there is an instance for them.
//!
//! To start a supervisor and the process that becomes the program takes two thirds of a small instance's start. So a manager that has
//! launched an instance keeps one pair waiting for the next. Under load the pair is gone most of the time; then a launch starts one itself.

use std::{
    ffi::OsStr,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{handover::Sender, ports, ready::Shim, shim};

/// How long a supervisor that is not needed may take to end before it is killed.
const DISMISS_TIMEOUT: Duration = Duration::from_secs(1);
const DISMISS_PAUSE: Duration = Duration::from_millis(1);

/// At most one waiting supervisor. It ends when the last clone is dropped, or the manager ends.
#[derive(Debug, Clone)]
pub(super) struct Standby {
    program: PathBuf,
    waiting: Arc<Mutex<Option<Waiting>>>,
}

impl Standby {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, waiting: Arc::default() }
    }

    /// The waiting supervisor, or a new one. Blocks.
    pub(super) fn take(&self) -> io::Result<Waiting> {
        let waiting = self.lock().take();
        if let Some(mut waiting) = waiting
            && waiting.lives()
        {
            return Ok(waiting);
        }
        Waiting::start(&self.program)
    }

    /// Starts a supervisor that waits, if none does. Blocks.
    pub(super) fn refill(&self) {
        let mut waiting = self.lock();
        if waiting.is_none() {
            // Nothing depends on it: the next launch starts its own, and reports why it cannot.
            *waiting = Waiting::start(&self.program).ok();
        }
    }

    /// Ends the waiting supervisor, if there is one.
    pub(super) fn clear(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A supervisor that waits for its instance. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Waiting(Option<(Child, Sender)>);

impl Waiting {
    fn start(program: &Path) -> io::Result<Self> {
        let sender = Sender::new()?;
        let mut command = Command::new(program);
        command.arg(shim::SUPERVISE).env_clear().stdin(sender.stdin()?).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(Some((ports::spawn(&mut command)?, sender))))
    }

    fn lives(&mut self) -> bool {
        self.0.as_mut().is_some_and(|(child, _)| matches!(child.try_wait(), Ok(None)))
    }

    /// Gives it an instance, and what holds the instance's ports. It lives on.
    pub(super) fn assign(mut self, arguments: &[&OsStr], ports: Option<OwnedFd>) -> io::Result<Shim> {
        let Some((child, sender)) = self.0.take() else { return Err(io::Error::other("assigned already")) };
        match sender.send(arguments, ports) {
            Ok(()) => Ok(Shim(child)),
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

/// Waits until a supervisor whose sender was dropped has ended. Blocks.
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
