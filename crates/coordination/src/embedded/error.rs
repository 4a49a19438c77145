//! What redb's errors mean to a caller.

use std::{any::Any, io::ErrorKind, path::Path};

use crate::kv::KvError;

pub(super) fn damaged(path: &Path, detail: &str) -> String {
    format!("embedded store {} is damaged: {detail}; restore it from a backup", path.display())
}

pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it cannot be read").to_owned()
}

/// Converts an error of redb. Errors of the disk are worth a retry; errors of the file's content are permanent.
pub(super) fn kv_error(path: &Path, error: &redb::Error) -> KvError {
    if let redb::Error::Corrupted(detail) = error {
        return KvError::Permanent(damaged(path, detail));
    }
    if matches!(error, redb::Error::Io(error) if error.kind() == ErrorKind::UnexpectedEof) {
        return KvError::Permanent(damaged(path, "it is truncated"));
    }
    let path = path.display();
    KvError::Unavailable(match error {
        redb::Error::Io(error)
            if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::FileTooLarge | ErrorKind::QuotaExceeded) =>
        {
            format!("embedded store {path}: the disk is full; free some space and restart")
        }
        redb::Error::PreviousIo => {
            format!("embedded store {path}: an earlier write failed; restart once the disk works again")
        }
        error => format!("embedded store {path}: {error}"),
    })
}
