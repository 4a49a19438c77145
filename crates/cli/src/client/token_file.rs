//! Edits a file that another process reads: under a lock, and replaced as a whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, Gid, Uid, fchown, flock};

use super::failure::Failure;

/// How long to wait for another edit of the same file.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// The permissions of a new file, and the most that an edited one keeps: the group may read it, where the manager runs as another user.
const MODE: u32 = 0o600;
const KEPT: u32 = 0o640;

/// Reads the file.
pub(super) fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| unusable("read", path, &error))
}

/// Replaces the text of the file by what `change` makes of it. A missing file counts as empty. Readers see the text before or after, never a part;
/// edits by other processes wait, at most for [`LOCK_TIMEOUT`].
pub(super) fn edit(path: &Path, change: impl FnOnce(&str) -> Result<String, Failure>) -> Result<(), Failure> {
    // A link, as in a mounted volume, stays one: the file that it leads to is replaced.
    let target = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        canonical => canonical.map_err(|error| unusable("use", path, &error))?,
    };
    let lock = lock(&target)?;
    let text = match fs::read_to_string(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(|error| unusable("read", path, &error))?,
    };
    let changed = change(&text)?;
    replace(&target, &changed).map_err(|error| unusable("write", path, &error))?;
    drop(lock);
    Ok(())
}

/// Locks a file beside the target, since the target itself is replaced.
fn lock(target: &Path) -> Result<File, Failure> {
    let mut name = target.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(MODE).open(&name);
    let file = opened.map_err(|error| unusable("lock", target, &error))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => sleep(Duration::from_millis(20)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let path = target.display();
                return Err(Failure::TokenFile(format!(
                    "another process is editing {path}; try again once it is done"
                )));
            }
            Err(error) => return Err(unusable("lock", target, &error.into())),
        }
    }
}

fn replace(target: &Path, text: &str) -> io::Result<()> {
    let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Only its owner may read a new temporary file.
    let mut file = tempfile::Builder::new().prefix(".tokens-").tempfile_in(dir)?;
    let mut mode = MODE;
    if let Ok(old) = fs::metadata(target) {
        mode = old.permissions().mode() & KEPT;
        let new = file.as_file().metadata()?;
        if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
            // Otherwise a manager that runs as the old owner could not read it any more.
            fchown(file.as_file(), Some(Uid::from_raw(old.uid())), Some(Gid::from_raw(old.gid())))?;
        }
    }
    file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(target)?;
    File::open(dir)?.sync_all()
}

fn unusable(verb: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::TokenFile(format!("cannot {verb} the token file {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn new_file_is_private_and_an_edit_keeps_what_its_group_may_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        edit(&path, |text| Ok(format!("{text}a"))).unwrap();
        assert_eq!((read(&path).unwrap().as_str(), mode(&path)), ("a", 0o600));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        edit(&path, |text| Ok(format!("{text}b"))).unwrap();
        assert_eq!((read(&path).unwrap().as_str(), mode(&path)), ("ab", 0o640));
    }

    #[test]
    fn link_is_followed_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "a").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        edit(&link, |_| Ok("b".to_owned())).unwrap();
        assert!(link.is_symlink() && fs::read_to_string(&file).unwrap() == "b");
    }

    #[test]
    fn failed_change_leaves_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, "a").unwrap();
        assert!(edit(&path, |_| Err(Failure::Usage("no"))).is_err());
        assert_eq!(read(&path).unwrap(), "a");
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 2, "the file and its lock");
    }

    #[test]
    fn concurrent_edits_all_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| edit(&path, |text| Ok(format!("{text}x"))).unwrap());
            }
        });
        assert_eq!(read(&path).unwrap(), "x".repeat(8));
    }
}
