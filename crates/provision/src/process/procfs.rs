//! Reads processes from `/proc`, signals and reaps them.
//!
//! The `procfs` crate isn't used: it opens each process's directory before the file in it, parses all 52 fields of `stat` where five are needed,
//! and reads the list of children for one thread at a time only. Most of this module (pidfds, signals, killing marked processes) isn't in it.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

use super::record::{MARKER, ProcessId, State};

/// The fields of `/proc/<pid>/stat` that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: i32,
    pub(super) parent: i32,
    pub(super) group: i32,
    pub(super) session: i32,
    pub(super) start: u64,
    pub(super) zombie: bool,
}

/// The id of this boot.
pub(super) fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Reads a process; `None` if it doesn't exist.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The process name in the second field may contain parentheses and spaces, so parsing starts after the last parenthesis.
fn parse(pid: i32, text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        pid,
        zombie: matches!(*fields.first()?, "Z" | "X"),
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start: fields.get(19)?.parse().ok()?,
    })
}

/// All visible processes. The cost depends on the whole machine, so it is used only for a killed supervisor.
fn all() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| stat(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Whether this kernel lists the children of a process.
pub(super) fn lists_children() -> bool {
    let me = std::process::id();
    Path::new(&format!("/proc/{me}/task/{me}/children")).exists()
}

/// All living descendants of a process. Reads only their files.
pub(super) fn descendants(root: i32) -> Vec<Stat> {
    let mut found = Vec::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        for child in children(pid) {
            next.push(child);
            found.extend(stat(child).filter(|stat| !stat.zombie));
        }
    }
    found
}

/// The children of all threads of a process.
fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = threads.flatten().filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// The process with that id, with its start time.
pub(super) fn identify(pid: i32) -> Option<ProcessId> {
    stat(pid).map(|stat| ProcessId { pid, start: stat.start })
}

/// Whether the process still runs. A zombie doesn't.
pub(super) fn is_running(id: ProcessId) -> bool {
    stat(id.pid).is_some_and(|stat| stat.start == id.start && !stat.zombie)
}

/// Opens a pidfd, which becomes readable when the process exits; `None` if it has exited. It never refers to a later process with that id.
pub(super) fn open_pidfd(id: ProcessId) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(id.pid) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // Checked after opening: the descriptor can't change to another process.
        Ok(fd) => Ok(is_running(id).then_some(fd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Signals the process of a pidfd. Succeeds if it has exited.
pub(super) fn send_signal(process: impl AsFd, signal: Signal) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(process, signal) {
        Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Kills the process and waits until it has exited. Succeeds if it has exited already. Blocks.
pub(super) fn kill(id: ProcessId, timeout: Duration) -> io::Result<()> {
    let deadline = Instant::now() + timeout;
    let Some(process) = open_pidfd(id)? else { return Ok(()) };
    send_signal(&process, Signal::KILL)?;
    while is_running(id) {
        if Instant::now() >= deadline {
            return Err(io::Error::other(format!("process {} does not exit", id.pid)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Reaps the process if it is a child of this one and has exited.
pub(super) fn reap(id: ProcessId) {
    if let Some(pid) = Pid::from_raw(id.pid).filter(|_| stat(id.pid).is_some_and(|stat| stat.start == id.start)) {
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Kills the processes that a killed supervisor has left: those with the instance's environment variable, or in its process group and session.
/// Returns how many there were. Blocks.
pub(super) fn kill_marked(dir: &Path, state: &State, timeout: Duration) -> io::Result<usize> {
    let deadline = Instant::now() + timeout;
    let marker = [MARKER.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
    let mut killed = 0;
    loop {
        let left: Vec<Stat> = all().into_iter().filter(|stat| !stat.zombie && belongs(stat, &marker, state)).collect();
        if left.is_empty() {
            return Ok(killed);
        }
        if Instant::now() >= deadline {
            let pids: Vec<String> = left.iter().map(|stat| stat.pid.to_string()).collect();
            return Err(io::Error::other(format!("processes {} do not exit", pids.join(", "))));
        }
        for stat in left {
            killed += 1;
            if let Some(process) = open_pidfd(ProcessId { pid: stat.pid, start: stat.start })? {
                send_signal(process, Signal::KILL)?;
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn belongs(stat: &Stat, marker: &[u8], state: &State) -> bool {
    let in_group = state.child.is_some_and(|child| {
        stat.session == child.pid && stat.group == child.pid && stat.start >= state.supervisor.start
    });
    in_group
        || fs::read(format!("/proc/{}/environ", stat.pid))
            .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == marker))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn process_name_cannot_forge_fields() {
        let text = "7 (a) R 1 1 (b) S 3 4 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0";
        let stat = parse(7, text).unwrap();
        assert_eq!((stat.parent, stat.group, stat.session, stat.start, stat.zombie), (3, 4, 5, 99, false));
        assert_eq!(parse(7, "nonsense"), None);
    }

    #[test]
    fn start_time_distinguishes_processes_with_one_id() {
        let me = identify(std::process::id() as i32).unwrap();
        assert!(is_running(me));
        assert!(!is_running(ProcessId { start: me.start + 1, ..me }));
        assert!(!boot().is_empty());
    }
}
