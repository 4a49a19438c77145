//! Lists instances by their directories, and looks at one that has ended.

use std::{
    fs::File,
    io,
    path::Path,
    time::{Duration, SystemTime},
};

use gauntlet_domain::{ChallengeId, Identity, ProvisionedInstance};

use super::{
    instance_dir::try_lock_dir,
    procfs,
    record::{self, LABEL, Label, LockRole, RECORD, STATE, State},
    restart::Restart,
};

/// How long a label is kept after its instance was removed. It fences requests that are older than the removal, from a manager that was paused
/// in between. Identities are never reused.
const LABEL_RETENTION: Duration = Duration::from_secs(3600);

/// When to check an instance again that a manager works on.
const BUSY_DELAY: Duration = Duration::from_millis(250);

/// Lists the instances by their labels, and deletes labels that are no longer needed. Blocks.
pub(super) fn list(instances: &Path, restart: &Restart) -> io::Result<Vec<ProvisionedInstance>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(instances)? {
        let dir = entry?.path();
        match record::read::<Label>(&dir, LABEL) {
            Ok(Some(label)) if label.gone => delete_old_label(&dir),
            Ok(Some(label)) => {
                // The supervisor holds its lock while the instance runs.
                let alive = record::try_supervisor_lock(&dir, LockRole::Manager)?.is_none()
                    || !restart_delay(&dir, restart).is_zero();
                match provisioned(label, alive) {
                    Some(instance) => found.push(instance),
                    None => {
                        tracing::warn!(directory = %dir.display(), "an instance is skipped: its label has no valid challenge or identity")
                    }
                }
            }
            // A manager is creating or deleting it.
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(directory = %dir.display(), %error, "an instance is skipped: its label is unreadable");
                // Without a record there is nothing to launch again: a power cut interrupted its removal.
                if !dir.join(RECORD).exists() {
                    delete_old_label(&dir);
                }
            }
        }
    }
    Ok(found)
}

/// The state of an instance whose supervisor has exited.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It ended on its own, and is due to be launched again.
    Ended(ProvisionedInstance),
    /// Check again after this time: its restart delay isn't over, or a manager works on it.
    Later(Duration),
    /// It runs again, or was removed.
    Settled,
}

/// Checks one instance. Blocks.
pub(super) fn check(dir: &Path, restart: &Restart) -> io::Result<Fate> {
    let label = match record::read::<Label>(dir, LABEL) {
        Ok(Some(label)) if !label.gone => label,
        _ => return Ok(Fate::Settled),
    };
    if record::try_supervisor_lock(dir, LockRole::Manager)?.is_none() {
        return Ok(Fate::Settled);
    }
    let left = restart_delay(dir, restart);
    if !left.is_zero() {
        return Ok(Fate::Later(left));
    }
    // A manager that works on it may be about to remove it, or has just launched it.
    match File::open(dir) {
        Ok(file) if !record::try_lock(&file)? => Ok(Fate::Later(BUSY_DELAY)),
        Ok(_) => Ok(provisioned(label, false).map_or(Fate::Settled, Fate::Ended)),
        Err(_) => Ok(Fate::Settled),
    }
}

/// The rest of the restart delay of an instance that doesn't run. Reaps its supervisor.
fn restart_delay(dir: &Path, restart: &Restart) -> Duration {
    let Ok(Some(state)) = record::read::<State>(dir, STATE) else { return Duration::ZERO };
    procfs::reap(state.supervisor);
    let ended = std::fs::metadata(dir.join(STATE)).and_then(|meta| meta.modified());
    let since = ended.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    since.map_or(Duration::ZERO, |since| restart.delay(&state).saturating_sub(since))
}

fn provisioned(label: Label, alive: bool) -> Option<ProvisionedInstance> {
    let (challenge, identity) = (ChallengeId::new(label.challenge).ok()?, Identity::parse(&label.identity).ok()?);
    Some(ProvisionedInstance { challenge, identity, generation: label.generation, alive })
}

/// Deletes the label of an instance that was removed long ago. If that fails, the next listing tries again.
fn delete_old_label(dir: &Path) {
    let old = std::fs::metadata(dir.join(LABEL))
        .and_then(|meta| meta.modified())
        .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > LABEL_RETENTION));
    if !old {
        return;
    }
    if let Ok(Some(_lock)) = try_lock_dir(dir)
        && matches!(record::read(dir, LABEL), Ok(Some(Label { gone: true, .. })) | Err(_))
    {
        let _ = record::remove(&record::supervisor_lock_path(dir));
        let _ = std::fs::remove_dir_all(dir);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{
        super::instance_dir::{
            create_dir,
            tests::{instances, lock},
        },
        *,
    };

    fn listed(dir: &Path) -> Vec<ProvisionedInstance> {
        list(dir, &Restart::default()).unwrap()
    }

    #[tokio::test]
    async fn removed_instance_is_not_listed_and_its_label_expires() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        let mut instance = lock(&dir, 5).await.unwrap();
        assert_eq!(listed(&dir).len(), 1);
        instance.mark_removed().unwrap();
        assert_eq!(listed(&dir), []);
        assert!(instance.dir.exists());
        let long_ago = SystemTime::now() - LABEL_RETENTION - Duration::from_secs(1);
        File::open(instance.dir.join(LABEL)).unwrap().set_modified(long_ago).unwrap();
        listed(&dir);
        assert!(instance.dir.exists(), "a manager works on it");
        let gone = instance.dir.clone();
        drop(instance);
        listed(&dir);
        assert!(!gone.exists());
    }

    #[test]
    fn unreadable_label_does_not_hide_other_instances() {
        let top = tempfile::tempdir().unwrap();
        let dir = instances(top.path());
        for (name, text) in [
            ("a", "{"),
            ("b", r#"{"challenge":"c","identity":"0000000000000001","generation":3,"gone":false}"#),
            ("c", r#"{"challenge":"","identity":"x","generation":3,"gone":false}"#),
        ] {
            create_dir(&dir.join(name)).unwrap();
            std::fs::write(dir.join(name).join(LABEL), text).unwrap();
        }
        let found = listed(&dir);
        assert_eq!(found.len(), 1);
        assert_eq!(found.first().map(|found| found.generation), Some(3));
        // It expires, unless there is a record to launch the instance from.
        let long_ago = SystemTime::now() - LABEL_RETENTION - Duration::from_secs(1);
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
}
