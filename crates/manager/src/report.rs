//! Reports the errors of calls, once, where their responses leave the API: logs them and marks the span of the call.

use std::{
    error::Error as _,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use gauntlet_domain::Error;
use gauntlet_telemetry::context;
use http::Response;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tracing::Span;

use crate::status::Cause;

/// The status of a failed stream, with its cause, which is not part of the trailers. An extension of the response.
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamFailure(Arc<OnceLock<Status>>);

impl StreamFailure {
    /// Keeps the status for the report. Only the first one counts: a stream ends with its first error.
    pub(crate) fn set(&self, status: &Status) {
        let _ = self.0.set(status.clone());
    }
}

/// Reports the error in a response's extensions ([`Status`] or [`StreamFailure`]). Map it over the responses of a service, inside the layer that
/// makes the span of the call. The error of a stream is reported when it is passed on, or when the body is dropped.
pub(crate) fn report_failure<B>(response: Response<B>) -> Response<ReportedBody<B>> {
    if let Some(status) = response.extensions().get::<Status>() {
        report_cause(status);
    }
    let failure = response.extensions().get::<StreamFailure>().map(|failure| (failure.clone(), Span::current()));
    response.map(|body| ReportedBody { body, failure: Reporter(failure) })
}

fn report_cause(status: &Status) {
    match status.source().and_then(|source| source.downcast_ref::<Cause>()) {
        Some(Cause::Error(error)) => {
            context::set_attribute("gauntlet.error.code", error.code());
            if error.is_fault() {
                tracing::error!(error.type = error.code(), %error, "call failed");
                context::fail_span(error.to_string());
            } else {
                tracing::debug!(error.type = error.code(), %error, "call refused");
            }
            if let Error::Registry { reference, detail } = error {
                tracing::warn!(reference, detail, "registry failed");
            }
        }
        Some(Cause::Refusal(code)) => {
            context::set_attribute("gauntlet.error.code", *code);
            tracing::debug!(error.type = code, message = status.message(), "request refused");
        }
        Some(Cause::Denied(denial)) => {
            context::set_attribute("gauntlet.error.code", denial.code());
            // Not at a higher level: anybody who reaches the port can cause it.
            tracing::debug!(error.type = denial.code(), %denial, "call denied");
        }
        // Made by the transport, such as the response of an unhealthy /healthcheck.
        None => {}
    }
}

/// The failure of a stream and the span of its call, until the failure has been reported.
struct Reporter(Option<(StreamFailure, Span)>);

impl Reporter {
    fn report(&mut self) {
        let Some((StreamFailure(failure), span)) = &self.0 else { return };
        if let Some(status) = failure.get() {
            span.in_scope(|| report_cause(status));
            self.0 = None;
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.report();
    }
}

/// A response body that reports the failure of its stream.
pub(crate) struct ReportedBody<B> {
    body: B,
    failure: Reporter,
}

impl<B: Body + Unpin> Body for ReportedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.failure.report();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Default> Default for ReportedBody<B> {
    fn default() -> Self {
        Self { body: B::default(), failure: Reporter(None) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use futures::FutureExt as _;
    use http_body_util::{BodyExt as _, Full};

    use super::*;
    use crate::{fixture::Logs, status::status};

    fn failed() -> Status {
        status(Error::Internal("disk of host-7".to_owned()))
    }

    #[test]
    fn error_of_a_call_is_logged_once_and_not_sent() {
        let logs = Logs::default();
        let response = logs.record(|| report_failure(failed().into_http::<Full<bytes::Bytes>>()));
        assert_eq!(logs.containing("disk of host-7"), 1);
        let sent = format!("{:?}", response.headers());
        assert!(sent.contains("grpc-status") && !sent.contains("host-7"), "{sent}");
    }

    #[test]
    fn error_of_a_stream_is_logged_once_when_it_is_passed_on() {
        let (logs, failure) = (Logs::default(), StreamFailure::default());
        let mut response = Response::new(Full::new(bytes::Bytes::from_static(b"message")));
        response.extensions_mut().insert(failure.clone());
        let response = logs.record(|| report_failure(response));
        failure.set(&failed());
        assert_eq!(logs.containing("disk of host-7"), 0);
        logs.record(|| response.into_body().collect().now_or_never().unwrap()).unwrap();
        assert_eq!(logs.containing("disk of host-7"), 1);
    }

    #[test]
    fn error_of_a_stream_is_logged_when_the_client_leaves() {
        let (logs, failure) = (Logs::default(), StreamFailure::default());
        let mut response = Response::new(Full::new(bytes::Bytes::new()));
        response.extensions_mut().insert(failure.clone());
        failure.set(&failed());
        logs.record(|| drop(report_failure(response)));
        assert_eq!(logs.containing("disk of host-7"), 1);
    }
}
