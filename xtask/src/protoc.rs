//! Installs protoc at the path set in `.cargo/config.toml`, for etcd-client's build script.

use std::fs;
use std::path::Path;
use std::process;

use anyhow::{Context as _, Result};
use gauntlet_stack::workspace_root;

/// Copies protoc and its include files from their crate to `.cache/protoc`, unless this version is there already.
pub(crate) fn install() -> Result<()> {
    let dir = workspace_root().join(".cache/protoc");
    let protoc = protoc_bin_vendored::protoc_bin_path().context("find the protoc of this platform")?;
    let include = protoc_bin_vendored::include_path().context("find protoc's include files")?;
    // The path contains the crate's version.
    let source = protoc.display().to_string();
    let is_installed = |dir: &Path| fs::read_to_string(dir.join("source")).is_ok_and(|found| found == source);
    if is_installed(&dir) {
        return Ok(());
    }
    // Copied to a temporary directory and renamed, so that a concurrent command never sees a part of it.
    let partial = dir.with_extension(process::id().to_string());
    let _ = fs::remove_dir_all(&partial);
    copy(&protoc, &partial.join("bin/protoc"))?;
    copy(&include, &partial.join("include"))?;
    fs::write(partial.join("source"), &source).with_context(|| format!("write {}", partial.display()))?;
    let _ = fs::remove_dir_all(&dir);
    let renamed = fs::rename(&partial, &dir);
    if renamed.is_err() && is_installed(&dir) {
        // A concurrent command has installed it first.
        return fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()));
    }
    renamed.with_context(|| format!("rename {} to {}", partial.display(), dir.display()))
}

/// Copies a file, or a directory with its content.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("copy {} to {}", from.display(), to.display());
    if from.is_dir() {
        for entry in fs::read_dir(from).with_context(context)? {
            let entry = entry.with_context(context)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    fs::copy(from, to).map(drop).with_context(context)
}
