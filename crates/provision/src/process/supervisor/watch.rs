//! Watches the program of an instance, and ends everything that it has started.

use std::{
    io::{self, PipeReader, Read as _},
    os::unix::{net::UnixStream, process::ExitStatusExt as _},
    path::Path,
    process::ExitStatus,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use gauntlet_sandbox as sandbox;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, Signal, WaitOptions},
};

use super::{log::append_log, program::Program};
use crate::process::{
    cgroup::{Group, Usage},
    output::Output,
    procfs,
    record::Exit,
};

/// How long killed processes may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between kills of processes that don't exit.
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// The running instance.
pub(super) struct Watch<'a> {
    dir: &'a Path,
    program: Program,
    /// The program's output, until every process has closed it.
    pipe: Option<PipeReader>,
    output: Output,
    group: Option<Group>,
    /// The last write of output failed, which has been logged.
    output_failed: bool,
    /// Why the instance was stopped, if its ports could not be forwarded.
    failure: Option<String>,
    /// What the group's processes had used before the group was removed.
    usage: Usage,
}

impl<'a> Watch<'a> {
    pub(super) fn new(dir: &'a Path, program: Program, pipe: PipeReader, output: Output, group: Option<Group>) -> Self {
        let (output_failed, failure, usage) = (false, None, Usage::default());
        Self { dir, program, pipe: Some(pipe), output, group, output_failed, failure, usage }
    }

    /// Keeps output until the program exits, or until its grace period after a stop request is over. Returns how the program exited, if it did.
    pub(super) fn until_exit(
        &mut self,
        signals: &mut UnixStream,
        stop: &AtomicBool,
        grace: Duration,
    ) -> io::Result<Option<Exit>> {
        let mut deadline = None;
        loop {
            let timeout = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
            self.wait(signals, timeout)?;
            self.copy_output();
            if let (Some(exit), _) = self.reap() {
                return Ok(Some(exit));
            }
            if self.forwarder_has_ended() {
                let error = self.program.forwarder_error().unwrap_or_default();
                self.failure = Some(format!("was stopped, because its ports could not be forwarded: {error}"));
                return Ok(None);
            }
            if stop.load(Ordering::Acquire) && deadline.is_none() {
                deadline = Some(Instant::now() + grace);
                self.program.terminate();
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
        }
    }

    /// Waits for a signal or output, at most for `timeout`.
    fn wait(&mut self, signals: &mut UnixStream, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let polled = {
            let mut fds = vec![PollFd::new(&*signals, PollFlags::IN)];
            fds.extend(self.pipe.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            fds.extend(self.program.forwarder().map(|forwarder| PollFd::new(&*forwarder, PollFlags::IN)));
            rustix::event::poll(&mut fds, timeout.as_ref())
        };
        let mut drain = [0; 64];
        while signals.read(&mut drain).is_ok_and(|read| read > 0) {}
        match polled {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn forwarder_has_ended(&mut self) -> bool {
        let Some(forwarder) = self.program.forwarder() else { return false };
        let mut fds = [PollFd::new(forwarder, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Passes on what the program sent before it ended. Blocks for a second at most.
    pub(super) fn drain(&mut self) {
        self.program.drain();
    }

    /// Copies the output that is available, at most what a pipe holds, so that a flood of output doesn't delay signals.
    fn copy_output(&mut self) {
        let mut buffer = [0; 8192];
        for _ in 0..8 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut buffer) {
                // A full disk must not stop the instance.
                Ok(read) if read > 0 => {
                    let written = self.output.write(buffer.get(..read).unwrap_or_default());
                    if let Err(error) = &written
                        && !self.output_failed
                    {
                        append_log(self.dir, &format!("cannot keep the instance's output: {error}"));
                    }
                    self.output_failed = written.is_err();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // All processes have closed it.
                _ => self.pipe = None,
            }
        }
    }

    /// Reaps every child that has exited. Returns how the program exited, if it was one of them, and whether a child is left.
    fn reap(&mut self) -> (Option<Exit>, bool) {
        let mut exit = None;
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.program.pid() => {
                    exit = Some(match self.program.exit() {
                        Some(sandbox::Exit::Code(code)) => Exit::Code(code),
                        Some(sandbox::Exit::Signal(signal)) => Exit::Signal(signal),
                        None => exit_of(ExitStatus::from_raw(status.as_raw())),
                    });
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return (exit, true),
                Err(_) => return (exit, false),
            }
        }
    }

    /// How the instance ended, for the operator.
    pub(super) fn reason(&self, exit: Option<Exit>) -> String {
        self.failure.clone().unwrap_or_else(|| describe(exit))
    }

    /// What the instance used; known once its descendants were killed.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// Kills all descendants of the supervisor `pid` and removes the control group. Returns false if that fails.
    ///
    /// A descendant becomes a child of the supervisor when its parent exits, so there is no descendant left once there is no child.
    pub(super) fn kill_descendants(&mut self, pid: i32, signals: &mut UnixStream) -> io::Result<bool> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        while self.reap().1 {
            if Instant::now() >= deadline {
                append_log(self.dir, "could not kill all processes of the instance");
                return Ok(false);
            }
            for process in procfs::descendants(pid) {
                if let Some(pid) = Pid::from_raw(process.pid) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            // Often they have exited already.
            if self.reap().1 {
                self.wait(signals, Some(KILL_PAUSE))?;
            }
            self.copy_output();
        }
        self.copy_output();
        self.usage = self.group.as_ref().map_or(Usage::default(), Group::usage);
        let removed = match &self.group {
            Some(group) => group.kill(deadline.saturating_duration_since(Instant::now())).map(drop),
            None => Ok(()),
        };
        if let Err(error) = &removed {
            append_log(self.dir, &format!("could not remove the control group: {error}"));
        }
        Ok(removed.is_ok())
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    status.code().map_or_else(|| Exit::Signal(status.signal().unwrap_or(0)), Exit::Code)
}

/// How a program ended, for the operator.
fn describe(exit: Option<Exit>) -> String {
    match exit {
        None => "was stopped and did not exit in time".to_owned(),
        Some(Exit::Code(code)) => format!("ended with exit status {code}"),
        Some(Exit::Signal(signal)) if signal == Signal::XCPU.as_raw() => "used up its CPU time".to_owned(),
        Some(Exit::Signal(signal)) => format!("was ended by signal {signal}"),
    }
}
