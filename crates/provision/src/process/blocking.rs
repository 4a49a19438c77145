//! Blocking work, descriptors and I/O errors, for async code.

use std::{fmt::Display, io, os::fd::OwnedFd};

use gauntlet_domain::{Error, Result};
use tokio::io::{Interest, unix::AsyncFd};

/// Turns an I/O error into [`Error::Provision`].
pub(super) fn failed(step: &'static str, what: impl Display) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Provision { step, detail: format!("{what}: {error}") }
}

/// Registers a descriptor with the runtime, to wait until it is readable.
#[allow(
    deprecated,
    reason = "it is unsound for types whose descriptor can change, but OwnedFd's can't; its replacement is unsafe"
)]
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Runs blocking work on the runtime's threads for that. Dropping the future doesn't stop the work.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .unwrap_or_else(|error| Err(Error::Internal(format!("a blocking task failed: {error}"))))
}
