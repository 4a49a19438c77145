//! Which store a directory of instances belongs to.
//!
//! Tokens of different stores don't compare: a request with a token of the wrong store would be fenced, or would replace a newer one.

use std::{fs::File, io, path::Path};

use gauntlet_domain::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{blocking::failed, record};

const MARK: &str = "store.json";

#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    store: String,
}

/// Claims the directory for the store. Succeeds if it has no owner yet, or this store owns it.
///
/// # Errors
/// [`Error::Provision`], with the remedy, if another store owns it.
pub(super) fn claim(dir: &Path, store: &str) -> Result<()> {
    let owner = claim_or_read(dir, store).map_err(failed("claim", format!("{} of {}", MARK, dir.display())))?;
    if owner == store {
        return Ok(());
    }
    let detail = format!(
        "{dir} contains the instances of store {owner}, but this is store {store}: use another directory, or the store that the directory \
         belongs to. If that store no longer exists, remove {mark}: this store then claims the directory, and removes the instances that it \
         has no record of",
        dir = dir.display(),
        mark = dir.join(MARK).display(),
    );
    Err(Error::Provision { step: "claim", detail })
}

/// Returns the owner of the directory, which is `store` if it had none.
fn claim_or_read(dir: &Path, store: &str) -> io::Result<String> {
    // Another manager may claim it at the same time. The lock is only held for that.
    let lock = File::open(dir)?;
    lock.lock()?;
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
    fn directory_belongs_to_one_store() {
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
    fn one_of_many_concurrent_claims_wins() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let claimed: Vec<_> = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..8).map(|n| scope.spawn(move || claim(dir, &n.to_string()).is_ok())).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        assert_eq!(claimed.iter().filter(|claimed| **claimed).count(), 1, "{claimed:?}");
    }
}
