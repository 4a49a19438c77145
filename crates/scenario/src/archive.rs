//! Unpacks directories that are stored as one gzipped tar.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::PathBuf,
};

use flate2::read::GzDecoder;
use tar::{Archive, EntryType};

use crate::{
    draft::Draft,
    files::{FileError, Result, refused, relative},
};

/// Unpacks an archive whose names are all below `title` into the draft, within the draft's limits. Rejects links and special files; skips
/// directory entries, because files bring their directories.
pub(crate) fn unpack(mut packed: File, title: &str, draft: &mut Draft) -> Result<()> {
    let broken = |error: std::io::Error| FileError::Refused(format!("archive {title:?}: {error}"));
    packed.seek(SeekFrom::Start(0)).map_err(|error| FileError::Io(PathBuf::from(title), error))?;
    // Bounds what is unpacked, whatever the archive announces. Reads one gzip member.
    let bytes = GzDecoder::new(packed).take(draft.room());
    let mut archive = Archive::new(bytes);
    let mut entries = 0usize;
    // Raw, because the library reads extension headers into memory whole, whatever their size.
    for entry in archive.entries().map_err(broken)?.raw(true) {
        let mut entry = entry.map_err(broken)?;
        entries += 1;
        if entries > draft.limits().count.saturating_mul(2) {
            return refused(format!("archive {title:?} has more than {} entries", draft.limits().count * 2));
        }
        let path = entry.path_bytes();
        let Ok(path) = std::str::from_utf8(&path).map(ToOwned::to_owned) else {
            return refused(format!("archive {title:?} has a name that is not UTF-8"));
        };
        match entry.header().entry_type() {
            EntryType::Directory => continue,
            EntryType::Regular | EntryType::Continuous => {}
            EntryType::XGlobalHeader => continue,
            kind => {
                let fix = "only files and directories are unpacked, with names of at most 100 bytes";
                return refused(format!("archive {title:?}: {path:?} is an entry of kind {kind:?}; {fix}"));
            }
        }
        let path = relative(&path)?;
        if !path.strip_prefix(title).is_some_and(|rest| rest.starts_with('/')) {
            return refused(format!("archive {title:?}: {path:?} does not lie under its title"));
        }
        let size = entry.size();
        draft.copy(&path, size, &mut entry)?;
    }
    Ok(())
}
