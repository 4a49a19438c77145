//! An instance's directory, locked: whoever has it is the only one who changes the instance, among all managers of this machine.

use std::{
    fmt::Display,
    fs::{DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use gauntlet_domain::{ChallengeId, Error, Found, Identity, Result};
use tokio::time::Instant;

use super::{
    output,
    record::{self, LABEL, Label, READY, RECORD, RUN_LOCK, STATE, WORK},
};

/// For how long a label outlives its instance. Orders are refused by it that are older than the one that took the instance down; they come
/// from a manager that was paused in between, and an identity is never given twice.
const REMEMBER: Duration = Duration::from_secs(3600);

/// An instance's directory, locked until the last clone is dropped. Blocking work takes a clone with it: should its caller be dropped, the
/// lock stays until that work is done.
#[derive(Debug, Clone)]
pub(super) struct Home {
    pub(super) key: String,
    pub(super) dir: PathBuf,
    label: Label,
    _lock: Arc<File>,
}

impl Home {
    /// Locks the directory, making it if it is not there, and records the order; [`Error::Fenced`] if a later one is recorded already,
    /// [`Error::Busy`] if another holds it for longer than `patience`.
    pub(super) async fn enter(
        instances: &Path,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        patience: Duration,
    ) -> Result<Self> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        let label = Label {
            challenge: challenge.as_str().to_owned(),
            identity: identity.as_str().to_owned(),
            generation,
            gone: false,
        };
        loop {
            let (dir, label) = (instances.join(record::key(challenge, identity)), label.clone());
            if let Some(home) = blocking(move || Self::try_enter(dir, label)).await? {
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

    fn try_enter(dir: PathBuf, mut label: Label) -> Result<Option<Self>> {
        let Some(lock) = lock(&dir).map_err(failed("lock", "locking its directory"))? else { return Ok(None) };
        let key = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        match record::read::<Label>(&dir, LABEL) {
            Ok(Some(there)) if there.generation > label.generation => {
                return Err(Error::Fenced(format!(
                    "instance {} (ordered with token {}, token {} is recorded)",
                    label.identity, label.generation, there.generation
                )));
            }
            Ok(Some(there)) if there == label => {}
            Ok(there) => {
                // Nobody but an `up` brings back what is gone, and that says so itself.
                label.gone = there.is_none_or(|there| there.gone);
                record::write(&dir, LABEL, &label, true).map_err(failed("lock", "recording the order"))?;
            }
            Err(error) => {
                tracing::warn!(directory = %dir.display(), %error, "the label of an instance is unreadable: written anew");
                record::write(&dir, LABEL, &label, true).map_err(failed("lock", "recording the order"))?;
            }
        }
        Ok(Some(Self { key, dir, label, _lock: Arc::new(lock) }))
    }

    /// The instance's identity, for spans and logs.
    pub(super) fn identity(&self) -> &str {
        &self.label.identity
    }

    /// Records whether there is something. Blocks.
    pub(super) fn mark(&mut self, gone: bool) -> io::Result<()> {
        if self.label.gone != gone {
            self.label.gone = gone;
            record::write(&self.dir, LABEL, &self.label, true)?;
        }
        Ok(())
    }

    /// Removes everything but the label. Blocks.
    pub(super) fn clear(&self) -> io::Result<()> {
        remove_tree(&self.dir.join(WORK))?;
        output::remove(&self.dir)?;
        [READY, RECORD, STATE, RUN_LOCK].iter().try_for_each(|name| record::remove(&self.dir.join(name)))
    }
}

/// What is there, by its labels; labels that have outlived their use are removed. Blocks.
pub(super) fn list(instances: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(instances)? {
        let dir = entry?.path();
        match record::read::<Label>(&dir, LABEL) {
            Ok(Some(label)) if label.gone => forget(&dir),
            Ok(Some(label)) => match (ChallengeId::new(label.challenge), Identity::parse(&label.identity)) {
                (Ok(challenge), Ok(identity)) => {
                    // Its supervisor holds the lock for as long as the instance runs.
                    let alive = record::run_lock(&dir)?.is_none();
                    found.push(Found { challenge, identity, generation: label.generation, alive });
                }
                _ => tracing::warn!(directory = %dir.display(), "the label of an instance names no instance: skipped"),
            },
            // Being made this very moment, or removed.
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(directory = %dir.display(), %error, "the label of an instance is unreadable: skipped");
            }
        }
    }
    Ok(found)
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
        && let Ok(Some(Label { gone: true, .. })) = record::read(dir, LABEL)
    {
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

/// Removes a directory and what is in it, also what the instance has made unwritable.
fn remove_tree(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(dir)?;
            std::fs::remove_dir_all(dir)
        }
        other => other,
    }
}

fn open_up(dir: &Path) -> io::Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // The type of the entry itself: a link is never followed.
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes an I/O error one of provisioning.
pub(super) fn failed(step: &'static str, what: impl Display) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Provision { step, detail: format!("{what}: {error}") }
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
    use super::*;

    async fn enter(dir: &Path, generation: u64) -> Result<Home> {
        let challenge = ChallengeId::new("c").unwrap();
        Home::enter(dir, &challenge, &Identity::from_bits(1), generation, Duration::ZERO).await
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

    #[tokio::test]
    async fn what_is_gone_is_listed_no_more_and_forgotten_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let mut home = enter(dir.path(), 5).await.unwrap();
        home.mark(false).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
        home.mark(true).unwrap();
        assert_eq!(list(dir.path()).unwrap(), []);
        assert!(home.dir.exists());
        let long_ago = SystemTime::now() - REMEMBER - Duration::from_secs(1);
        File::open(home.dir.join(LABEL)).unwrap().set_modified(long_ago).unwrap();
        list(dir.path()).unwrap();
        assert!(home.dir.exists(), "somebody is at it");
        let gone = home.dir.clone();
        drop(home);
        list(dir.path()).unwrap();
        assert!(!gone.exists());
    }

    #[test]
    fn a_label_that_cannot_be_read_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a", "{"),
            ("b", r#"{"challenge":"c","identity":"0000000000000001","generation":3,"gone":false}"#),
            ("c", r#"{"challenge":"","identity":"x","generation":3,"gone":false}"#),
        ] {
            make(&dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join(LABEL), text).unwrap();
        }
        let found = list(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found.first().map(|found| found.generation), Some(3));
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
}
