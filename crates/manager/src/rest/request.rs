//! Requests: extracts messages and ids from bodies, paths and queries. What cannot be decoded is refused with the value and the fix.

use std::time::Duration;

use axum::{
    body::{Body, HttpBody as _},
    extract::{self, FromRequest, FromRequestParts, Request, path::ErrorKind, rejection::PathRejection},
    response::Response,
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use gauntlet_api::{error, json};
use http::request::Parts;
use percent_encoding::percent_decode_str;
use prost::Name;
use serde::de::DeserializeOwned;
use tonic::Status;

use super::response::Failure;
use crate::status::body_too_long;
use crate::{
    caller::{Caller, Denial},
    status::denied,
};

/// The maximum length of a body, in bytes.
pub(crate) const BODY_LIMIT: usize = 1024 * 1024;
/// A body that is too long is read and discarded up to this length, in bytes. A client that is still sending then gets the response instead of a
/// reset connection.
const DISCARD_LIMIT: usize = 16 * BODY_LIMIT;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A message, from a JSON body of at most 1 MiB with any content type. An empty body is a message without fields.
pub(super) struct Message<M>(pub(super) M);

impl<M, S> FromRequest<S> for Message<M>
where
    M: prost::Message + Name + Default,
    S: Send + Sync,
{
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        message(request.into_body()).await.map(Self).map_err(Failure::refused)
    }
}

async fn message<M: prost::Message + Name + Default>(body: Body) -> Result<M, Status> {
    let Ok(body) = tokio::time::timeout(BODY_TIMEOUT, read(body)).await else {
        let seconds = BODY_TIMEOUT.as_secs();
        return Err(Status::deadline_exceeded(format!("The body did not arrive within {seconds} seconds.")));
    };
    let body = body?;
    if body.trim_ascii().is_empty() { Ok(M::default()) } else { Ok(json::from_slice(&body)?) }
}

async fn read(body: Body) -> Result<Bytes, Status> {
    if body.size_hint().lower() > DISCARD_LIMIT as u64 {
        return Err(body_too_long(BODY_LIMIT));
    }
    let mut chunks = body.into_data_stream();
    let mut kept = BytesMut::new();
    let mut length = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|_| Status::invalid_argument("The body ends before its announced end; send it again."))?;
        length += chunk.len();
        if length <= BODY_LIMIT {
            kept.extend_from_slice(&chunk);
        } else if length > DISCARD_LIMIT {
            break;
        }
    }
    if length > BODY_LIMIT { Err(body_too_long(BODY_LIMIT)) } else { Ok(kept.freeze()) }
}

/// The caller, which the authorization layer has added. A request without one is refused.
impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| super::failure(denied(Denial::Missing)))
    }
}

/// The ids in the path, percent-decoded.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        // axum takes malformed escapes literally.
        check_escapes("path", parts.uri.path()).map_err(Failure::refused)?;
        match extract::Path::from_request_parts(parts, state).await {
            Ok(extract::Path(ids)) => Ok(Self(ids)),
            Err(PathRejection::FailedToDeserializePathParams(error))
                if matches!(error.kind(), ErrorKind::InvalidUtf8InPathParam { .. }) =>
            {
                Err(Failure::refused(not_utf8("path", parts.uri.path())))
            }
            // The route and its handler disagree on the parameters.
            Err(_) => Err(Failure::refused(error::internal_error())),
        }
    }
}

/// The parameter `sourceId` or `source_id` of the query, or an empty text. A query that has it twice, under either name, is refused: the one that
/// is meant is unknown. Other parameters are ignored. axum's `Query` does not fit: it replaces invalid UTF-8 where the contract has an error.
pub(super) struct SourceId(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for SourceId {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        source_id(parts.uri.query().unwrap_or_default()).map(Self).map_err(Failure::refused)
    }
}

fn source_id(query: &str) -> Result<String, Status> {
    let mut found = None;
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !matches!(&*percent_decode_str(name).decode_utf8_lossy(), "sourceId" | "source_id") {
            continue;
        }
        check_escapes("sourceId", value)?;
        // Queries are form-encoded.
        let value = value.replace('+', " ");
        let value = percent_decode_str(&value).decode_utf8().map_err(|_| not_utf8("sourceId", &value))?.into_owned();
        if found.replace(value).is_some() {
            return Err(error::invalid_field("sourceId", "given twice; give sourceId or source_id once."));
        }
    }
    Ok(found.unwrap_or_default())
}

fn check_escapes(field: &str, text: &str) -> Result<(), Status> {
    for after in text.split('%').skip(1) {
        let digits = after.as_bytes().get(..2).unwrap_or_default();
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
            let why = format!("{text:?} has a % without two hexadecimal digits after it; write % itself as %25.");
            return Err(error::invalid_field(field, &why));
        }
    }
    Ok(())
}

fn not_utf8(field: &str, text: &str) -> Status {
    error::invalid_field(field, &format!("{text:?} is not UTF-8 once decoded; percent-encode UTF-8."))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn source_id_of_a_query_is_optional_and_unique() {
        for (query, source) in [
            ("", ""),
            ("sourceId=7", "7"),
            ("source_id=team%2F7", "team/7"),
            ("a=b&source%5Fid=a+b&%zz", "a b"),
            ("sourceId", ""),
            ("sourceid=7", ""),
        ] {
            assert_eq!(source_id(query).unwrap(), source, "{query}");
        }
        for query in ["sourceId=1&sourceId=1", "sourceId=1&source_id=2", "sourceId=%", "sourceId=%f", "sourceId=%ff"] {
            assert_eq!(source_id(query).unwrap_err().code(), tonic::Code::InvalidArgument, "{query}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_source_id_round_trips(source in ".*") {
            let encoded = percent_encoding::utf8_percent_encode(&source, percent_encoding::NON_ALPHANUMERIC);
            proptest::prop_assert_eq!(source_id(&format!("sourceId={encoded}")).unwrap(), source);
        }

        #[test]
        fn no_query_panics(query in ".*") {
            let _ = source_id(&query);
        }
    }

    #[tokio::test]
    async fn length_of_bodies_is_limited() {
        let whole = |length: usize| Body::from(vec![b' '; length]);
        let chunked = |chunks: usize| {
            let chunk = Bytes::from(vec![b' '; BODY_LIMIT / 4]);
            Body::from_stream(futures::stream::iter((0..chunks).map(move |_| Ok::<_, std::io::Error>(chunk.clone()))))
        };
        assert_eq!(read(whole(BODY_LIMIT)).await.unwrap().len(), BODY_LIMIT);
        assert_eq!(read(chunked(4)).await.unwrap().len(), BODY_LIMIT);
        for body in [whole(BODY_LIMIT + 1), whole(DISCARD_LIMIT + 1), chunked(5), chunked(1000)] {
            assert_eq!(read(body).await.unwrap_err().message(), "The body is longer than 1048576 bytes; send less.");
        }
        let broken =
            Body::from_stream(futures::stream::iter([Ok(Bytes::from("{")), Err(std::io::Error::other("gone"))]));
        assert_eq!(read(broken).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
