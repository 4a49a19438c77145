//! An instance's directory, locked: whoever has it is the only one who changes the instance, among all managers of this machine.

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::{DirBuilder, File, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use gauntlet_domain::{ChallengeId, Error, Identity, ProvisionedInstance, Result};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::Instant,
};

use super::{
    output, procfs,
    record::{self, LABEL, LOG, Label, READY, RECORD, STATE, State, WORK, Who},
    restart::Restart,
};

/// For how long a label outlives its instance. Orders are refused by it that are older than the one that took the instance down; they come
/// from a manager that was paused in between, and an identity is never given twice.
const REMEMBER: Duration = Duration::from_secs(3600);

/// How soon one that somebody works on is looked at again.
const BUSY: Duration = Duration::from_millis(250);

/// An instance's directory, locked until the last clone is dropped. Blocking work takes a clone with it: should its caller be dropped, the
/// lock stays until that work is done.
#[derive(Debug, Clone)]
pub(super) struct Home {
    pub(super) key: String,
    pub(super) dir: PathBuf,
    label: Label,
    _lock: Arc<File>,
}

/// What an order wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// That it is there: recorded at once, so that whatever is begun is found.
    There,
    /// What is recorded, until the order is done.
    AsRecorded,
}

impl Home {
    /// Locks the directory, making it if it is not there, and records the order; [`Error::Fenced`] if a later one is recorded already,
    /// [`Error::Busy`] if another holds it for longer than `patience`.
    pub(super) async fn enter(
        instances: &Path,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        wanted: Wanted,
        patience: Duration,
    ) -> Result<Self> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        let label = Label {
            challenge: challenge.as_str().to_owned(),
            identity: identity.as_str().to_owned(),
            generation,
            gone: wanted != Wanted::There,
            ports: BTreeMap::new(),
        };
        loop {
            let (dir, label) = (instances.join(record::key(challenge, identity)), label.clone());
            if let Some(home) = blocking(move || Self::try_enter(dir, label, wanted)).await? {
                return Ok(home);
            }
            let waited = began.elapsed();
            if waited >= patience {
                return Err(Error::Busy {
                    what: format!("the directory of instance {identity}"),
                    waited_ms: waited.as_millis().try_into().unwrap_or(u64::MAX),
                    ahead: 1,
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn try_enter(dir: PathBuf, mut label: Label, wanted: Wanted) -> Result<Option<Self>> {
        let Some(lock) = lock(&dir).map_err(failed("lock", "locking its directory"))? else { return Ok(None) };
        let key = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let there = record::read::<Label>(&dir, LABEL).unwrap_or_else(|error| {
            tracing::warn!(directory = %dir.display(), %error, "the label of an instance is unreadable: written anew");
            None
        });
        if let Some(there) = &there {
            if there.generation > label.generation {
                return Err(Error::Fenced(format!(
                    "instance {} (ordered with token {}, token {} is recorded)",
                    label.identity, label.generation, there.generation
                )));
            }
            if wanted != Wanted::There {
                label.gone = there.gone;
            }
            label.ports = there.ports.clone();
        }
        if there.as_ref() != Some(&label) {
            record::write(&dir, LABEL, &label).map_err(failed("lock", "recording the order"))?;
        }
        Ok(Some(Self { key, dir, label, _lock: Arc::new(lock) }))
    }

    /// The instance's identity, for spans and logs.
    pub(super) fn identity(&self) -> &str {
        &self.label.identity
    }

    /// The ports that are recorded as reserved for it.
    pub(super) fn ports(&self) -> &BTreeMap<String, u16> {
        &self.label.ports
    }

    /// Records its reserved ports. Blocks.
    pub(super) fn record_ports(&mut self, ports: BTreeMap<String, u16>) -> io::Result<()> {
        if self.label.ports != ports {
            self.label.ports = ports;
            record::write(&self.dir, LABEL, &self.label)?;
        }
        Ok(())
    }

    /// Records that it is gone. A power cut may undo that, or leave a label that cannot be read: the one is taken down again then, the other
    /// is forgotten after a while. Blocks.
    pub(super) fn mark_gone(&mut self) -> io::Result<()> {
        if !self.label.gone {
            self.label.gone = true;
            self.label.ports.clear();
            record::write(&self.dir, LABEL, &self.label)?;
        }
        Ok(())
    }

    /// Makes these files, and that they are there, survive a power cut. Blocks.
    pub(super) fn make_lasting(&self, names: &[&str]) -> io::Result<()> {
        let mut paths: Vec<PathBuf> = names.iter().map(|name| self.dir.join(name)).collect();
        paths.push(self.dir.clone());
        // The directory itself may be new.
        paths.extend(self.dir.parent().map(Path::to_owned));
        record::sync_all(&paths)
    }

    /// Removes everything but the label. Blocks.
    pub(super) fn clear(&self) -> io::Result<()> {
        remove_tree(&self.dir.join(WORK))?;
        output::remove(&self.dir)?;
        [READY, RECORD, STATE, LOG].iter().try_for_each(|name| record::remove(&self.dir.join(name)))?;
        record::remove(&record::run_lock(&self.dir))
    }
}

/// What is there, by its labels; labels that have outlived their use are removed. Blocks.
pub(super) fn list(instances: &Path, restart: &Restart) -> io::Result<Vec<ProvisionedInstance>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(instances)? {
        let dir = entry?.path();
        match record::read::<Label>(&dir, LABEL) {
            Ok(Some(label)) if label.gone => forget(&dir),
            Ok(Some(label)) => {
                // Its supervisor holds the lock for as long as the instance runs.
                let alive = record::take_run_lock(&dir, Who::Manager)?.is_none() || !rest(&dir, restart).is_zero();
                match known(label, alive) {
                    Some(known) => found.push(known),
                    None => {
                        tracing::warn!(directory = %dir.display(), "the label of an instance names no instance: skipped")
                    }
                }
            }
            // Being made this very moment, or removed.
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(directory = %dir.display(), %error, "the label of an instance is unreadable: skipped");
                // Without a record there is nothing to bring back: it was being taken down when the power went.
                if !dir.join(RECORD).exists() {
                    forget(&dir);
                }
            }
        }
    }
    Ok(found)
}

/// What became of an instance whose supervisor was seen to end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It ended by itself and is due to be brought up again.
    Ended(ProvisionedInstance),
    /// To be looked at again after that time: it rests, or somebody works on it.
    Later(Duration),
    /// It runs again, or was taken down.
    Settled,
}

/// Looks at one instance. Blocks.
pub(super) fn look(dir: &Path, restart: &Restart) -> io::Result<Fate> {
    let label = match record::read::<Label>(dir, LABEL) {
        Ok(Some(label)) if !label.gone => label,
        _ => return Ok(Fate::Settled),
    };
    if record::take_run_lock(dir, Who::Manager)?.is_none() {
        return Ok(Fate::Settled);
    }
    let left = rest(dir, restart);
    if !left.is_zero() {
        return Ok(Fate::Later(left));
    }
    // Whoever works on it may be about to end it, or to say that it is up.
    match File::open(dir) {
        Ok(file) if !record::try_lock(&file)? => Ok(Fate::Later(BUSY)),
        Ok(_) => Ok(known(label, false).map_or(Fate::Settled, Fate::Ended)),
        Err(_) => Ok(Fate::Settled),
    }
}

/// How much longer one that does not run is to be left alone. Lets go of its supervisor, which has ended.
fn rest(dir: &Path, restart: &Restart) -> Duration {
    let Ok(Some(state)) = record::read::<State>(dir, STATE) else { return Duration::ZERO };
    procfs::reap(state.shim);
    let ended = std::fs::metadata(dir.join(STATE)).and_then(|meta| meta.modified());
    let since = ended.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    since.map_or(Duration::ZERO, |since| restart.rest(&state).saturating_sub(since))
}

fn known(label: Label, alive: bool) -> Option<ProvisionedInstance> {
    let (challenge, identity) = (ChallengeId::new(label.challenge).ok()?, Identity::parse(&label.identity).ok()?);
    Some(ProvisionedInstance { challenge, identity, generation: label.generation, alive })
}

/// Removes what is left of an instance that was taken down long ago. What fails is tried again with the next list.
fn forget(dir: &Path) {
    let old = std::fs::metadata(dir.join(LABEL))
        .and_then(|meta| meta.modified())
        .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > REMEMBER));
    if !old {
        return;
    }
    if let Ok(Some(_lock)) = lock(dir)
        && matches!(record::read(dir, LABEL), Ok(Some(Label { gone: true, .. })) | Err(_))
    {
        let _ = record::remove(&record::run_lock(dir));
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// Makes the directory if need be and locks it; `None` if another has it.
fn lock(dir: &Path) -> io::Result<Option<File>> {
    make(dir)?;
    let file = match File::open(dir) {
        // Removed this very moment, having been gone for long: made again with the next try.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    Ok(if record::try_lock(&file)? && record::same(&file, dir) { Some(file) } else { None })
}

/// Makes a directory that only its owner may look into; one that is there is success.
pub(super) fn make(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes a directory and what is in it, also what the instance has made unwritable. Directories are moved up before they are emptied, so
/// that neither open files nor the length of a path grow with how deep they lie. Links are not followed.
fn remove_tree(dir: &Path) -> io::Result<()> {
    if let Err(error) = open_up(dir) {
        return if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    }
    let mut moved = 0u64;
    loop {
        let mut empty = true;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            empty = false;
            if !entry.file_type()?.is_dir() {
                std::fs::remove_file(entry.path())?;
                continue;
            }
            open_up(&entry.path())?;
            for inner in std::fs::read_dir(entry.path())? {
                let inner = inner?;
                if !inner.file_type()?.is_dir() {
                    std::fs::remove_file(inner.path())?;
                    continue;
                }
                open_up(&inner.path())?;
                // A name may be there already, of another directory or of the instance's own: the next one is tried.
                loop {
                    moved += 1;
                    match std::fs::rename(inner.path(), dir.join(format!("removed-{moved}"))) {
                        Err(error) if in_the_way(&error) => {}
                        renamed => break renamed?,
                    }
                }
            }
            std::fs::remove_dir(entry.path())?;
        }
        if empty {
            return std::fs::remove_dir(dir);
        }
    }
}

fn in_the_way(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
    matches!(error.kind(), AlreadyExists | DirectoryNotEmpty | NotADirectory)
}

/// Makes a directory one that its owner may change.
fn open_up(dir: &Path) -> io::Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Makes an I/O error one of provisioning.
pub(super) fn failed(step: &'static str, what: impl Display) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Provision { step, detail: format!("{what}: {error}") }
}

/// Registers a descriptor, to wait until it is readable.
#[allow(
    deprecated,
    reason = "it is unsound for types whose descriptor changes, which that of an OwnedFd does not; its successor is unsafe"
)]
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Runs what blocks where it may.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .unwrap_or_else(|error| Err(Error::Internal(format!("blocking work: {error}"))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use super::*;

    async fn enter(dir: &Path, generation: u64) -> Result<Home> {
        let challenge = ChallengeId::new("c").unwrap();
        Home::enter(dir, &challenge, &Identity::from_bits(1), generation, Wanted::There, Duration::ZERO).await
    }

    #[tokio::test]
    async fn one_at_a_time_and_never_backwards() {
        let dir = tempfile::tempdir().unwrap();
        let home = enter(dir.path(), 5).await.unwrap();
        assert!(matches!(enter(dir.path(), 5).await, Err(Error::Busy { .. })));
        let clone = home.clone();
        drop(home);
        assert!(matches!(enter(dir.path(), 5).await, Err(Error::Busy { .. })), "a clone holds it too");
        drop(clone);
        assert!(matches!(enter(dir.path(), 4).await, Err(Error::Fenced(_))));
        assert!(enter(dir.path(), 6).await.is_ok());
    }

    fn listed(dir: &Path) -> Vec<ProvisionedInstance> {
        list(dir, &Restart::default()).unwrap()
    }

    /// A directory of instances, with one for locks beside it.
    fn instances(top: &Path) -> PathBuf {
        let dir = top.join("instances");
        make(&dir).unwrap();
        make(&top.join(record::RUN)).unwrap();
        dir
    }

    #[tokio::test]
    async fn what_is_gone_is_listed_no_more_and_forgotten_after_a_while() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        let mut home = enter(&dir, 5).await.unwrap();
        assert_eq!(listed(&dir).len(), 1);
        home.mark_gone().unwrap();
        assert_eq!(listed(&dir), []);
        assert!(home.dir.exists());
        let long_ago = SystemTime::now() - REMEMBER - Duration::from_secs(1);
        File::open(home.dir.join(LABEL)).unwrap().set_modified(long_ago).unwrap();
        listed(&dir);
        assert!(home.dir.exists(), "somebody is at it");
        let gone = home.dir.clone();
        drop(home);
        listed(&dir);
        assert!(!gone.exists());
    }

    #[tokio::test]
    async fn what_is_said_to_last_is_synced_and_so_are_its_directories() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        let home = enter(&dir, 5).await.unwrap();
        std::fs::write(home.dir.join(RECORD), "").unwrap();
        record::tests::synced_below(top.path());
        home.make_lasting(&[LABEL, RECORD]).unwrap();
        let expected = BTreeSet::from([home.dir.join(LABEL), home.dir.join(RECORD), home.dir.clone(), dir.clone()]);
        assert_eq!(record::tests::synced_below(top.path()), expected);
    }

    #[test]
    fn a_label_that_cannot_be_read_hides_no_other() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        for (name, text) in [
            ("a", "{"),
            ("b", r#"{"challenge":"c","identity":"0000000000000001","generation":3,"gone":false}"#),
            ("c", r#"{"challenge":"","identity":"x","generation":3,"gone":false}"#),
        ] {
            make(&dir.join(name)).unwrap();
            std::fs::write(dir.join(name).join(LABEL), text).unwrap();
        }
        let found = listed(&dir);
        assert_eq!(found.len(), 1);
        assert_eq!(found.first().map(|found| found.generation), Some(3));
        // It is forgotten after a while, unless there is something to bring back.
        let long_ago = SystemTime::now() - REMEMBER - Duration::from_secs(1);
        for name in ["a", "c"] {
            File::open(dir.join(name).join(LABEL)).unwrap().set_modified(long_ago).unwrap();
        }
        std::fs::write(dir.join("a").join(RECORD), "").unwrap();
        listed(&dir);
        assert!(dir.join("a").exists() && dir.join("c").exists());
        std::fs::remove_file(dir.join("a").join(RECORD)).unwrap();
        listed(&dir);
        assert!(!dir.join("a").exists() && dir.join("c").exists());
    }

    #[test]
    fn removes_what_was_made_unwritable_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        make(&kept).unwrap();
        std::fs::write(kept.join("file"), "").unwrap();
        let tree = dir.path().join("tree");
        make(&tree).unwrap();
        make(&tree.join("inner")).unwrap();
        std::fs::write(tree.join("inner/file"), "").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        std::fs::set_permissions(tree.join("inner"), Permissions::from_mode(0o000)).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && kept.join("file").exists());
    }

    #[test]
    fn a_deep_tree_is_removed_with_few_descriptors() {
        const FEW: &str = "GAUNTLET_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(FEW).is_none() {
            // In a process of its own: the limit is for all threads of one.
            let name = std::thread::current().name().unwrap().to_owned();
            let again = ["-c", "ulimit -n 64; exec \"$0\" --exact \"$1\""];
            let mut again = std::process::Command::new("sh")
                .args(again)
                .arg(std::env::current_exe().unwrap())
                .arg(name)
                .env(FEW, "1")
                .spawn()
                .unwrap();
            assert!(again.wait().unwrap().success());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("tree");
        make(&top).unwrap();
        // Deeper than a path can name; with names that are in the way, and files on all levels.
        let mut at = File::open(&top).unwrap();
        for level in 0..600 {
            let directory = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::RDONLY;
            let file = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
            let name = format!("removed-{}", level % 3);
            rustix::fs::openat(&at, "file", file, rustix::fs::Mode::RUSR).unwrap();
            rustix::fs::mkdirat(&at, &name, rustix::fs::Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, &name, directory, rustix::fs::Mode::empty()).unwrap().into();
        }
        std::fs::write(top.join("removed-2"), "").unwrap();
        drop(at);
        remove_tree(&top).unwrap();
        assert!(!top.exists());
    }
}
