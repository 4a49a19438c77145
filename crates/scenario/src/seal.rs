//! The seal of a cached scenario: the digests of its files, written when they were unpacked and checked when they are used.

use std::{
    fs::{self, Metadata},
    io::{self, Read},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    digest::Digest,
    files::{self, FileLimits},
};

/// The largest seal, in bytes: more than that of the most files with the longest names.
const MAX_BYTES: u64 = 4 << 20;

/// The files of a scenario by path.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Seal {
    files: Vec<Sealed>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sealed {
    path: String,
    size: u64,
    /// 64 hexadecimal characters.
    sha256: String,
    mode: u32,
}

impl Seal {
    /// Adds a file. `mode` has the permission bits only.
    pub(crate) fn add(&mut self, path: String, size: u64, content: Digest, mode: u32) {
        self.files.push(Sealed { path, size, sha256: content.to_hex(), mode });
    }

    pub(crate) fn write(mut self, path: &Path) -> io::Result<()> {
        self.files.sort_by(|a, b| a.path.cmp(&b.path));
        let file = fs::File::create_new(path)?;
        serde_json::to_writer(&file, &self)?;
        file.set_permissions(fs::Permissions::from_mode(0o400))?;
        file.sync_all()
    }

    /// Compares the files in `dir` with the seal, byte by byte. Returns what shows later changes.
    ///
    /// # Errors
    /// How they differ, or why they can't be read.
    pub(crate) fn verify(seal: &Path, dir: &Path, limits: &FileLimits) -> Result<Stamps, String> {
        let unreadable = |error: &dyn std::fmt::Display| format!("the seal is unreadable: {error}");
        let mut bytes = Vec::new();
        let file = fs::File::open(seal).map_err(|error| unreadable(&error))?;
        file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(|error| unreadable(&error))?;
        let seal: Self = serde_json::from_slice(&bytes).map_err(|error| unreadable(&error))?;

        let listed = files::list(dir, limits).map_err(|error| error.to_string())?;
        // Before the content is read: a change while it is read shows in the stamps.
        let stamps = Stamps::take(dir, &listed).map_err(|error| error.to_string())?;
        for (found, sealed) in listed.iter().zip(&seal.files) {
            let file = files::open(dir, found).map_err(|error| error.to_string())?;
            let mode = file.metadata().map(|meta| meta.permissions().mode() & 0o7777);
            let hash = hash(file).map_err(|error| format!("{:?}: {error}", found.path))?;
            let (path, size) = (found.path.clone(), found.size);
            let found = Sealed { path, size, sha256: hash.to_hex(), mode: mode.unwrap_or_default() };
            if found != *sealed {
                return Err(format!("{:?} is not as it was unpacked", found.path));
            }
        }
        if listed.len() != seal.files.len() {
            return Err(format!("it has {} files instead of {}", listed.len(), seal.files.len()));
        }
        if stamps.are_current() { Ok(stamps) } else { Err("it changes while it is read".to_owned()) }
    }
}

fn hash(mut file: impl Read) -> io::Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest::finish(hash)),
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

/// The metadata of a scenario's files and directories. Any change to one of them changes its change time, which no program can set.
#[derive(Debug)]
pub(crate) struct Stamps(Vec<(PathBuf, Stamp)>);

/// Device, inode, mode, size, modification time and change time.
type Stamp = (u64, u64, u32, u64, (i64, i64), (i64, i64));

impl Stamps {
    fn take(dir: &Path, listed: &[files::Listed]) -> io::Result<Self> {
        let mut paths = vec![dir.to_owned()];
        for file in listed {
            // Directories show files that are added or removed.
            let parents = Path::new(&file.path).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
            paths.extend(parents.map(|parent| dir.join(parent)));
            paths.push(dir.join(&file.path));
        }
        paths.sort();
        paths.dedup();
        let stamped = paths.into_iter().map(|path| Ok((stamp(&fs::symlink_metadata(&path)?), path)));
        Ok(Self(stamped.map(|found| found.map(|(stamp, path)| (path, stamp))).collect::<io::Result<_>>()?))
    }

    /// Whether nothing has changed.
    pub(crate) fn are_current(&self) -> bool {
        self.0.iter().all(|(path, known)| fs::symlink_metadata(path).is_ok_and(|meta| stamp(&meta) == *known))
    }

    /// How many system calls a check makes.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

fn stamp(meta: &Metadata) -> Stamp {
    (
        meta.dev(),
        meta.ino(),
        meta.mode(),
        meta.size(),
        (meta.mtime(), meta.mtime_nsec()),
        (meta.ctime(), meta.ctime_nsec()),
    )
}
