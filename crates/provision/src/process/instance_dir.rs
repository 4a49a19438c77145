//! An instance's directory. Of all managers on this machine, only the one that has locked it changes the instance.

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use gauntlet_domain::{ChallengeId, Error, Identity, Result};
use tokio::time::Instant;

use super::{
    blocking::{blocking, failed},
    output,
    record::{self, LABEL, LOG, Label, READY, RECORD, STATE, WORK},
    remove_tree::remove_tree,
};

/// A locked instance directory. The lock is released when the last clone is dropped: blocking work owns a clone, so that the directory stays
/// locked until the work is done, even if its caller is cancelled.
#[derive(Debug, Clone)]
pub(super) struct InstanceDir {
    pub(super) key: String,
    pub(super) dir: PathBuf,
    label: Label,
    _lock: Arc<File>,
}

/// Whether locking a directory records that the instance exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Record that it exists, before anything is created for it, so that a listing finds it after a crash.
    Record,
    /// Keep what is recorded.
    Keep,
}

impl InstanceDir {
    /// Locks the directory, creates it if necessary, and records the generation.
    ///
    /// # Cancel safety
    /// Once the future has been dropped, nothing is recorded: an attempt that is still queued gives up.
    ///
    /// # Errors
    /// [`Error::Fenced`] if a higher generation is recorded, [`Error::Busy`] if the directory stays locked for longer than `timeout`, and
    /// [`Error::Provision`].
    pub(super) async fn lock(
        instances: &Path,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        presence: Presence,
        timeout: Duration,
    ) -> Result<Self> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        let label = Label {
            challenge: challenge.as_str().to_owned(),
            identity: identity.as_str().to_owned(),
            generation,
            gone: presence == Presence::Keep,
            ports: BTreeMap::new(),
        };
        let caller = Arc::new(());
        loop {
            let (dir, label) = (instances.join(record::key(challenge, identity)), label.clone());
            let waiting = Arc::downgrade(&caller);
            if let Some(instance) = blocking(move || Self::try_lock(dir, label, presence, &waiting)).await? {
                return Ok(instance);
            }
            let waited = started.elapsed();
            if waited >= timeout {
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

    /// Locks the directory unless another holder has it, or the caller has gone.
    fn try_lock(dir: PathBuf, mut label: Label, presence: Presence, caller: &Weak<()>) -> Result<Option<Self>> {
        let is_cancelled = || caller.upgrade().is_none();
        if is_cancelled() {
            return Ok(None);
        }
        let Some(lock) = try_lock_dir(&dir).map_err(failed("lock", "locking its directory"))? else { return Ok(None) };
        // Checked again under the lock: the call may have been dropped meanwhile, and the instance removed.
        if is_cancelled() {
            return Ok(None);
        }
        let key = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let recorded = record::read::<Label>(&dir, LABEL).unwrap_or_else(|error| {
            tracing::warn!(directory = %dir.display(), %error, "the label of an instance is unreadable and will be replaced");
            None
        });
        if let Some(recorded) = &recorded {
            if recorded.generation > label.generation {
                return Err(Error::Fenced(format!(
                    "instance {} (the request has token {}, token {} is recorded)",
                    label.identity, label.generation, recorded.generation
                )));
            }
            if presence == Presence::Keep {
                label.gone = recorded.gone;
            }
            label.ports = recorded.ports.clone();
        }
        if recorded.as_ref() != Some(&label) {
            record::write(&dir, LABEL, &label).map_err(failed("lock", "recording the generation"))?;
        }
        Ok(Some(Self { key, dir, label, _lock: Arc::new(lock) }))
    }

    /// The instance's identity, for spans and logs.
    pub(super) fn challenge(&self) -> &str {
        &self.label.challenge
    }

    pub(super) fn identity(&self) -> &str {
        &self.label.identity
    }

    /// The recorded reservation: port numbers by name.
    pub(super) fn ports(&self) -> &BTreeMap<String, u16> {
        &self.label.ports
    }

    /// Records the reservation. Blocks.
    pub(super) fn record_ports(&mut self, ports: BTreeMap<String, u16>) -> io::Result<()> {
        if self.label.ports != ports {
            self.label.ports = ports;
            record::write(&self.dir, LABEL, &self.label)?;
        }
        Ok(())
    }

    /// Records that the instance was removed. Blocks.
    ///
    /// Not synced: after a power cut the label may say that the instance exists, and it is removed again, or the label may be unreadable, and
    /// it is deleted after a while.
    pub(super) fn mark_removed(&mut self) -> io::Result<()> {
        if !self.label.gone {
            self.label.gone = true;
            self.label.ports.clear();
            record::write(&self.dir, LABEL, &self.label)?;
        }
        Ok(())
    }

    /// Syncs the files with these names, and the directories that contain them. Blocks.
    pub(super) fn sync(&self, names: &[&str]) -> io::Result<()> {
        let mut paths: Vec<PathBuf> = names.iter().map(|name| self.dir.join(name)).collect();
        paths.push(self.dir.clone());
        // The instance's directory may be new.
        paths.extend(self.dir.parent().map(Path::to_owned));
        record::sync_all(&paths)
    }

    /// Removes everything except the label. Blocks.
    pub(super) fn clear(&self) -> io::Result<()> {
        remove_tree(&self.dir.join(WORK))?;
        output::remove(&self.dir)?;
        [READY, RECORD, STATE, LOG].iter().try_for_each(|name| record::remove(&self.dir.join(name)))?;
        record::remove(&record::supervisor_lock_path(&self.dir))
    }
}

/// Creates the directory if necessary and locks it; `None` if another process has locked it. Blocks.
pub(super) fn try_lock_dir(dir: &Path) -> io::Result<Option<File>> {
    create_dir(dir)?;
    let file = match File::open(dir) {
        // Another manager has just deleted it, long after the instance was removed. The next attempt creates it again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    Ok(if record::try_lock(&file)? && record::is_same_file(&file, dir) { Some(file) } else { None })
}

/// Creates a directory that only its owner can read. Succeeds if it exists.
pub(super) fn create_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use super::*;

    pub(crate) async fn lock(dir: &Path, generation: u64) -> Result<InstanceDir> {
        let challenge = ChallengeId::new("c").unwrap();
        InstanceDir::lock(dir, &challenge, &Identity::from_bits(1), generation, Presence::Record, Duration::ZERO).await
    }

    #[tokio::test]
    async fn directory_has_one_holder_and_rejects_lower_generations() {
        let dir = tempfile::tempdir().unwrap();
        let instance = lock(dir.path(), 5).await.unwrap();
        assert!(matches!(lock(dir.path(), 5).await, Err(Error::Busy { .. })));
        let clone = instance.clone();
        drop(instance);
        assert!(matches!(lock(dir.path(), 5).await, Err(Error::Busy { .. })), "a clone holds it too");
        drop(clone);
        assert!(matches!(lock(dir.path(), 4).await, Err(Error::Fenced(_))));
        assert!(lock(dir.path(), 6).await.is_ok());
    }

    #[test]
    fn attempt_of_a_dropped_call_records_nothing() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let top = tempfile::tempdir().unwrap();
        runtime.block_on(async {
            let (release, released) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || released.recv());
            // The attempt is queued behind the busy thread when its caller is dropped.
            assert!(futures::FutureExt::now_or_never(lock(top.path(), 5)).is_none());
            drop(release);
            assert!(busy.await.unwrap().is_err());
            tokio::task::spawn_blocking(|| ()).await.unwrap();
        });
        assert_eq!(std::fs::read_dir(top.path()).unwrap().count(), 0);
    }

    /// Creates a directory for instances, and one for their supervisor locks.
    pub(crate) fn instances(top: &Path) -> PathBuf {
        let dir = top.join("instances");
        create_dir(&dir).unwrap();
        create_dir(&top.join(record::RUN)).unwrap();
        dir
    }

    #[tokio::test]
    async fn files_are_synced_with_their_directories() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        let instance = lock(&dir, 5).await.unwrap();
        std::fs::write(instance.dir.join(RECORD), "").unwrap();
        record::tests::synced_below(top.path());
        instance.sync(&[LABEL, RECORD]).unwrap();
        let expected =
            BTreeSet::from([instance.dir.join(LABEL), instance.dir.join(RECORD), instance.dir.clone(), dir.clone()]);
        assert_eq!(record::tests::synced_below(top.path()), expected);
    }
}
