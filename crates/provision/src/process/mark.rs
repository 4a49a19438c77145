//! Which store a directory of instances belongs to. The tokens of two stores do not compare: by those of one, the orders of the other would
//! be refused, or taken for newer than they are.

use std::{fs::File, io, path::Path};

use gauntlet_domain::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{home::failed, record};

const MARK: &str = "store.json";

#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    store: String,
}

/// Marks the directory as that store's. One without a mark is taken over; that of another store is refused.
pub(super) fn claim(dir: &Path, store: &str) -> Result<()> {
    let owner = mark(dir, store).map_err(failed("claim", format!("{} of {}", MARK, dir.display())))?;
    if owner == store {
        return Ok(());
    }
    let detail = format!(
        "{dir} holds the instances of store {owner}, and this is store {store}: give another directory, or use the store that it was \
         used with. If that one is gone for good, remove {mark}: then this store takes the directory over, and takes down what it has no \
         record of",
        dir = dir.display(),
        mark = dir.join(MARK).display(),
    );
    Err(Error::Provision { step: "claim", detail })
}

/// Whose it is, once it is somebody's.
fn mark(dir: &Path, store: &str) -> io::Result<String> {
    // Other managers of this machine may do the same this moment. Nobody holds it for longer than that.
    let held = File::open(dir)?;
    held.lock()?;
    if let Some(Mark { store }) = record::read(dir, MARK)? {
        return Ok(store);
    }
    record::write(dir, MARK, &Mark { store: store.to_owned() })?;
    record::sync(&dir.join(MARK))?;
    record::sync(dir)?;
    Ok(store.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_directory_has_one_store() {
        let dir = tempfile::tempdir().unwrap();
        claim(dir.path(), "a").unwrap();
        claim(dir.path(), "a").unwrap();
        let refused = claim(dir.path(), "b").unwrap_err().to_string();
        let mark = dir.path().join(MARK);
        for part in ["store a", "store b", &dir.path().display().to_string(), &format!("remove {}", mark.display())] {
            assert!(refused.contains(part), "{part} is not in {refused}");
        }
        std::fs::remove_file(mark).unwrap();
        claim(dir.path(), "b").unwrap();
    }

    #[test]
    fn of_many_at_once_one_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let claimed: Vec<_> = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8).map(|n| scope.spawn(move || claim(dir, &n.to_string()).is_ok())).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        assert_eq!(claimed.iter().filter(|claimed| **claimed).count(), 1, "{claimed:?}");
    }
}
