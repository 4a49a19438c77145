//! The cache of scenarios: `<root>/sha256/<hex>/`, complete from the moment it has that name. It holds the scenario's directory, `files`, and
//! its seal, which instances can't see. Both are compared before the directory is used.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use crate::{
    digest::Digest,
    draft::{Draft, FILES, SEAL},
    files::{FileLimits, Result, at},
    seal::{Seal, Stamps},
};

/// A draft older than this is left over from a crash.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// Scenarios with more files and directories than this are checked on a blocking thread.
const MANY: usize = 64;
/// Scenarios used within this time aren't evicted: a caller that resolved one may not have stored its digest yet.
const RECENT: Duration = Duration::from_secs(3600);

/// The result of an eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// The number of scenarios removed.
    pub scenarios: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// The size of what is still cached, in bytes.
    pub left: u64,
}

/// A cached scenario.
struct Entry {
    digest: Digest,
    bytes: u64,
    /// The directory's modification time.
    used: SystemTime,
}

/// A cache directory. Several processes may share it: a scenario appears by one rename, and the first to rename wins.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
    /// What shows changes to the scenarios that this process has verified.
    verified: Arc<Mutex<BTreeMap<Digest, Arc<Stamps>>>>,
}

/// A scenario that this process has verified before.
pub(crate) struct Verified {
    cache: Cache,
    digest: Digest,
    stamps: Arc<Stamps>,
}

impl Verified {
    /// Whether checking takes so many system calls that it belongs on a blocking thread.
    pub(crate) fn is_large(&self) -> bool {
        self.stamps.count() > MANY
    }

    /// Returns the scenario's directory unless it has changed since, and marks it as used now.
    pub(crate) fn check(self) -> Option<PathBuf> {
        self.stamps.are_current().then(|| self.cache.used(self.digest))
    }
}

/// A cached scenario isn't as it was unpacked.
#[derive(Debug)]
pub(crate) struct Damaged(pub(crate) String);

impl Cache {
    pub(crate) fn open(root: &Path) -> Result<Self> {
        // Instances use the paths from their own working directories.
        let cache = Self { root: std::path::absolute(root).map_err(at(root))?, verified: Arc::default() };
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

    fn entry(&self, digest: Digest) -> PathBuf {
        self.root.join("sha256").join(digest.to_hex())
    }

    fn used(&self, digest: Digest) -> PathBuf {
        let entry = self.entry(digest);
        // If this fails, the scenario only looks older than it is.
        let _ = fs::File::open(&entry).and_then(|dir| dir.set_modified(SystemTime::now()));
        entry.join(FILES)
    }

    /// Returns a scenario that this process has verified.
    pub(crate) fn verified(&self, digest: Digest) -> Option<Verified> {
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = verified.get(&digest)?.clone();
        Some(Verified { cache: self.clone(), digest, stamps })
    }

    /// Returns the directory of a scenario if it is cached, and marks it as used now. Reads all of its files to verify it.
    ///
    /// # Errors
    /// The scenario is damaged, and is no longer cached.
    pub(crate) fn find(&self, digest: Digest, limits: &FileLimits) -> Result<Option<PathBuf>, Damaged> {
        let entry = self.entry(digest);
        if !entry.is_dir() {
            return Ok(None);
        }
        let verify = || Seal::verify(&entry.join(SEAL), &entry.join(FILES), limits);
        // Another process may be replacing it.
        match verify().or_else(|_| verify()) {
            Ok(stamps) => {
                self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, Arc::new(stamps));
                Ok(Some(self.used(digest)))
            }
            Err(problem) => {
                self.remove(digest).map_err(|error| Damaged(format!("{problem}; it can't be removed: {error}")))?;
                Err(Damaged(problem))
            }
        }
    }

    /// Caches a draft under its digest, unless another process was faster. Returns the scenario's directory.
    pub(crate) fn keep(&self, draft: Draft, digest: Digest) -> Result<PathBuf> {
        let entry = self.entry(digest);
        draft.keep(&entry)?;
        Ok(entry.join(FILES))
    }

    /// Renamed first, so that nobody finds it half removed. After a crash it is removed with the old drafts.
    fn remove(&self, digest: Digest) -> Result<()> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).remove(&digest);
        let entry = self.entry(digest);
        let removed = tempfile::tempdir_in(self.drafts()).map_err(at(&entry))?;
        match fs::rename(&entry, removed.path().join("removed")) {
            // Another process removed it first.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            moved => moved.and_then(|()| removed.close()).map_err(at(&entry)),
        }
    }

    /// Returns the size of all entries in bytes.
    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(self.entries()?.iter().map(|entry| entry.bytes).sum())
    }

    /// Removes the least recently used entries that aren't `in_use`, until at most `limit` bytes are left or nothing more may be removed.
    pub(crate) fn evict(&self, limit: u64, in_use: &BTreeSet<String>) -> Result<Evicted> {
        let mut all = self.entries()?;
        let mut done = Evicted { scenarios: 0, bytes: 0, left: all.iter().map(|entry| entry.bytes).sum() };
        let now = SystemTime::now();
        all.retain(|entry| {
            !in_use.contains(&entry.digest.to_string()) && now.duration_since(entry.used).is_ok_and(|age| age > RECENT)
        });
        all.sort_by_key(|entry| entry.used);
        for entry in all {
            if done.left <= limit {
                break;
            }
            self.remove(entry.digest)?;
            done.scenarios += 1;
            done.bytes += entry.bytes;
            done.left = done.left.saturating_sub(entry.bytes);
        }
        Ok(done)
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let dir = self.root.join("sha256");
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))?.flatten() {
            let name = entry.file_name();
            // Skips entries that are removed meanwhile.
            if let (Some(Ok(digest)), Ok(used), Ok(bytes)) = (
                name.to_str().map(Digest::from_hex),
                entry.metadata().and_then(|meta| meta.modified()),
                bytes_below(&entry.path().join(FILES)),
            ) {
                all.push(Entry { digest, bytes, used });
            }
        }
        Ok(all)
    }

    /// Creates a draft on the cache's file system.
    pub(crate) fn draft(&self, limits: &FileLimits) -> Result<Draft> {
        Draft::within(&self.drafts(), limits)
    }

    /// Creates an unnamed temporary file.
    pub(crate) fn scratch(&self) -> Result<fs::File> {
        let drafts = self.drafts();
        tempfile::tempfile_in(&drafts).map_err(at(&drafts))
    }
}

/// Returns the total size of all files below a directory.
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

    /// Caches a scenario of a hundred bytes that was last used `hours` ago.
    fn insert(cache: &Cache, name: &str, hours: u64) -> Digest {
        let digest = Digest::of(name.as_bytes());
        let mut draft = cache.draft(&FileLimits::default()).unwrap();
        draft.copy("deep/down/file", 100, &[7; 100][..]).unwrap();
        cache.keep(draft, digest).unwrap();
        let used = SystemTime::now() - Duration::from_secs(3600 * hours);
        fs::File::open(cache.entry(digest)).unwrap().set_modified(used).unwrap();
        digest
    }

    #[test]
    fn least_recently_used_entries_are_evicted_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let [needed, old, older, recent, used] =
            [("a", 9), ("b", 4), ("c", 5), ("d", 0), ("e", 6)].map(|(name, hours)| insert(&cache, name, hours));
        assert!(cache.find(used, &FileLimits::default()).unwrap().is_some(), "used now");
        let there = |digest: Digest| cache.entry(digest).is_dir();
        let in_use = BTreeSet::from([needed.to_string()]);
        assert_eq!(cache.bytes().unwrap(), 500);
        let evict = |limit| cache.evict(limit, &in_use).unwrap();
        assert_eq!(evict(500), Evicted { scenarios: 0, bytes: 0, left: 500 });
        assert_eq!(evict(499), Evicted { scenarios: 1, bytes: 100, left: 400 });
        assert!(!there(older) && there(old));
        assert_eq!(evict(0), Evicted { scenarios: 1, bytes: 100, left: 300 });
        assert!([needed, recent, used].iter().all(|digest| there(*digest)) && !there(old));
        assert_eq!(fs::read_dir(cache.drafts()).unwrap().count(), 0, "no draft is left");
    }
}
