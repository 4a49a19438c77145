//! Commands that take minutes: they write their output to a log, report progress and can be cancelled.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::process::spawn_bound;
use crate::{Doing as _, Error, Progress, Result, tail};

/// Whether the command runs and exits with status 0.
pub(super) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// What happens to a command when the caller cancels it, or this process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnCancel {
    /// It is killed, with every process that it started.
    Kill,
    /// It runs to its end: for commands that must not be interrupted.
    Wait,
}

/// A command that takes long.
#[derive(Debug, Clone, Copy)]
pub(super) struct LongCommand<'a> {
    /// What it does, for progress and errors, such as `building etcd`.
    pub(super) what: &'a str,
    /// How long it usually takes, for a person.
    pub(super) usual: &'a str,
    /// The file that receives its output.
    pub(super) log: &'a Path,
    pub(super) on_cancel: OnCancel,
}

impl LongCommand<'_> {
    /// Runs the command. Reports progress after two seconds, then every fifteen, and at the end if it has reported before.
    ///
    /// # Errors
    /// [`Error::Build`] if the command fails, [`Error::Cancelled`] if the caller cancelled it, and [`Error::Io`].
    pub(super) fn run(self, mut command: Command, progress: &mut dyn Progress) -> Result<()> {
        let LongCommand { what, usual, log, on_cancel } = self;
        let out = File::create(log).doing(|| format!("create {}", log.display()))?;
        let errors = out.try_clone().doing(|| format!("create {}", log.display()))?;
        // In a process group of its own, Ctrl-C doesn't reach the command, and a kill reaches every process that it started.
        command.stdout(out).stderr(errors).process_group(0);
        let started = Instant::now();
        let mut child = match on_cancel {
            OnCancel::Kill => spawn_bound(command),
            OnCancel::Wait => command.spawn(),
        }
        .doing(|| format!("{what}: start the command"))?;
        let mut next_report = Duration::from_secs(2);
        let mut is_cancelled = false;
        let status = loop {
            if let Some(status) = child.try_wait().doing(|| format!("{what}: wait for the command"))? {
                break status;
            }
            if progress.cancelled() && !is_cancelled {
                is_cancelled = true;
                match on_cancel {
                    OnCancel::Kill => {
                        // Also kills the compilers that the command started.
                        if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                        }
                    }
                    OnCancel::Wait => {
                        progress.report(&format!("{what}: must not be interrupted; waiting until it is done"))
                    }
                }
            }
            let elapsed = started.elapsed();
            if elapsed >= next_report {
                match elapsed.as_secs() {
                    0..5 => progress.report(&format!("{what} ({usual}; log: {})", log.display())),
                    seconds => progress.report(&format!("{what}: {seconds} s so far")),
                }
                next_report = elapsed + Duration::from_secs(15);
            }
            thread::sleep(Duration::from_millis(100));
        };
        if is_cancelled {
            return Err(Error::Cancelled);
        }
        if !status.success() {
            return Err(Error::Build {
                what: what.to_owned(),
                status: status.to_string(),
                log: log.to_path_buf(),
                tail: tail(log),
            });
        }
        if started.elapsed() >= Duration::from_secs(2) {
            progress.report(&format!("{what}: done in {} s", started.elapsed().as_secs()));
        }
        Ok(())
    }
}
