//! Lock files, which keep two commands from using the same directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use anyhow::{Context as _, Result};

/// Locks a file, which is created if missing, until the result is dropped. Returns `None` while another process holds the lock.
pub(crate) fn try_lock(path: &Path) -> Result<Option<File>> {
    let context = || format!("lock {}", path.display());
    let file = OpenOptions::new().create(true).append(true).open(path).with_context(context)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(context),
    }
}
