//! A copy of the checkout in `target/mutants`, in which mutants are built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::workspace_root;

pub(super) struct Copy {
    /// The sources.
    pub(super) tree: PathBuf,
    /// The target directory, kept between runs.
    pub(super) target: PathBuf,
}

impl Copy {
    /// Makes the copy equal to the checkout, including uncommitted changes. Writes only files that differ, so that cargo rebuilds little.
    pub(super) fn update() -> Result<Copy> {
        let root = workspace_root();
        let dir = root.join("target/mutants");
        let copy = Copy { tree: dir.join("tree"), target: dir.join("target") };
        fs::create_dir_all(&copy.tree).with_context(|| format!("create {}", copy.tree.display()))?;
        let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listed = Command::new("git").args(list).current_dir(&root).output().context("run git ls-files")?;
        if !listed.status.success() {
            bail!("git ls-files failed: {}", String::from_utf8_lossy(&listed.stderr));
        }
        let mut paths = Vec::new();
        for path in String::from_utf8(listed.stdout).context("a file name is not UTF-8")?.split_terminator('\0') {
            let (from, to) = (root.join(path), copy.tree.join(path));
            // Git also lists files that have been deleted but not committed.
            let Ok(content) = fs::read(&from) else { continue };
            if fs::read(&to).ok().as_ref() != Some(&content) {
                let context = || format!("write {}", to.display());
                fs::create_dir_all(to.parent().unwrap_or(&to)).with_context(context)?;
                fs::write(&to, content).with_context(context)?;
            }
            paths.push(to);
        }
        paths.sort();
        remove_others(&copy.tree, &paths).with_context(|| format!("tidy {}", copy.tree.display()))?;
        Ok(copy)
    }

    /// Applies a patch to the copy.
    pub(super) fn apply(&self, patch: &Path, options: &[&str]) -> Result<()> {
        let mut apply = Command::new("git");
        apply.arg("apply").args(options).arg(patch).current_dir(&self.tree);
        // Without it git finds the repository around the copy, and paths would be relative to that.
        let ceiling = self.tree.parent().unwrap_or(&self.tree);
        let applied = apply.env("GIT_CEILING_DIRECTORIES", ceiling).output().context("run git apply")?;
        if !applied.status.success() {
            bail!("{} does not apply: {}", patch.display(), String::from_utf8_lossy(&applied.stderr));
        }
        Ok(())
    }
}

/// Removes every file of `dir` that is not in `keep`, which is sorted.
fn remove_others(dir: &Path, keep: &[PathBuf]) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, keep)?;
        } else if keep.binary_search(&path).is_err() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
