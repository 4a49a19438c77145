//! The files that record an instance.
//!
//! A file is replaced by writing a new one and renaming it, so that a reader sees either the old content or the new.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use gauntlet_domain::{ChallengeId, Identity, Limits, Probe, Readiness};
use gauntlet_sandbox::{Level, ResourceLimits, View};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use super::{
    cgroup::{Group, Usage},
    exceeded::Exceeded,
};

/// The version of the [`Record`] format; a supervisor rejects any other.
pub(super) const VERSION: u32 = 2;

/// The environment variable that marks every process of an instance without a PID namespace with the instance's directory. A key alone is
/// ambiguous if the machine has several directories of instances.
pub(super) const MARKER: &str = "GAUNTLET_INSTANCE";

pub(super) const LABEL: &str = "label.json";
pub(super) const RECORD: &str = "instance.json";
pub(super) const STATE: &str = "state.json";
pub(super) const READY: &str = "ready";
/// Errors of the supervisor.
pub(super) const LOG: &str = "supervisor.log";
pub(super) const WORK: &str = "work";

/// The directory of supervisor locks, beside the directory of instances.
pub(super) const RUN: &str = "run";

/// The directory of user ids, beside the directory of instances.
pub(super) const UIDS: &str = "uids";

/// The name of an instance's directory. A challenge's id may be any text, so the path contains only its hash.
pub(super) fn key(challenge: &ChallengeId, identity: &Identity) -> String {
    format!("{}-{identity}", hash(challenge.as_str().as_bytes()))
}

/// The first 16 hexadecimal digits of the SHA-256 hash.
pub(super) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The part between time and text in a line of the supervisor's log.
pub(super) fn log_prefix(pid: u32) -> String {
    format!("supervisor {pid} ")
}

/// The identity of an instance, its generation and its reservation. It is the first file written and the last one deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Label {
    pub(super) challenge: String,
    pub(super) identity: String,
    /// The highest generation that was requested.
    pub(super) generation: u64,
    /// The instance was removed. The label is kept for a while to fence older requests.
    pub(super) gone: bool,
    /// The reserved ports, whether or not the instance was launched with them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) ports: BTreeMap<String, u16>,
}

/// What the supervisor runs. It contains secrets, so only the owner can read its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) launch: Launch,
}

/// A completely resolved launch plan. An instance that runs from an equal one needs no restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Launch {
    /// How strongly the instance is isolated. Paths are as it sees them.
    pub(super) isolation: Level,
    pub(super) view: View,
    pub(super) directory: PathBuf,
    pub(super) resource_limits: ResourceLimits,
    /// The first and the last user id that the instance may have.
    pub(super) uids: (u32, u32),
    pub(super) program: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    #[serde(with = "LimitsForm")]
    pub(super) limits: Limits,
    pub(super) output: u64,
    pub(super) grace: Duration,
    #[serde(with = "ReadinessForm")]
    pub(super) readiness: Readiness,
    pub(super) connection_info: String,
    pub(super) flags: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Limits")]
struct LimitsForm {
    memory: Option<u64>,
    processes: Option<u64>,
    cpu_quota: Option<u64>,
    disk: Option<u64>,
    cpu_seconds: Option<u64>,
    open_files: Option<u64>,
    output: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Readiness")]
struct ReadinessForm {
    #[serde(with = "ProbeForm")]
    probe: Probe,
    interval: Duration,
    timeout: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Probe", rename_all = "lowercase")]
enum ProbeForm {
    Tcp { port: String },
    Http { port: String, path: String, status: u16 },
    Output { contains: String },
}

/// The supervisor's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The id of the boot; process ids of another boot are meaningless.
    pub(super) boot: String,
    #[serde(rename = "shim")]
    pub(super) supervisor: ProcessId,
    /// The instance's first process: process 1 of its sandbox, or the program.
    pub(super) child: Option<ProcessId>,
    /// How strongly the instance is isolated.
    #[serde(default = "no_isolation")]
    pub(super) isolation: Level,
    /// The instance's control group, if it has one: all of its processes are in it.
    #[serde(default)]
    pub(super) group: Option<Group>,
    /// How many times in a row the instance had ended on its own soon after its start, before this start.
    pub(super) restarts: u32,
    pub(super) end: Option<End>,
}

/// The isolation of instances that an earlier release has started.
fn no_isolation() -> Level {
    Level::None
}

/// A process, distinguished from later ones with the same id by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: i32,
    /// The start time, in clock ticks since boot.
    pub(super) start: u64,
}

/// How an instance ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct End {
    /// For the operator, such as "ended with exit status 3".
    #[serde(rename = "how")]
    pub(super) reason: String,
    /// Whether no process is left.
    #[serde(rename = "whole")]
    pub(super) complete: bool,
    /// Whether a manager stopped it.
    #[serde(rename = "told")]
    pub(super) requested: bool,
    /// How long it ran.
    #[serde(rename = "after")]
    pub(super) ran_for: Duration,
    /// How its program exited; `None` if it did not start, or was killed because it did not stop in time.
    #[serde(default)]
    pub(super) exit: Option<Exit>,
    /// What it used.
    #[serde(default)]
    pub(super) usage: Usage,
    /// The limits that it reached.
    #[serde(default)]
    pub(super) exceeded: Vec<Exceeded>,
    /// A manager has counted these.
    #[serde(default)]
    pub(super) counted: bool,
}

/// How a program exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Exit {
    /// With this exit status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Reads a file; `None` if it doesn't exist.
pub(super) fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    match std::fs::read(dir.join(name)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a file. It survives a power cut once the file and its directory are synced ([`sync`]).
pub(super) fn write<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    replace(dir, name, value, false)
}

/// Replaces a file such that a power cut leaves either the old content or the new.
pub(super) fn rewrite<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    replace(dir, name, value, dir.join(name).exists())
}

fn replace<T: Serialize>(dir: &Path, name: &str, value: &T, synced: bool) -> io::Result<()> {
    let beside = dir.join(format!("{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    if synced {
        file.sync_all()?;
    }
    std::fs::rename(&beside, dir.join(name))
}

/// Syncs a file or a directory.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    tests::SYNCED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(path.to_owned());
    File::open(path)?.sync_all()
}

/// Syncs several files and directories, in parallel: the file system can then serve them with one flush instead of one for each.
pub(super) fn sync_all(paths: &[PathBuf]) -> io::Result<()> {
    let Some((first, others)) = paths.split_first() else { return Ok(()) };
    std::thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter()
            .map(|path| (path, std::thread::Builder::new().spawn_scoped(scope, move || sync(path))))
            .collect();
        threads.into_iter().fold(sync(first), |synced, (path, thread)| {
            let also = match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread that syncs panicked"))),
                Err(_) => sync(path),
            };
            synced.and(also)
        })
    })
}

/// Removes a file. Succeeds if it doesn't exist.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The supervisor lock of an instance. All locks are in one directory, so that one inotify watch covers them.
pub(super) fn supervisor_lock_path(dir: &Path) -> PathBuf {
    let (top, key) = (dir.parent().and_then(Path::parent), dir.file_name());
    top.unwrap_or(dir).join(RUN).join(key.unwrap_or_default())
}

/// Takes the lock that a supervisor holds while it lives; `None` if another process holds it. Only the holder has the file open, so the lock is
/// released as soon as the holder exits, for whatever reason.
///
/// Only a supervisor opens the file for writing: closing it then is the event that the inotify watch reports.
pub(super) fn try_supervisor_lock(dir: &Path, role: LockRole) -> io::Result<Option<File>> {
    let path = supervisor_lock_path(dir);
    let access = match role {
        LockRole::Supervisor => OFlags::WRONLY,
        LockRole::Manager => OFlags::RDONLY,
    };
    let mode = Mode::RUSR | Mode::WUSR;
    let file = File::from(rustix::fs::open(&path, access | OFlags::CREATE | OFlags::CLOEXEC, mode)?);
    Ok(if try_lock(&file)? && is_same_file(&file, &path) { Some(file) } else { None })
}

/// The kind of process that takes a supervisor lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LockRole {
    Supervisor,
    Manager,
}

/// Locks a file without waiting. Returns false if another process has locked it.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether the path still names the open file. A lock on a file that was deleted meanwhile excludes nobody.
pub(super) fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{collections::BTreeSet, sync::Mutex};

    use super::*;

    /// Everything that the tests of this process have synced.
    pub(crate) static SYNCED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

    /// Takes the paths below `dir` that were synced since the last call.
    pub(crate) fn synced_below(dir: &Path) -> BTreeSet<PathBuf> {
        SYNCED.lock().unwrap().extract_if(.., |path| path.starts_with(dir)).collect()
    }

    #[test]
    fn key_is_a_file_name_for_any_challenge_id() {
        let identity = Identity::from_bits(7);
        for id in ["../../etc/passwd", "/", ".", "a/b\\c", "💥"] {
            let key = key(&ChallengeId::new(id).unwrap(), &identity);
            assert_eq!(key.len(), 33);
            assert!(key.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'), "{key}");
        }
    }

    #[test]
    fn lock_on_a_deleted_file_excludes_nobody() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("instances/key");
        std::fs::create_dir(top.path().join(RUN)).unwrap();
        let take = || try_supervisor_lock(&dir, LockRole::Manager).unwrap();
        let held = take().unwrap();
        assert!(take().is_none());
        remove(&supervisor_lock_path(&dir)).unwrap();
        assert!(!is_same_file(&held, &supervisor_lock_path(&dir)));
        assert!(take().is_some());
    }
}
