//! Spans and durations of HTTP requests served.

use axum::extract::MatchedPath;
use http::{HeaderMap, Method, Request, response};
use opentelemetry::KeyValue;
use opentelemetry::metrics::Histogram;

use super::exchange::{End, Exchange, ObserveLayer, Observer};
use crate::call::Call;
use crate::context;
use crate::instruments::Instruments;
use crate::names;

/// The status recorded when the client went away before the response.
const CLIENT_CLOSED: u16 = 499;

/// Observes an axum router: a SERVER span and `http.server.request.duration` for each request.
///
/// The span is named after the method and the matched route, such as `GET /api/v1/challenge/{id}`, or after the method alone when no route
/// matched. Its parent comes from the W3C headers. Its status is Error for 5xx.
pub type HttpServerLayer = ObserveLayer<HttpServer>;

/// The observer of [`HttpServerLayer`].
#[derive(Clone, Debug)]
pub struct HttpServer {
    duration: Histogram<f64>,
    unobserved: &'static [&'static str],
}

impl HttpServerLayer {
    /// A layer that observes every request except those to the paths `unobserved` (health checks).
    pub fn new(instruments: &Instruments, unobserved: &'static [&'static str]) -> Self {
        Self(HttpServer { duration: instruments.calls.http_server.clone(), unobserved })
    }
}

impl Observer for HttpServer {
    type Exchange = HttpCall;

    fn start<B>(&self, request: &mut Request<B>) -> Option<HttpCall> {
        if self.unobserved.contains(&request.uri().path()) {
            return None;
        }
        let method = method_name(request.method());
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        // By convention an unknown method is `HTTP` in the span's name and `_OTHER` in the attribute.
        let verb = if method == "_OTHER" { "HTTP" } else { method };
        let name = route.map_or_else(|| verb.to_owned(), |route| format!("{verb} {route}"));
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
        context::set_parent_from(request.headers(), &span);
        let mut attributes =
            vec![KeyValue::new("http.request.method", method), KeyValue::new("url.scheme", scheme.to_owned())];
        attributes.extend(route.map(|route| KeyValue::new("http.route", route.to_owned())));
        let call = Call::start(span, &self.duration, attributes);
        Some(HttpCall { call, is_bodiless: request.method() == Method::HEAD, status: None })
    }
}

/// One HTTP request.
#[derive(Debug)]
pub struct HttpCall {
    call: Call,
    /// The response is complete with its head, because no body is ever read.
    is_bodiless: bool,
    status: Option<u16>,
}

impl Exchange for HttpCall {
    fn on_head(&mut self, head: &response::Parts) -> bool {
        self.status = Some(head.status.as_u16());
        self.is_bodiless
    }

    fn on_trailers(&mut self, _: &HeaderMap) {}

    fn on_end(&mut self, end: End) {
        let (status, error) = match (end, self.status) {
            (End::Complete, Some(status)) => (status, (status >= 500).then(|| status.to_string())),
            (End::Cancelled, status) => (status.unwrap_or(CLIENT_CLOSED), Some("cancelled".to_owned())),
            (End::Failed, status) => (status.unwrap_or(500), Some("body_failed".to_owned())),
            (End::Complete, None) => (500, Some("500".to_owned())),
        };
        self.call.set_attribute("http.response.status_code", i64::from(status));
        if let Some(error) = error {
            if end != End::Cancelled {
                self.call.fail(error.clone());
            }
            self.call.set_attribute("error.type", error);
        }
        self.call.record_duration();
    }

    fn span(&self) -> &tracing::Span {
        self.call.span()
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
