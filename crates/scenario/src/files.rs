//! The files of a scenario: allowed names and size limits.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::Error;
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;

/// Limits on the files of a scenario.
#[derive(Debug, Clone)]
pub struct FileLimits {
    /// The largest file, in bytes.
    pub file: u64,
    /// The total size, in bytes.
    pub total: u64,
    /// The number of files.
    pub count: usize,
}

impl Default for FileLimits {
    /// 128 MiB per file, 512 MiB in total, 2048 files.
    fn default() -> Self {
        Self { file: 128 << 20, total: 512 << 20, count: 2048 }
    }
}

const MAX_PATH_BYTES: usize = 512;
const MAX_NAME_BYTES: usize = 255;
const MAX_DEPTH: usize = 16;

/// Why a file can't be part of a scenario, or can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// The scenario is at fault. The text may be shown to the client.
    #[error("{0}")]
    Refused(String),
    /// The file system is at fault.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

impl FileError {
    /// Converts to the error of resolving `reference`: clients see faults of the scenario, only operators those of the file system.
    pub(crate) fn of_scenario(self, reference: &str) -> Error {
        match self {
            Self::Refused(problem) => Error::ScenarioInvalid { reference: reference.to_owned(), problem },
            Self::Io(..) => Error::Internal(format!("scenario {reference:?}: {self}")),
        }
    }
}

pub(crate) type Result<T, E = FileError> = std::result::Result<T, E>;

pub(crate) fn refused<T>(text: impl Into<String>) -> Result<T> {
    Err(FileError::Refused(text.into()))
}

/// For `map_err`: adds the path.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError + '_ {
    |error| FileError::Io(path.to_owned(), error)
}

/// Runs file system work on a blocking thread.
///
/// # Cancel safety
/// Dropping the future doesn't stop the work. It finishes within the limits on files and removes its draft.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = tracing::Span::current();
    let work = tokio::task::spawn_blocking(move || span.in_scope(work));
    work.await.unwrap_or_else(|error| Err(Error::Internal(format!("scenario files: {error}"))))
}

/// Checks the name of a layer or an archive entry: a relative path of plain names that can't leave its directory.
pub(crate) fn relative(title: &str) -> Result<String> {
    let shown: String = title.chars().take(80).collect();
    let wrong = |rule: &str| refused(format!("file name {shown:?}: {rule}"));
    if title.len() > MAX_PATH_BYTES {
        return wrong("longer than 512 bytes");
    }
    if title.contains(|c: char| c.is_control() || c == '\\') {
        return wrong("holds a control character or a backslash");
    }
    let path = title.strip_prefix("./").unwrap_or(title);
    let names: Vec<&str> = path.split('/').collect();
    if path.starts_with('/') || names.iter().any(|name| matches!(*name, "" | "." | "..")) {
        return wrong("must be a relative path of plain names, without . and ..");
    }
    if names.len() > MAX_DEPTH || names.iter().any(|name| name.len() > MAX_NAME_BYTES) {
        return wrong("more than 16 names deep, or a name over 255 bytes");
    }
    Ok(path.to_owned())
}

/// The paths and bytes of a scenario so far. Rejects paths that differ by case alone and paths that are both file and directory.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Lowercase paths; true for files.
    paths: BTreeMap<String, bool>,
    files: usize,
    pub(crate) bytes: u64,
}

impl Contents {
    /// Adds a file of that size.
    pub(crate) fn add_file(&mut self, path: &str, size: u64, limits: &FileLimits) -> Result<()> {
        self.files += 1;
        if self.files > limits.count {
            return refused(format!("more than {} files", limits.count));
        }
        self.grow(path, size, limits)?;
        if size > limits.file {
            return refused(format!("file {path:?} is {size} bytes; at most {}", limits.file));
        }
        let folded = path.to_lowercase();
        for (end, _) in folded.match_indices('/') {
            if let Some(directory) = folded.get(..end)
                && self.paths.insert(directory.to_owned(), false) == Some(true)
            {
                return refused(format!("file name {path:?}: {directory:?} is a file already"));
            }
        }
        match self.paths.insert(folded, true) {
            None => Ok(()),
            Some(_) => refused(format!("file name {path:?} is there twice, or differs from another by case alone")),
        }
    }

    fn grow(&mut self, path: &str, size: u64, limits: &FileLimits) -> Result<()> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > limits.total {
            return refused(format!("with {path:?} the files hold over {} bytes together", limits.total));
        }
        Ok(())
    }
}

/// A file of a directory.
#[derive(Debug)]
pub(crate) struct Listed {
    /// Relative to the directory, with `/`.
    pub(crate) path: String,
    pub(crate) size: u64,
}

/// Lists the files of a directory by path and checks them against the limits. Rejects links and special files.
pub(crate) fn list(dir: &Path, limits: &FileLimits) -> Result<Vec<Listed>> {
    let mut files = Vec::new();
    let mut contents = Contents::default();
    let mut ahead = vec![String::new()];
    while let Some(within) = ahead.pop() {
        let path = dir.join(&within);
        for entry in fs::read_dir(&path).map_err(at(&path))? {
            let entry = entry.map_err(at(&path))?;
            let Ok(name) = entry.file_name().into_string() else {
                return refused(format!("file name {:?} is not UTF-8", entry.file_name()));
            };
            let title = if within.is_empty() { name } else { format!("{within}/{name}") };
            let title = relative(&title)?;
            let meta = entry.metadata().map_err(at(&entry.path()))?;
            if meta.is_dir() {
                ahead.push(title);
            } else if meta.is_file() {
                contents.add_file(&title, meta.len(), limits)?;
                files.push(Listed { path: title, size: meta.len() });
            } else {
                return refused(format!("{title:?} is a link or a special file; put the file itself there"));
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Opens a listed file. Doesn't follow a link that has replaced it since.
pub(crate) fn open(dir: &Path, listed: &Listed) -> Result<fs::File> {
    let path = dir.join(&listed.path);
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let flags = i32::try_from(flags).unwrap_or_default();
    fs::OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(at(&path))
}

/// Whether a file that starts with these bytes is made executable: scripts (`#!`) and ELF programs.
pub(crate) fn is_program(start: &[u8]) -> bool {
    start.starts_with(b"#!") || start.starts_with(b"\x7fELF")
}

/// Computes the digest of a directory from its paths, sizes and content digests, sorted by path.
pub(crate) struct TreeDigest(Sha256);

impl TreeDigest {
    pub(crate) fn new() -> Self {
        Self(Sha256::new_with_prefix(b"gauntlet scenario directory 1\n"))
    }

    pub(crate) fn add(&mut self, path: &str, size: u64, content: Digest) {
        self.0.update(format!("{}:{path}:{size}:", path.len()));
        self.0.update(content.as_bytes());
    }

    pub(crate) fn finish(self) -> Digest {
        Digest::finish(self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unsafe_names_are_rejected() {
        for title in [
            "",
            ".",
            "..",
            "/",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a/..",
            "a//b",
            "a/",
            "./",
            "./../x",
            "a/./b",
            "a\0b",
            "a\nb",
            "a\\..\\b",
            "C:\\x",
        ] {
            assert!(relative(title).is_err(), "{title:?}");
        }
        assert!(relative(&"x".repeat(256)).is_err() && relative(&"a/".repeat(20)).is_err());
        assert!(relative(&"a/".repeat(300)).is_err());
        assert_eq!(relative("./a/..b").unwrap(), "a/..b");
        assert_eq!(relative("schöne datei.txt").unwrap(), "schöne datei.txt");
    }

    #[test]
    fn colliding_names_are_rejected() {
        let limits = FileLimits::default();
        let collides = |paths: [&str; 2]| {
            let mut contents = Contents::default();
            paths.iter().map(|path| contents.add_file(path, 1, &limits)).collect::<Result<Vec<_>>>().is_err()
        };
        assert!(collides(["a", "a"]) && collides(["a", "A"]) && collides(["Ä", "ä"]));
        assert!(
            collides(["a", "a/b"]) && collides(["a/b", "a"]) && collides(["a/b", "A/B"]) && collides(["a/b/c", "a/B"])
        );
        assert!(!collides(["a/b", "a/c"]) && !collides(["a", "ab"]) && !collides(["a/b", "ab"]));
    }

    #[test]
    fn limits_are_enforced() {
        let limits = FileLimits { file: 10, total: 15, count: 2 };
        let mut contents = Contents::default();
        assert!(contents.add_file("big", 11, &limits).is_err());
        let mut contents = Contents::default();
        contents.add_file("a", 10, &limits).unwrap();
        assert!(contents.add_file("b", 10, &limits).is_err());
        let mut contents = Contents::default();
        contents.add_file("a", 1, &limits).unwrap();
        contents.add_file("b", 1, &limits).unwrap();
        assert!(contents.add_file("c", 1, &limits).is_err());
    }

    #[test]
    fn links_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        let error = list(dir.path(), &FileLimits::default()).unwrap_err().to_string();
        assert!(error.contains("\"link\" is a link"), "{error}");
        let listed = Listed { path: "link".into(), size: 1 };
        assert!(open(dir.path(), &listed).is_err());
    }

    proptest! {
        #[test]
        fn checked_names_never_leave_their_directory(title in "(\\.|\\.\\.|/|\\./|a|\\\\|\0|\\PC){0,12}") {
            if let Ok(path) = relative(&title) {
                let mut depth = 0i32;
                for part in Path::new(&path).components() {
                    prop_assert!(matches!(part, std::path::Component::Normal(_)), "{title:?}");
                    depth += 1;
                }
                prop_assert!(depth > 0);
                prop_assert!(Path::new("/root/dir").join(&path).starts_with("/root/dir"));
            }
        }
    }
}
