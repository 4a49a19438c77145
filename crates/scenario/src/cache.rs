//! Scenario directories kept by digest: `<root>/sha256/<hex>/`, complete from the moment they have that name, and read-only.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::files::{Draft, FileLimits, Result, at, refused};

/// A draft older than this was left by a crash.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Safe for several processes: a directory appears by one rename, whoever comes second leaves the first in place.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let cache = Self { root: root.to_owned() };
        for dir in [root.join("sha256"), cache.drafts()] {
            fs::create_dir_all(&dir).map_err(at(&dir))?;
        }
        let drafts = cache.drafts();
        for entry in fs::read_dir(&drafts).map_err(at(&drafts))?.flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).ok();
            let age = age.and_then(|modified| SystemTime::now().duration_since(modified).ok());
            if age.is_some_and(|age| age > ABANDONED) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(cache)
    }

    fn drafts(&self) -> PathBuf {
        self.root.join("drafts")
    }

    /// Where the directory of that digest is, or would be.
    pub(crate) fn place(&self, digest: &str) -> Result<PathBuf> {
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return refused(format!("digest {digest:?} is not sha256: and 64 lowercase hexadecimal characters"));
        }
        Ok(self.root.join("sha256").join(hex))
    }

    /// The directory of that digest, if it is kept.
    pub(crate) fn find(&self, digest: &str) -> Result<Option<PathBuf>> {
        let place = self.place(digest)?;
        Ok(place.is_dir().then_some(place))
    }

    /// A directory to fill, on the same file system.
    pub(crate) fn draft(&self, limits: &FileLimits) -> Result<Draft> {
        Draft::within(&self.drafts(), limits)
    }

    /// A scratch file without a name.
    pub(crate) fn scratch(&self) -> Result<fs::File> {
        let drafts = self.drafts();
        tempfile::tempfile_in(&drafts).map_err(at(&drafts))
    }
}
