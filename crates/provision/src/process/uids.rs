//! User ids of this machine, one for each instance.
//!
//! A file per id is locked while a process of its instance lives. The kernel counts many resources per user, so instances that shared one could
//! use up each other's.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::RangeInclusive,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use super::record::try_lock;

/// Takes an id that no instance of this directory has. It is free again once the file is closed in every process.
///
/// # Errors
/// If all ids are taken.
pub(super) fn take(dir: &Path, range: RangeInclusive<u32>, key: &str) -> io::Result<(u32, File)> {
    let (first, count) = (*range.start(), u64::from(range.end().saturating_sub(*range.start())) + 1);
    // Each instance starts at another id, so that taken ones are rarely tried.
    let start = key
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    for step in 0..count {
        let offset = (start % count + step) % count;
        let uid = first.saturating_add(u32::try_from(offset).unwrap_or(u32::MAX));
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(dir.join(uid.to_string()))?;
        if try_lock(&file)? {
            return Ok((uid, file));
        }
    }
    let last = range.end();
    Err(io::Error::other(format!("no free user id: instances have all from {first} to {last}; widen --instance-uids")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_id_is_taken_once_until_it_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let take = |key: &str| take(dir.path(), 10..=12, key);
        let mut held: Vec<_> = ["a", "b", "c"].map(|key| take(key).unwrap()).into();
        assert_eq!(held.iter().map(|(uid, _)| *uid).collect::<BTreeSet<_>>(), [10, 11, 12].into());
        assert!(take("d").unwrap_err().to_string().contains("from 10 to 12"));
        let (freed, _) = held.remove(1);
        assert_eq!(take("d").unwrap().0, freed);
    }
}
