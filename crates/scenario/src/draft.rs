//! Scenario directories that are being filled, within limits.

use std::{
    fs,
    io::{Read, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use sha2::{Digest as _, Sha256};

use crate::{
    digest::Digest,
    files::{Contents, FileError, FileLimits, Result, at, is_program, refused, relative},
    seal::Seal,
};

/// A scenario's directory, below the directory that a kept draft becomes.
pub(crate) const FILES: &str = "files";
/// The file that describes the scenario.
const DOCUMENT: &str = "scenario.yaml";
/// The seal of the directory, beside it.
pub(crate) const SEAL: &str = "seal";

/// A directory that is being filled. Dropping it removes it, unless it was kept.
#[derive(Debug)]
pub(crate) struct Draft {
    dir: tempfile::TempDir,
    limits: FileLimits,
    contents: Contents,
    files: Vec<(String, u64, Digest)>,
}

impl Draft {
    pub(crate) fn within(parent: &Path, limits: &FileLimits) -> Result<Self> {
        fs::create_dir_all(parent).map_err(at(parent))?;
        let dir = tempfile::Builder::new()
            .prefix("draft-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .map_err(at(parent))?;
        fs::create_dir(dir.path().join(FILES)).map_err(at(dir.path()))?;
        Ok(Self { dir, limits: limits.clone(), contents: Contents::default(), files: Vec::new() })
    }

    pub(crate) fn limits(&self) -> &FileLimits {
        &self.limits
    }

    /// How many bytes an archive may still unpack to, headers and padding included.
    pub(crate) fn room(&self) -> u64 {
        let headers = (self.limits.count as u64).saturating_mul(4096);
        self.limits.total.saturating_sub(self.contents.bytes).saturating_add(headers)
    }

    /// Creates a file. The caller must write exactly the content of that size and digest, or drop the draft.
    pub(crate) fn create(&mut self, title: &str, size: u64, content: Digest) -> Result<fs::File> {
        let (title, file) = self.create_empty(title, size)?;
        self.files.push((title, size, content));
        Ok(file)
    }

    fn create_empty(&mut self, title: &str, size: u64) -> Result<(String, fs::File)> {
        let title = relative(title)?;
        self.contents.add_file(&title, size, &self.limits)?;
        let path = self.dir.path().join(FILES).join(&title);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(at(&path))?;
        Ok((title, file))
    }

    /// Copies a file of exactly `size` bytes and returns the digest of its content.
    pub(crate) fn copy(&mut self, title: &str, size: u64, from: impl Read) -> Result<Digest> {
        let (path, mut to) = self.create_empty(title, size)?;
        let mut hash = Sha256::new();
        let mut from = from.take(size.saturating_add(1));
        let mut buffer = vec![0; 64 * 1024];
        let mut copied = 0u64;
        loop {
            let count = from.read(&mut buffer).map_err(|error| FileError::Io(title.into(), error))?;
            let chunk = buffer.get(..count).unwrap_or_default();
            if chunk.is_empty() {
                break;
            }
            copied += chunk.len() as u64;
            hash.update(chunk);
            to.write_all(chunk).map_err(|error| FileError::Io(title.into(), error))?;
        }
        if copied != size {
            return refused(format!("file {title:?} does not have the announced size of {size} bytes"));
        }
        let content = Digest::finish(hash);
        self.files.push((path, size, content));
        Ok(content)
    }

    /// Makes the files read-only, and scripts and ELF programs executable, seals and syncs them, and renames the directory to `to`. An existing
    /// `to` is left as it is. Only the manager may read `scenario.yaml`, which has the flags.
    pub(crate) fn keep(self, to: &Path) -> Result<()> {
        let mut seal = Seal::default();
        for (title, size, content) in self.files {
            let path = self.dir.path().join(FILES).join(&title);
            let file = fs::File::open(&path).map_err(at(&path))?;
            let mut magic = Vec::with_capacity(4);
            (&file).take(4).read_to_end(&mut magic).map_err(at(&path))?;
            let mode = if title == DOCUMENT {
                0o400
            } else if is_program(&magic) {
                0o555
            } else {
                0o444
            };
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(at(&path))?;
            file.sync_all().map_err(at(&path))?;
            seal.add(title, size, content, mode);
        }
        let path = self.dir.path().join(SEAL);
        seal.write(&path).map_err(at(&path))?;
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        match fs::rename(self.dir.path(), to) {
            Ok(()) => {
                // The directory was renamed, so there is nothing to remove.
                let _ = self.dir.keep();
                to.parent().map_or(Ok(()), |parent| {
                    fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(at(parent))
                })
            }
            Err(_) if to.is_dir() => Ok(()),
            Err(error) => Err(FileError::Io(to.to_owned(), error)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn kept_draft_is_read_only_and_dropped_draft_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let limits = FileLimits::default();
        drop(Draft::within(dir.path(), &limits).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        let mut draft = Draft::within(dir.path(), &limits).unwrap();
        draft.copy("bin/run", 9, &b"#!/bin/sh"[..]).unwrap();
        draft.copy("data", 4, &b"data"[..]).unwrap();
        draft.copy("scenario.yaml", 5, &b"flags"[..]).unwrap();
        assert!(draft.copy("longer", 2, &b"data"[..]).is_err() && draft.copy("shorter", 9, &b"data"[..]).is_err());
        let place = dir.path().join("kept/x");
        draft.keep(&place).unwrap();
        let mode = |name| fs::metadata(place.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("files/bin/run"), mode("files/data"), mode("seal")), (0o555, 0o444, 0o400));
        assert_eq!(mode("files/scenario.yaml"), 0o400);

        let mut second = Draft::within(dir.path(), &limits).unwrap();
        second.copy("data", 5, &b"other"[..]).unwrap();
        second.keep(&place).unwrap();
        assert_eq!(fs::read(place.join("files/data")).unwrap(), b"data", "the first stays");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
    }
}
