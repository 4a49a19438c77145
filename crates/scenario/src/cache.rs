//! Scenario directories kept by digest: `<root>/sha256/<hex>/`, complete from the moment they have that name, and read-only.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    digest::Digest,
    files::{Draft, FileLimits, Result, at},
};

/// A draft older than this was left by a crash.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// What was used more recently is not evicted: whoever asked for it may not have stored that it refers to it.
const RECENT: Duration = Duration::from_secs(3600);

/// What an eviction came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Scenarios that were removed.
    pub scenarios: usize,
    /// Bytes that they held.
    pub bytes: u64,
    /// Bytes that are still kept.
    pub left: u64,
}

/// A directory that is kept.
struct Kept {
    place: PathBuf,
    digest: Digest,
    bytes: u64,
    /// The time of modification of the directory is the time of its last use.
    used: SystemTime,
}

/// Safe for several processes: a directory appears by one rename, whoever comes second leaves the first in place.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(crate) fn open(root: &Path) -> Result<Self> {
        // Instances use what is kept, from directories of their own.
        let cache = Self { root: std::path::absolute(root).map_err(at(root))? };
        for dir in [cache.root.join("sha256"), cache.drafts()] {
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
    pub(crate) fn place(&self, digest: Digest) -> PathBuf {
        self.root.join("sha256").join(digest.to_hex())
    }

    /// The directory of that digest, if it is kept; it counts as used now.
    pub(crate) fn find(&self, digest: Digest) -> Option<PathBuf> {
        let place = self.place(digest);
        if !place.is_dir() {
            return None;
        }
        // One that cannot be marked only seems older than it is.
        let _ = fs::File::open(&place).and_then(|dir| dir.set_modified(SystemTime::now()));
        Some(place)
    }

    /// How many bytes are kept.
    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(self.kept()?.iter().map(|kept| kept.bytes).sum())
    }

    /// Removes what was used longest ago and is not `in_use`, until no more than `limit` bytes are kept or nothing is left to remove.
    pub(crate) fn evict(&self, limit: u64, in_use: &BTreeSet<String>) -> Result<Evicted> {
        let mut all = self.kept()?;
        let mut done = Evicted { scenarios: 0, bytes: 0, left: all.iter().map(|kept| kept.bytes).sum() };
        let now = SystemTime::now();
        all.retain(|kept| {
            !in_use.contains(&kept.digest.to_string()) && now.duration_since(kept.used).is_ok_and(|age| age > RECENT)
        });
        all.sort_by_key(|kept| kept.used);
        for kept in all {
            if done.left <= limit {
                break;
            }
            // Out of its place whole, so that nobody finds half of it; what a crash leaves there goes with the drafts.
            let removed = tempfile::tempdir_in(self.drafts()).map_err(at(&kept.place))?;
            match fs::rename(&kept.place, removed.path().join("evicted")) {
                // Somebody else was first.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                moved => moved.and_then(|()| removed.close()).map_err(at(&kept.place))?,
            }
            done.scenarios += 1;
            done.bytes += kept.bytes;
            done.left = done.left.saturating_sub(kept.bytes);
        }
        Ok(done)
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        let dir = self.root.join("sha256");
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))?.flatten() {
            let (place, name) = (entry.path(), entry.file_name());
            // What goes meanwhile is not kept.
            if let (Some(Ok(digest)), Ok(used), Ok(bytes)) = (
                name.to_str().map(Digest::from_hex),
                entry.metadata().and_then(|meta| meta.modified()),
                bytes_below(&place),
            ) {
                all.push(Kept { digest, place, bytes, used });
            }
        }
        Ok(all)
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

/// The sizes of all files below a directory together.
fn bytes_below(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { bytes_below(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Keeps a scenario of a hundred bytes that was last used so many hours ago.
    fn keep(cache: &Cache, name: &str, hours: u64) -> Digest {
        let digest = Digest::of(name.as_bytes());
        let place = cache.place(digest);
        let mut draft = cache.draft(&FileLimits::default()).unwrap();
        draft.copy("deep/down/file", 100, &[7; 100][..]).unwrap();
        draft.keep(&place).unwrap();
        let used = SystemTime::now() - Duration::from_secs(3600 * hours);
        fs::File::open(place).unwrap().set_modified(used).unwrap();
        digest
    }

    #[test]
    fn what_was_used_longest_ago_and_nobody_needs_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let [needed, old, older, recent, used] =
            [("a", 9), ("b", 4), ("c", 5), ("d", 0), ("e", 6)].map(|(name, hours)| keep(&cache, name, hours));
        assert!(cache.find(used).is_some(), "used now");
        let there = |digest: Digest| cache.place(digest).is_dir();
        let in_use = BTreeSet::from([needed.to_string()]);
        assert_eq!(cache.bytes().unwrap(), 500);
        let evict = |limit| cache.evict(limit, &in_use).unwrap();
        assert_eq!(evict(500), Evicted { scenarios: 0, bytes: 0, left: 500 });
        assert_eq!(evict(499), Evicted { scenarios: 1, bytes: 100, left: 400 });
        assert!(!there(older) && there(old));
        assert_eq!(evict(0), Evicted { scenarios: 1, bytes: 100, left: 300 });
        assert!([needed, recent, used].iter().all(|digest| there(*digest)) && !there(old));
        assert_eq!(fs::read_dir(cache.drafts()).unwrap().count(), 0, "nothing is left over");
    }
}
