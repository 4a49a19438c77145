//! Messages, streams and errors out.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use futures::{StreamExt as _, future::ready, stream::once};
use gauntlet_api::{error, json};
use gauntlet_telemetry::context;
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use prost::{Message, Name};
use tonic::Status;

use crate::grpc::Messages;

/// A message as JSON.
pub(super) struct Answer<M>(M);

impl<M> From<tonic::Response<M>> for Answer<M> {
    fn from(response: tonic::Response<M>) -> Self {
        Self(response.into_inner())
    }
}

impl<M: Message + Name> IntoResponse for Answer<M> {
    fn into_response(self) -> Response {
        match json::to_string(&self.0) {
            Ok(body) => with_json(StatusCode::OK, body),
            Err(error) => Failure(unencodable(&error)).into_response(),
        }
    }
}

/// An error as JSON, with the HTTP status of its code.
pub(super) struct Failure(Status);

impl Failure {
    /// A refusal before there is a call.
    pub(super) fn refused(status: Status) -> Self {
        Self(crate::status::refusal(status))
    }
}

/// The answer to a call, or an answer that is not reported.
impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = with_json(error::http_status(self.0.code()), error::body(&self.0));
        // For `errors::report`, as tonic does for its own responses.
        response.extensions_mut().insert(self.0);
        response
    }
}

/// The items as lines, each sent when it is there. Waits for the first: an error before it is the whole answer, an error after it is the
/// last line. An item that JSON cannot say is left out: it hides no other. Without an item the body is empty and has no type.
pub(super) async fn stream<M: Message + Name + 'static>(
    response: tonic::Response<Messages<M>>,
) -> Result<Response, Failure> {
    let (_, items, extensions) = response.into_parts();
    let mut lines = items.filter_map(|item| {
        ready(match item.map(|message| json::stream_line(&message)) {
            Ok(Ok(line)) => Some(Ok(line)),
            Ok(Err(error)) => {
                unencodable(&error);
                None
            }
            Err(status) => Some(Err(status)),
        })
    });
    let Some(first) = lines.next().await.transpose()? else {
        return Ok(StatusCode::OK.into_response());
    };
    let rest = lines.scan(false, |ended, line| {
        let before = std::mem::replace(ended, line.is_err());
        ready((!before).then(|| line.unwrap_or_else(|status| error::stream_line(&status))))
    });
    let body = once(ready(first)).chain(rest).map(Ok::<_, std::convert::Infallible>);
    let mut response = with_json(StatusCode::OK, Body::from_stream(body));
    *response.extensions_mut() = extensions;
    Ok(response)
}

/// An answer whose body is JSON already.
pub(super) fn with_json(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Something stored that JSON cannot say: a fault of ours, so the client is not told what.
fn unencodable(error: &json::EncodeError) -> Status {
    tracing::error!(error.type = "INTERNAL_ERROR", %error, "answer not encoded");
    context::fail_span(error.to_string());
    error::internal_error()
}
