//! The operator's keys for flags: a file with one key per line. New instances use the last one; each instance keeps the key that it began with.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use secrecy::zeroize::Zeroizing;

use crate::flag::FlagKey;

/// The most keys of a file.
const MAX_KEYS: usize = 256;
/// The largest file, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// The keys of a file, which is read again when it changes. Managers that share a store must share the file's content. `Debug` shows ids only.
#[derive(Clone)]
pub struct FlagKeys(Arc<Inner>);

struct Inner {
    /// `None` for a key that is in no file.
    file: Option<PathBuf>,
    loaded: Mutex<Loaded>,
}

#[derive(Clone)]
struct Loaded {
    version: Option<FileVersion>,
    keys: Arc<Vec<FlagKey>>,
}

/// Device, inode, size and modification time of a file.
type FileVersion = (u64, u64, u64, (i64, i64));

impl From<FlagKey> for FlagKeys {
    fn from(key: FlagKey) -> Self {
        let loaded = Loaded { version: None, keys: Arc::new(vec![key]) };
        Self(Arc::new(Inner { file: None, loaded: Mutex::new(loaded) }))
    }
}

impl FlagKeys {
    /// Reads a file of lines of 64 hexadecimal characters, or creates it with one random key, readable by its owner only. Blocks on the file
    /// system.
    ///
    /// # Errors
    /// I/O errors; `InvalidData` if the file holds anything else.
    pub fn load_or_create(file: &Path) -> io::Result<Self> {
        if matches!(fs::metadata(file), Err(error) if error.kind() == io::ErrorKind::NotFound) {
            FlagKey::create(file)?;
        }
        let loaded = Loaded::read(file)?;
        Ok(Self(Arc::new(Inner { file: Some(file.to_owned()), loaded: Mutex::new(loaded) })))
    }

    /// Returns the ids of the keys in the order of the file; the last one is used for new instances.
    pub fn ids(&self) -> Vec<String> {
        self.current().iter().map(FlagKey::id).collect()
    }

    /// Adds a random key to a file, which becomes the one for new instances. Returns its id. Managers notice it at their next create. Blocks on
    /// the file system.
    ///
    /// # Errors
    /// I/O errors; `NotFound` if there is no file; `InvalidData` if it holds anything but keys, or too many.
    pub fn rotate(file: &Path) -> io::Result<String> {
        if Loaded::read(file)?.keys.len() >= MAX_KEYS {
            return Err(invalid(
                file,
                &format!("has {MAX_KEYS} keys already; remove the oldest that no instance uses"),
            ));
        }
        let key = FlagKey::random()?;
        // One append: managers that read meanwhile see all of it or nothing, and a rotation beside this one adds a line of its own. Files may
        // end without a line break.
        let line = Zeroizing::new(format!("\n{}\n", *key.to_hex()));
        let mut opened = fs::OpenOptions::new().append(true).open(file)?;
        opened.write_all(line.as_bytes())?;
        opened.sync_all()?;
        Ok(key.id())
    }

    /// The key for new instances.
    pub(crate) fn active(&self) -> Option<FlagKey> {
        self.current().last().cloned()
    }

    /// The key with this id; without an id, the first: instances that have none began before there were several.
    pub(crate) fn get(&self, id: Option<&str>) -> Option<FlagKey> {
        let keys = self.current();
        match id {
            Some(id) => keys.iter().find(|key| key.id() == id).cloned(),
            None => keys.first().cloned(),
        }
    }

    /// Reads the file again if it has changed. A file that can't be used leaves the keys as they are, and is logged.
    fn current(&self) -> Arc<Vec<FlagKey>> {
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &self.0.file {
            let version = fs::metadata(file).map(|meta| version(&meta)).ok();
            if version != loaded.version {
                match Loaded::read(file) {
                    Ok(read) => *loaded = read,
                    Err(error) => {
                        tracing::warn!(%error, "cannot read the changed flag keys; using those read before");
                        // Logged once for each change.
                        loaded.version = version;
                    }
                }
            }
        }
        loaded.keys.clone()
    }
}

impl Loaded {
    fn read(file: &Path) -> io::Result<Self> {
        let opened = fs::File::open(file)?;
        let version = version(&opened.metadata()?);
        let mut text = Zeroizing::new(String::new());
        (&opened).take(MAX_BYTES).read_to_string(&mut text)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let keys = lines.map(|(at, line)| {
            let fix = "restore the file; if you delete it, a new key is created and varied flags change";
            let problem = || invalid(file, &format!("line {} must hold 64 hexadecimal characters; {fix}", at + 1));
            FlagKey::from_hex(line).ok_or_else(problem)
        });
        let keys = keys.collect::<io::Result<Vec<_>>>()?;
        if keys.is_empty() || keys.len() > MAX_KEYS {
            return Err(invalid(file, &format!("must hold 1 to {MAX_KEYS} lines of 64 hexadecimal characters")));
        }
        Ok(Self { version: Some(version), keys: Arc::new(keys) })
    }
}

impl fmt::Debug for FlagKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlagKeys").field(&self.ids()).finish()
    }
}

fn version(meta: &fs::Metadata) -> FileVersion {
    (meta.dev(), meta.ino(), meta.size(), (meta.mtime(), meta.mtime_nsec()))
}

fn invalid(file: &Path, problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {problem}", file.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn rotation_adds_a_key_that_readers_notice() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flag.key");
        // As an earlier build, or an operator, may have written it.
        fs::write(&file, "07".repeat(32)).unwrap();
        let keys = FlagKeys::load_or_create(&file).unwrap();
        let [first] = keys.ids().try_into().unwrap();
        let second = FlagKeys::rotate(&file).unwrap();
        assert_eq!(keys.ids(), [first.clone(), second.clone()]);
        assert_eq!(keys.active().unwrap().id(), second);
        assert_eq!(keys.get(None).unwrap().id(), first);
        assert_eq!(keys.get(Some(&first)).unwrap().id(), first);
        assert!(keys.get(Some("00000000")).is_none());
        assert_eq!(FlagKeys::load_or_create(&file).unwrap().ids(), keys.ids());
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.lines().filter(|line| !line.is_empty()).all(|line| !format!("{keys:?}").contains(line)));
    }

    #[test]
    fn created_file_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/flag.key");
        let keys = FlagKeys::load_or_create(&file).unwrap();
        FlagKeys::rotate(&file).unwrap();
        assert_eq!(keys.ids().len(), 2);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn broken_file_leaves_the_keys_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flag.key");
        assert_eq!(FlagKeys::rotate(&file).unwrap_err().kind(), io::ErrorKind::NotFound);
        let keys = FlagKeys::load_or_create(&file).unwrap();
        let before = keys.ids();
        for broken in ["", "\n \n", "short", &format!("{}\nshort", "07".repeat(32))] {
            fs::write(&file, broken).unwrap();
            assert_eq!(keys.ids(), before, "{broken:?}");
            assert_eq!(FlagKeys::load_or_create(&file).unwrap_err().kind(), io::ErrorKind::InvalidData, "{broken:?}");
            assert!(FlagKeys::rotate(&file).is_err());
        }
        fs::write(&file, "08".repeat(32)).unwrap();
        assert_ne!(keys.ids(), before);
    }
}
