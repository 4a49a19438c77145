//! What the kernel says about processes.

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

/// One process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: i32,
    pub(super) parent: i32,
    pub(super) group: i32,
    pub(super) session: i32,
    pub(super) start: u64,
    pub(super) zombie: bool,
}

/// This boot's name.
pub(super) fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// One process, if it is there.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in the second field may hold anything, parentheses and spaces too: what counts begins after the last parenthesis.
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

/// Every process that can be seen. What this costs grows with the machine: no call of the provisioner waits for it, but for one that finds a
/// supervisor killed.
fn all() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| stat(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Whether this kernel says which children a process has.
pub(super) fn lists_children() -> bool {
    let me = std::process::id();
    Path::new(&format!("/proc/{me}/task/{me}/children")).exists()
}

/// Every living process below that one, however deep. Reads of these alone.
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

/// The process of that number, with its start.
pub(super) fn identify(pid: i32) -> Option<ProcessId> {
    stat(pid).map(|stat| ProcessId { pid, start: stat.start })
}

/// Whether it still runs.
pub(super) fn lives(id: ProcessId) -> bool {
    stat(id.pid).is_some_and(|stat| stat.start == id.start && !stat.zombie)
}

/// A descriptor of that very process and of no later one of its number; `None` if it has ended. Readable once it ends.
pub(super) fn open(id: ProcessId) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(id.pid) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // Asked after the descriptor is taken: what it names cannot change any more.
        Ok(fd) => Ok(lives(id).then_some(fd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Signals the process of a descriptor; one that has ended is success.
pub(super) fn signal(process: impl AsFd, signal: Signal) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(process, signal) {
        Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets go of a child of this process that has ended; of what is not its child, or still runs, nothing changes.
pub(super) fn reap(id: ProcessId) {
    if let Some(pid) = Pid::from_raw(id.pid).filter(|_| stat(id.pid).is_some_and(|stat| stat.start == id.start)) {
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Kills what a supervisor that was itself killed has left: whatever carries the instance's marker, or is still of its process group and
/// session. Answers how many were found.
pub(super) fn sweep(dir: &Path, state: &State, patience: Duration) -> io::Result<usize> {
    let deadline = Instant::now() + patience;
    let marker = [MARKER.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
    let mut swept = 0;
    loop {
        let left: Vec<Stat> = all().into_iter().filter(|stat| !stat.zombie && belongs(stat, &marker, state)).collect();
        if left.is_empty() {
            return Ok(swept);
        }
        if Instant::now() >= deadline {
            let pids: Vec<String> = left.iter().map(|stat| stat.pid.to_string()).collect();
            return Err(io::Error::other(format!("processes {} do not end", pids.join(", "))));
        }
        for stat in left {
            swept += 1;
            if let Some(process) = open(ProcessId { pid: stat.pid, start: stat.start })? {
                signal(process, Signal::KILL)?;
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn belongs(stat: &Stat, marker: &[u8], state: &State) -> bool {
    let ours = state.child.is_some_and(|child| {
        stat.session == state.shim.pid && stat.group == child.pid && stat.start >= state.shim.start
    });
    ours || fs::read(format!("/proc/{}/environ", stat.pid))
        .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == marker))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_name_cannot_forge_fields() {
        let text = "7 (a) R 1 1 (b) S 3 4 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0";
        let stat = parse(7, text).unwrap();
        assert_eq!((stat.parent, stat.group, stat.session, stat.start, stat.zombie), (3, 4, 5, 99, false));
        assert_eq!(parse(7, "nonsense"), None);
    }

    #[test]
    fn this_process_lives_and_another_of_its_number_does_not() {
        let me = identify(std::process::id() as i32).unwrap();
        assert!(lives(me));
        assert!(!lives(ProcessId { start: me.start + 1, ..me }));
        assert!(!boot().is_empty());
    }
}
