//! The limits on the headers of a request, the same for both versions of HTTP.

use gauntlet_api::error;
use http::Request;

use crate::refusal::Refusal;

/// How many headers a request may have.
const MAX_COUNT: usize = 100;
/// How long they may be in all, in bytes, with the path.
const MAX_BYTES: usize = 16 * 1024;
/// What HTTP/2 adds to the length of each header.
const ENTRY_BYTES: usize = 32;

/// How many headers are parsed. Requests above the limit but below this get a response in their protocol, those above a bare 431.
pub(super) const MAX_PARSED: usize = 2 * MAX_COUNT;
/// The same for their length, over HTTP/1 and over HTTP/2.
pub(super) const MAX_BUFFER: usize = 4 * MAX_BYTES;
pub(super) const MAX_LIST: u32 = 64 * 1024;

/// Checks the headers of a request.
///
/// # Errors
/// They are too many, or too long.
pub(super) fn check<B>(request: &Request<B>) -> Result<(), Refusal> {
    let headers = request.headers();
    let bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len().saturating_add(value.len()).saturating_add(ENTRY_BYTES))
        .sum();
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if headers.len() <= MAX_COUNT && bytes.saturating_add(path) <= MAX_BYTES {
        return Ok(());
    }
    Err(Refusal { reason: "headers", status: error::headers_too_large(MAX_COUNT, MAX_BYTES) })
}
