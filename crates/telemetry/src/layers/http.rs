use std::time::Instant;

use axum::extract::MatchedPath;
use http::{HeaderMap, Method, Request, response};
use opentelemetry::KeyValue;
use opentelemetry::global;
use opentelemetry::metrics::Histogram;
use opentelemetry::trace::Status;
use opentelemetry_http::HeaderExtractor;
use tower::Layer;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::exchange::{End, Exchange, Observe, Watch};
use crate::instruments::Instruments;
use crate::names;

/// What is recorded when the client went away before there was a response.
const CLIENT_CLOSED: u16 = 499;

/// Observes an axum router: a SERVER span and `http.server.request.duration` for each request.
///
/// The span is named after the method and the matched route, `GET /api/v1/challenge/{id}`, or after the method alone where
/// no route matched. Its parent comes from the W3C headers; its status is Error for 5xx.
#[derive(Clone, Debug)]
pub struct HttpServerLayer {
    duration: Histogram<f64>,
    unobserved: &'static [&'static str],
}

impl HttpServerLayer {
    /// A layer that observes every request but those whose path is one of `unobserved` (health checks).
    pub fn new(instruments: &Instruments, unobserved: &'static [&'static str]) -> Self {
        Self { duration: instruments.calls.http_server.clone(), unobserved }
    }
}

impl<S> Layer<S> for HttpServerLayer {
    type Service = Observe<S, Self>;

    fn layer(&self, inner: S) -> Self::Service {
        Observe { inner, watch: self.clone() }
    }
}

impl Watch for HttpServerLayer {
    type Exchange = HttpCall;

    fn begin<B>(&self, request: &mut Request<B>) -> Option<HttpCall> {
        if self.unobserved.contains(&request.uri().path()) {
            return None;
        }
        let method = method_name(request.method());
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        // The conventions call a method that is not known `HTTP` in the name and `_OTHER` in the attribute.
        let named = if method == "_OTHER" { "HTTP" } else { method };
        let name = route.map_or_else(|| named.to_owned(), |route| format!("{named} {route}"));
        let scheme = request.uri().scheme_str().unwrap_or("http");
        let span = tracing::info_span!(
            parent: None,
            "http.server",
            otel.name = name,
            otel.kind = names::HTTP_SERVER.kind.as_str(),
            http.request.method = method,
            http.route = route,
            url.path = request.uri().path(),
            url.scheme = scheme,
        );
        let parent = global::get_text_map_propagator(|propagator| {
            propagator.extract_with_context(&opentelemetry::Context::new(), &HeaderExtractor(request.headers()))
        });
        // Fails only where tracing is off.
        let _ = span.set_parent(parent);
        let mut attributes =
            vec![KeyValue::new("http.request.method", method), KeyValue::new("url.scheme", scheme.to_owned())];
        if let Some(route) = route {
            attributes.push(KeyValue::new("http.route", route.to_owned()));
        }
        Some(HttpCall {
            span,
            duration: self.duration.clone(),
            attributes,
            started: Instant::now(),
            bodiless: request.method() == Method::HEAD,
            status: None,
        })
    }
}

/// One request.
#[derive(Debug)]
pub struct HttpCall {
    span: tracing::Span,
    duration: Histogram<f64>,
    attributes: Vec<KeyValue>,
    started: Instant,
    /// Nobody reads a body: the answer is whole with its head.
    bodiless: bool,
    status: Option<u16>,
}

impl Exchange for HttpCall {
    fn head(&mut self, head: &response::Parts) -> bool {
        self.status = Some(head.status.as_u16());
        self.bodiless
    }

    fn trailers(&mut self, _: &HeaderMap) {}

    fn end(&mut self, end: End) {
        let (status, error) = match (end, self.status) {
            (End::Complete, Some(status)) => (status, (status >= 500).then(|| status.to_string())),
            (End::Cancelled, status) => (status.unwrap_or(CLIENT_CLOSED), Some("cancelled".to_owned())),
            (End::Failed, status) => (status.unwrap_or(500), Some("body_failed".to_owned())),
            (End::Complete, None) => (500, Some("500".to_owned())),
        };
        self.span.set_attribute("http.response.status_code", i64::from(status));
        self.attributes.push(KeyValue::new("http.response.status_code", i64::from(status)));
        if let Some(error) = error {
            if end != End::Cancelled {
                self.span.set_status(Status::error(error.clone()));
            }
            self.span.set_attribute("error.type", error.clone());
            self.attributes.push(KeyValue::new("error.type", error));
        }
        self.duration.record(self.started.elapsed().as_secs_f64(), &self.attributes);
    }

    fn span(&self) -> &tracing::Span {
        &self.span
    }
}

fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::TRACE => "TRACE",
        Method::CONNECT => "CONNECT",
        _ => "_OTHER",
    }
}
