//! Time limits of gRPC calls: for the response, where the caller sets `grpc-timeout`, and for the arrival of the request message.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

/// Ends calls and response streams with DEADLINE_EXCEEDED when the caller's `grpc-timeout` has passed. A change that the call began continues:
/// it runs in a task of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner }
    }
}

/// A gRPC service that enforces the deadlines of its callers.
#[derive(Clone, Debug)]
pub(crate) struct Deadline<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let limit = timeout(request.headers());
        let response = self.inner.call(request);
        let Some(limit) = limit else { return Box::pin(response) };
        let mut deadline = Box::pin(tokio::time::sleep(limit));
        Box::pin(async move {
            tokio::select! {
                biased;
                response = response => Ok(response?.map(|body| Body::new(DeadlineBody { body, deadline, limit, ended: false }))),
                () = &mut deadline => Ok(exceeded(limit).into_http()),
            }
        })
    }
}

fn exceeded(limit: Duration) -> Status {
    Status::deadline_exceeded(format!("The call did not end within the {limit:?} that the caller gave it."))
}

/// The caller's `grpc-timeout`: up to eight digits and a unit. A malformed one is ignored, as other gRPC servers do.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// A response body that ends at the deadline.
struct DeadlineBody {
    body: Body,
    deadline: Pin<Box<Sleep>>,
    limit: Duration,
    ended: bool,
}

impl http_body::Body for DeadlineBody {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            self.ended = true;
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(match exceeded(self.limit).add_header(&mut trailers) {
                Ok(()) => Ok(Frame::trailers(trailers)),
                Err(status) => Err(status),
            }));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A request body that must arrive within `limit`: otherwise a client could keep a call open without sending its message.
pub(crate) struct TimedRequestBody {
    body: axum::body::Body,
    deadline: Pin<Box<Sleep>>,
    limit: Duration,
}

impl TimedRequestBody {
    pub(crate) fn new(body: axum::body::Body, limit: Duration) -> Self {
        Self { body, deadline: Box::pin(tokio::time::sleep(limit)), limit }
    }
}

impl http_body::Body for TimedRequestBody {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, axum::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        self.deadline.as_mut().poll(cx).map(|()| {
            let message = format!("The message was not sent within {:?}.", self.limit);
            Some(Err(axum::Error::new(Status::deadline_exceeded(message))))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use http_body_util::{BodyExt as _, StreamBody};
    use tower::ServiceExt as _;

    use super::*;

    fn request(timeout: &str) -> Request<()> {
        Request::builder().header("grpc-timeout", timeout).body(()).unwrap()
    }

    #[test]
    fn timeouts_are_parsed_as_the_protocol_defines_them() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("40m", Some(Duration::from_millis(40))),
            ("50u", Some(Duration::from_micros(50))),
            ("60n", Some(Duration::from_nanos(60))),
            ("100000000S", None),
            ("+1S", None),
            ("S", None),
            ("1", None),
            ("", None),
            ("1s", None),
        ] {
            assert_eq!(timeout(request(text).headers()), expected, "{text}");
        }
    }

    #[tokio::test]
    async fn call_past_its_deadline_fails() {
        let hangs = tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<Body>, Status>>());
        let response = DeadlineLayer.layer(hangs).oneshot(request("10m")).await.unwrap();
        assert_eq!(response.headers().get("grpc-status").unwrap(), "4");
    }

    /// gRPC's Trailers-Only response: no data frame follows the headers.
    #[tokio::test]
    async fn error_within_the_deadline_ends_with_its_headers() {
        let fails = tower::service_fn(|_: Request<()>| async { Ok::<_, Status>(Status::not_found("no").into_http()) });
        let response: Response<Body> = DeadlineLayer.layer(fails).oneshot(request("1H")).await.unwrap();
        assert!(http_body::Body::is_end_stream(response.body()));
    }

    #[tokio::test]
    async fn stream_past_its_deadline_ends() {
        let streams = tower::service_fn(|_: Request<()>| async {
            let first = futures::stream::iter([Ok::<_, Status>(Frame::data(bytes::Bytes::from_static(b"first")))]);
            let body = StreamBody::new(futures::StreamExt::chain(first, futures::stream::pending()));
            Ok::<_, Status>(Response::new(Body::new(body)))
        });
        let response = DeadlineLayer.layer(streams).oneshot(request("100m")).await.unwrap();
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap().get("grpc-status").unwrap(), "4");
        assert_eq!(body.to_bytes(), "first");
    }

    #[tokio::test]
    async fn call_whose_message_does_not_arrive_fails() {
        use gauntlet_api::v1::challenge::challenge_store_client::ChallengeStoreClient;
        let api = crate::fixture::Api::new().await;
        let routes = api.service(crate::authorize::Credentials::default(), Some(gauntlet_access::Scope::Admin));
        let channel = tower::service_fn(move |request: Request<Body>| {
            let routes = routes.clone();
            // The client's message never arrives.
            let body = axum::body::Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, Status>>());
            let body = axum::body::Body::new(TimedRequestBody::new(body, Duration::from_millis(20)));
            async move { routes.oneshot(request.map(|_| body)).await }
        });
        let mut client = ChallengeStoreClient::new(channel);
        let status = client.retrieve_challenge(tonic::Request::new(Default::default())).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
    }
}
