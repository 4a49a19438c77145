//! Responses: messages, streams of messages and errors, as JSON.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use futures::{StreamExt as _, future::ready, stream::once};
use gauntlet_api::{error, json};
use gauntlet_telemetry::context;
use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use prost::{Message, Name};
use tonic::Status;

use crate::grpc::Messages;

/// A message as JSON.
pub(super) struct Json<M>(M);

impl<M> From<tonic::Response<M>> for Json<M> {
    fn from(response: tonic::Response<M>) -> Self {
        Self(response.into_inner())
    }
}

impl<M: Message + Name> IntoResponse for Json<M> {
    fn into_response(self) -> Response {
        match json::to_string(&self.0) {
            Ok(body) => with_json(StatusCode::OK, body),
            Err(error) => Failure(unencodable(&error)).into_response(),
        }
    }
}

/// An error as JSON, with the HTTP status of its gRPC code.
pub(super) struct Failure(Status);

impl Failure {
    /// A request that is refused before it becomes a call.
    pub(super) fn refused(status: Status) -> Self {
        Self(crate::status::refusal(status))
    }
}

/// The error of a call, which has its cause, or the response to a health check, which has none and is not reported.
impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = with_json(error::http_status(self.0.code()), error::body(&self.0));
        for name in [WWW_AUTHENTICATE, RETRY_AFTER] {
            if let Some(value) = self.0.metadata().as_ref().get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        // `report::report_failure` reads it. tonic does the same for its responses.
        response.extensions_mut().insert(self.0);
        response
    }
}

/// Streams messages as JSON lines, each as soon as it is available. Waits for the first message: an error before it is the whole response; an
/// error after it is the last line. Messages that cannot be encoded are skipped, so that they don't hide the others. Without messages the body
/// is empty and has no content type.
pub(super) async fn stream<M: Message + Name + 'static>(
    response: tonic::Response<Messages<M>>,
) -> Result<Response, Failure> {
    let (_, messages, extensions) = response.into_parts();
    let mut lines = messages.filter_map(|message| {
        ready(match message.map(|message| json::stream_line(&message)) {
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
        let already_ended = std::mem::replace(ended, line.is_err());
        ready((!already_ended).then(|| line.unwrap_or_else(|status| error::stream_line(&status))))
    });
    let body = once(ready(first)).chain(rest).map(Ok::<_, std::convert::Infallible>);
    let mut response = with_json(StatusCode::OK, Body::from_stream(body));
    *response.extensions_mut() = extensions;
    Ok(response)
}

/// A response whose body is encoded already.
pub(super) fn with_json(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Reports a stored value that JSON cannot represent. The client gets an internal error without the details.
fn unencodable(error: &json::EncodeError) -> Status {
    tracing::error!(error.type = "INTERNAL_ERROR", %error, "cannot encode the response as JSON");
    context::fail_span(error.to_string());
    error::internal_error()
}
