//! What is written down about an instance, and where.
//!
//! Every file is replaced whole (written beside, then renamed), so that a reader sees the old text or the new one.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use gauntlet_domain::{ChallengeId, Identity, Limits, Probe, Readiness};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

/// The form of [`Record`]; a supervisor refuses any other.
pub(super) const VERSION: u32 = 1;

/// The variable that marks every process of an instance with its directory: a key may be there twice on a machine, under another
/// directory of instances.
pub(super) const MARKER: &str = "GAUNTLET_INSTANCE";

pub(super) const LABEL: &str = "label.json";
pub(super) const RECORD: &str = "instance.json";
pub(super) const STATE: &str = "state.json";
pub(super) const READY: &str = "ready";
/// What the supervisor itself has to say.
pub(super) const LOG: &str = "supervisor.log";
pub(super) const WORK: &str = "work";

/// Beside the directory of instances: the locks of their supervisors.
pub(super) const RUN: &str = "run";

/// The name of an instance's directory. A challenge's id is any text, so only its hash is part of a path.
pub(super) fn key(challenge: &ChallengeId, identity: &Identity) -> String {
    format!("{}-{identity}", hash(challenge.as_str().as_bytes()))
}

/// 16 hexadecimal characters.
pub(super) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What the lines of a supervisor have between their time and their text.
pub(super) fn log_prefix(pid: u32) -> String {
    format!("supervisor {pid} ")
}

/// What is there, for whom, and by which order: the first thing written and the last that stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Label {
    pub(super) challenge: String,
    pub(super) identity: String,
    /// The highest generation that was ever ordered.
    pub(super) generation: u64,
    /// It was taken down; the label stays for a while so that orders older than that are still refused.
    pub(super) gone: bool,
    /// The ports reserved for it, whether or not it was launched on them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) ports: BTreeMap<String, u16>,
}

/// What the supervisor is to run. Holds secrets: its file is readable by its owner only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) launch: Launch,
}

/// A launch plan with nothing left to decide. Two equal launches need no restart between them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Launch {
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

/// What the supervisor last said about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The boot it was said in; process ids of another boot mean nothing.
    pub(super) boot: String,
    pub(super) shim: ProcessId,
    /// The instance's first process, which leads its process group.
    pub(super) child: Option<ProcessId>,
    /// The instance's control group, if it has one.
    pub(super) cgroup: Option<PathBuf>,
    /// Everything that runs is in that group: what is begun later is too.
    pub(super) gathered: bool,
    /// How many times in a row it had ended by itself soon after it was started, before this start.
    pub(super) restarts: u32,
    pub(super) end: Option<End>,
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: i32,
    /// When it started, in clock ticks since boot.
    pub(super) start: u64,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    /// For the operator: "exit status 3".
    pub(super) how: String,
    /// Whether no process is left.
    pub(super) whole: bool,
    /// Whether it was told to end.
    pub(super) told: bool,
    /// How long it ran.
    pub(super) after: Duration,
}

/// Reads one; `None` if it is not there.
pub(super) fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> io::Result<Option<T>> {
    match std::fs::read(dir.join(name)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one. It survives a power cut once [`sync`] has been over it and its directory.
pub(super) fn write<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    replace(dir, name, value, false)
}

/// Writes one so that a power cut leaves the old text or the new one, never neither.
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

/// Makes a file, or what a directory lists, survive a power cut.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    tests::SYNCED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(path.to_owned());
    File::open(path)?.sync_all()
}

/// Makes several files or directories survive a power cut. All at once: the file system serves them with one flush of its journal, where
/// one after the other waits for a flush each.
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

/// Removes one, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The lock of an instance's supervisor. All are in one directory, so that one watch sees each end.
pub(super) fn run_lock(dir: &Path) -> PathBuf {
    let (top, key) = (dir.parent().and_then(Path::parent), dir.file_name());
    top.unwrap_or(dir).join(RUN).join(key.unwrap_or_default())
}

/// Takes the lock that a supervisor holds for as long as it lives; `None` if another holds it. Kept open by nobody else: it is free again
/// the moment its holder ends, however it ends.
///
/// Its supervisor opens it for writing, everybody else does not: that it is closed after that is what a watch sees.
pub(super) fn take_run_lock(dir: &Path, who: Who) -> io::Result<Option<File>> {
    let path = run_lock(dir);
    let access = match who {
        Who::Supervisor => OFlags::WRONLY,
        Who::Manager => OFlags::RDONLY,
    };
    let mode = Mode::RUSR | Mode::WUSR;
    let file = File::from(rustix::fs::open(&path, access | OFlags::CREATE | OFlags::CLOEXEC, mode)?);
    Ok(if try_lock(&file)? && same(&file, &path) { Some(file) } else { None })
}

/// Who takes a supervisor's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Supervisor,
    Manager,
}

/// Locks without waiting; false if another holds it.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether what was opened is still what the path names: a lock on something that was removed meanwhile excludes nobody.
pub(super) fn same(file: &File, path: &Path) -> bool {
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

    /// Everything that was synced, by all tests of this process.
    pub(crate) static SYNCED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

    /// What was synced in that directory since this was last called for it.
    pub(crate) fn synced_below(dir: &Path) -> BTreeSet<PathBuf> {
        SYNCED.lock().unwrap().extract_if(.., |path| path.starts_with(dir)).collect()
    }

    #[test]
    fn a_key_is_one_name_whatever_the_id() {
        let identity = Identity::from_bits(7);
        for id in ["../../etc/passwd", "/", ".", "a/b\\c", "💥"] {
            let key = key(&ChallengeId::new(id).unwrap(), &identity);
            assert_eq!(key.len(), 33);
            assert!(key.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'), "{key}");
        }
    }

    #[test]
    fn a_lock_on_a_removed_file_is_no_lock() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("instances/key");
        std::fs::create_dir(top.path().join(RUN)).unwrap();
        let take = || take_run_lock(&dir, Who::Manager).unwrap();
        let held = take().unwrap();
        assert!(take().is_none());
        remove(&run_lock(&dir)).unwrap();
        assert!(!same(&held, &run_lock(&dir)));
        assert!(take().is_some());
    }
}
