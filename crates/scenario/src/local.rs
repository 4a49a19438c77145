//! Scenarios in local directories, below a root that the operator allowed.

use std::path::{Component, Path, PathBuf};

use gauntlet_domain::{Error, Result};

use crate::{
    cache::Cache,
    digest::Digest,
    files::{self, FileError, FileLimits, TreeDigest},
};

/// The prefix of references to local directories.
pub(crate) const SCHEME: &str = "file://";

/// Resolves `file://PATH` to a directory below the root. Follows links, but not out of the root.
pub(crate) fn locate(reference: &str, root: Option<&Path>) -> Result<PathBuf> {
    let not_found =
        |problem: &str| Err(Error::ScenarioNotFound { reference: reference.to_owned(), problem: problem.to_owned() });
    let path = Path::new(reference.strip_prefix(SCHEME).unwrap_or(reference));
    let Some(root) = root else {
        return not_found("local directories are not allowed here; the operator allows them with --scenario-root");
    };
    if path.as_os_str().as_encoded_bytes().contains(&0) || path.components().any(|part| part == Component::ParentDir) {
        return not_found("a local path holds no .. and no NUL");
    }
    let outside = "no such directory below the operator's --scenario-root";
    // The operator must fix this, not the client.
    let root = root.canonicalize().map_err(|error| Error::Unavailable {
        what: "local scenario root",
        detail: format!("{}: {error}", root.display()),
    })?;
    match root.join(path).canonicalize() {
        Ok(found) if found.starts_with(&root) && found.is_dir() => Ok(found),
        _ => not_found(outside),
    }
}

/// Copies a directory into the cache. Returns the digest of its content and the copy.
pub(crate) fn snapshot(dir: &Path, cache: &Cache, limits: &FileLimits) -> Result<(Digest, PathBuf), FileError> {
    let mut draft = cache.draft(limits)?;
    let mut digest = TreeDigest::new();
    for listed in files::list(dir, limits)? {
        let content = draft.copy(&listed.path, listed.size, files::open(dir, &listed)?)?;
        digest.add(&listed.path, listed.size, content);
    }
    let digest = digest.finish();
    let dir = cache.keep(draft, digest)?;
    Ok((digest, dir))
}
