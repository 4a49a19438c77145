//! Removes directory trees that an instance has written.

use std::{fs::Permissions, io, os::unix::fs::PermissionsExt as _, path::Path};

/// Removes a directory with its content, including directories that the instance has made unwritable. Symbolic links are not followed. Succeeds
/// if the directory doesn't exist.
///
/// Inner directories are moved up before they are emptied, so that neither the number of open files nor the length of a path depends on how
/// deep the tree is.
pub(super) fn remove_tree(dir: &Path) -> io::Result<()> {
    if let Err(error) = make_writable(dir) {
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
            make_writable(&entry.path())?;
            for inner in std::fs::read_dir(entry.path())? {
                let inner = inner?;
                if !inner.file_type()?.is_dir() {
                    std::fs::remove_file(inner.path())?;
                    continue;
                }
                make_writable(&inner.path())?;
                // Skips names that exist, from earlier moves or from the instance.
                loop {
                    moved += 1;
                    match std::fs::rename(inner.path(), dir.join(format!("removed-{moved}"))) {
                        Err(error) if is_name_taken(&error) => {}
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

fn is_name_taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
    matches!(error.kind(), AlreadyExists | DirectoryNotEmpty | NotADirectory)
}

/// Gives the owner all permissions of a directory.
fn make_writable(dir: &Path) -> io::Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::fs::File;

    use super::*;

    #[test]
    fn removes_unwritable_directories_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "").unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::create_dir(tree.join("inner")).unwrap();
        std::fs::write(tree.join("inner/file"), "").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        std::fs::set_permissions(tree.join("inner"), Permissions::from_mode(0o000)).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && kept.join("file").exists());
    }

    #[test]
    fn removes_a_deep_tree_with_few_descriptors() {
        const FEW: &str = "GAUNTLET_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(FEW).is_none() {
            // In a process of its own, because the limit applies to all threads.
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
        std::fs::create_dir(&top).unwrap();
        // Deeper than the longest path, with names that collide with those of moved directories, and a file on each level.
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
