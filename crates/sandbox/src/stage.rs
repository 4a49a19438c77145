//! The stage: enters the namespaces, starts the program, and reaps what it leaves.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
};

use nix::sched::CloneFlags;
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions};

use crate::{
    Exit, Failure, Level, Root, Spec, View,
    control::{Report, Request, StageEnd},
    failure::StepExt as _,
    privileges,
    probe::run_probe_if_requested,
    program::{self, Restrictions},
    root, sys,
};

/// The first argument of a stage; the level follows.
pub(crate) const STAGE: &str = "__sandbox-stage";
/// The status of a process that could not start its program.
const FAILED: i32 = 126;

/// Runs as a stage and never returns, if this process was started for that; otherwise returns at once. Call it first in `main`, before any
/// thread is started.
pub fn run_if_requested() {
    run_probe_if_requested();
    let args: Vec<OsString> = std::env::args_os().skip(1).take(2).collect();
    let [mode, level] = args.as_slice() else { return };
    if mode != STAGE {
        return;
    }
    let ended =
        level.to_str().and_then(|level| level.parse().ok()).ok_or(io::ErrorKind::InvalidInput.into()).and_then(run);
    std::process::exit(if ended.is_ok() { 0 } else { FAILED });
}

fn run(level: Level) -> io::Result<()> {
    // Otherwise it would be named like the descriptor that it was started from.
    rustix::thread::set_name(c"gauntlet-init")?;
    let mut control = StageEnd::from_stdin()?;
    if !level.has_namespaces() {
        // Without its supervisor, nothing would end the whole sandbox. The stages with namespaces set it later: a change of ids clears it.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let Some((spec, hold)) = control.receive_spec()? else { return Ok(()) };
    let result = match &spec.view {
        View::Root(root) if level.has_namespaces() => run_in_namespaces(level, &spec, root, hold, &mut control),
        View::Host(_) if !level.has_namespaces() => run_on_host(level, &spec, hold, &control),
        _ => Err(Failure::new("check the specification", io::Error::other("its view doesn't fit the level"))),
    };
    if let Err(failure) = &result {
        control.send(&Report::Failed(failure.clone()))?;
    }
    result.map_err(io::Error::from)
}

/// Becomes the program. Everything that the stage holds is closed then.
fn run_on_host(level: Level, spec: &Spec, hold: Vec<OwnedFd>, control: &StageEnd) -> Result<(), Failure> {
    control.check_connected().step("check the supervisor")?;
    let executed = program::execute(spec, Restrictions::of(level));
    drop(hold);
    executed.map(drop)
}

fn run_in_namespaces(
    level: Level,
    spec: &Spec,
    root: &Root,
    hold: Vec<OwnedFd>,
    control: &mut StageEnd,
) -> Result<(), Failure> {
    enter(level, spec, root, control)?;
    let (mut failed, mut report) = io::pipe().step("create a pipe")?;
    let Some(child) = sys::fork().step("fork")? else {
        let executed = program::execute(spec, Restrictions::of(level));
        if let Err(failure) = &executed {
            let text = serde_json::to_vec(failure).unwrap_or_default();
            let _ = report.write_all(&text);
        }
        std::process::exit(if executed.is_ok() { 0 } else { FAILED });
    };
    drop(report);
    // The output ends when the program and its children have closed it.
    let null = File::options().write(true).open("/dev/null").step("open /dev/null")?;
    rustix::stdio::dup2_stdout(&null).step("replace standard output")?;
    rustix::stdio::dup2_stderr(&null).step("replace standard error")?;
    privileges::clear_capabilities()?;
    let mut text = Vec::new();
    failed.read_to_end(&mut text).step("wait for the program")?;
    if !text.is_empty() {
        let unknown = |error| Failure::new("start the program", io::Error::other(error));
        return Err(serde_json::from_slice(&text).unwrap_or_else(unknown));
    }
    control.send(&Report::Started).step("report the start")?;
    let requests = control.try_clone().step("clone the control socket")?;
    std::thread::Builder::new().spawn(move || serve(requests)).step("start a thread")?;
    let exit = reap_until_exit(child).step("wait for the program")?;
    control.send(&Report::Ended(exit)).step("report the end")?;
    // The supervisor's `hold` ends with this process, and with it every process of the namespace.
    drop(hold);
    Ok(())
}

/// Enters the namespaces and the root, and becomes the inner user.
fn enter(level: Level, spec: &Spec, root: &Root, control: &mut StageEnd) -> Result<(), Failure> {
    let (owner, has_groups) = if level == Level::Uid { (spec.uid, true) } else { (0, false) };
    if has_groups {
        rustix::thread::set_thread_groups(&[]).step("drop groups")?;
    }
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP;
    nix::sched::unshare(namespaces).step("unshare mount, ipc, uts and cgroup namespaces")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let sysctls = root::enter(root, owner)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER).step("unshare user namespace")?;
    control.send(&Report::NeedsIds).step("ask for ids")?;
    control.wait_for_ids().step("wait for ids")?;
    privileges::set_ids(root::INNER_ID)?;
    // Nested ones would bring capabilities back.
    sysctls.write("user/max_user_namespaces", 0)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("set the death signal")?;
    // The supervisor may have exited before that.
    control.check_connected().step("check the supervisor")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("hide this process")
}

/// Serves the supervisor's requests. Without a supervisor, ends this process, and with it the sandbox.
fn serve(mut control: StageEnd) {
    while let Ok(Some(request)) = control.receive() {
        if request == Request::Terminate as u8 {
            // Reaches every process of the namespace but this one.
            let _ = rustix::process::kill_process_group(Pid::INIT, Signal::TERM);
        }
    }
    std::process::exit(FAILED);
}

/// Reaps every process that exits, until the program does.
fn reap_until_exit(program: Pid) -> io::Result<Exit> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == program => {
                return Ok(match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Exit::Code(code),
                    (None, signal) => Exit::Signal(signal.unwrap_or(0)),
                });
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
