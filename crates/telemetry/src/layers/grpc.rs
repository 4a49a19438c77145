use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, Request, Uri, response};
use opentelemetry::KeyValue;
use opentelemetry::global;
use opentelemetry::metrics::Histogram;
use opentelemetry::trace::Status;
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use tonic::Code;
use tower::Layer;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::exchange::{End, Exchange, Observe, Watch};
use crate::instruments::Instruments;
use crate::names;

/// What stands for methods that the server does not know, so that callers cannot invent names of spans.
const OTHER: &str = "_OTHER";
/// Services that are not observed.
const UNOBSERVED: [&str; 2] = ["grpc.health.", "grpc.reflection."];

/// Observes a gRPC server: a SERVER span and `rpc.server.call.duration` for each call.
///
/// The span takes its parent from the W3C headers of the call. Its status is Error only where the server is at
/// fault (UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS); `error.type` is the
/// code of every call that did not end OK.
#[derive(Clone, Debug)]
pub struct GrpcServerLayer {
    duration: Histogram<f64>,
    methods: Arc<HashSet<String>>,
}

impl GrpcServerLayer {
    /// A layer for a server of `methods`, each `package.Service/Method`. A call of any other is named `_OTHER`,
    /// with the name that was asked for in the attribute `rpc.method_original`.
    pub fn new<M: Into<String>>(instruments: &Instruments, methods: impl IntoIterator<Item = M>) -> Self {
        Self {
            duration: instruments.calls.rpc_server.clone(),
            methods: Arc::new(methods.into_iter().map(Into::into).collect()),
        }
    }
}

impl<S> Layer<S> for GrpcServerLayer {
    type Service = Observe<S, Self>;

    fn layer(&self, inner: S) -> Self::Service {
        Observe { inner, watch: self.clone() }
    }
}

impl Watch for GrpcServerLayer {
    type Exchange = GrpcCall;

    fn begin<B>(&self, request: &mut Request<B>) -> Option<GrpcCall> {
        let asked = request.uri().path().trim_start_matches('/');
        if UNOBSERVED.iter().any(|service| asked.starts_with(service)) {
            return None;
        }
        let known = self.methods.get(asked);
        let method = known.map_or(OTHER, String::as_str);
        let span = tracing::info_span!(
            parent: None,
            "rpc.server",
            otel.name = method,
            otel.kind = names::RPC_SERVER.kind.as_str(),
            rpc.system.name = "grpc",
            rpc.method = method,
            rpc.method_original = tracing::field::Empty,
        );
        if known.is_none() {
            // Bounded: the name comes from the caller.
            span.record("rpc.method_original", asked.get(..asked.len().min(256)).unwrap_or_default());
        }
        let parent = global::get_text_map_propagator(|propagator| {
            propagator.extract_with_context(&opentelemetry::Context::new(), &HeaderExtractor(request.headers()))
        });
        // Fails only where tracing is off.
        let _ = span.set_parent(parent);
        let attributes = vec![KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method.to_owned())];
        Some(GrpcCall::new(Side::Server, span, self.duration.clone(), attributes))
    }
}

/// Observes a gRPC client: a CLIENT span and `rpc.client.call.duration` for each call, with the W3C context sent
/// along. Every call that does not end OK has status Error.
#[derive(Clone, Debug)]
pub struct GrpcClientLayer {
    duration: Histogram<f64>,
    address: Option<String>,
    port: Option<u16>,
}

impl GrpcClientLayer {
    /// A layer for a channel to `server`.
    pub fn new(instruments: &Instruments, server: &Uri) -> Self {
        let port = server.port_u16().or(match server.scheme_str() {
            Some("http") => Some(80),
            Some("https") => Some(443),
            _ => None,
        });
        Self { duration: instruments.calls.rpc_client.clone(), address: server.host().map(str::to_owned), port }
    }
}

impl<S> Layer<S> for GrpcClientLayer {
    type Service = Observe<S, Self>;

    fn layer(&self, inner: S) -> Self::Service {
        Observe { inner, watch: self.clone() }
    }
}

impl Watch for GrpcClientLayer {
    type Exchange = GrpcCall;

    fn begin<B>(&self, request: &mut Request<B>) -> Option<GrpcCall> {
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let span = tracing::info_span!(
            "rpc.client",
            otel.name = method,
            otel.kind = names::RPC_CLIENT.kind.as_str(),
            rpc.system.name = "grpc",
            rpc.method = method,
            server.address = self.address,
            server.port = self.port,
        );
        let context = span.context();
        global::get_text_map_propagator(|propagator| {
            propagator.inject_context(&context, &mut HeaderInjector(request.headers_mut()));
        });
        let mut attributes = vec![KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method)];
        if let Some(address) = &self.address {
            attributes.push(KeyValue::new("server.address", address.clone()));
        }
        if let Some(port) = self.port {
            attributes.push(KeyValue::new("server.port", i64::from(port)));
        }
        Some(GrpcCall::new(Side::Client, span, self.duration.clone(), attributes))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

/// One call.
#[derive(Debug)]
pub struct GrpcCall {
    side: Side,
    span: tracing::Span,
    duration: Histogram<f64>,
    attributes: Vec<KeyValue>,
    started: Instant,
    http_status: Option<http::StatusCode>,
    code: Option<Code>,
}

impl GrpcCall {
    fn new(side: Side, span: tracing::Span, duration: Histogram<f64>, attributes: Vec<KeyValue>) -> Self {
        Self { side, span, duration, attributes, started: Instant::now(), http_status: None, code: None }
    }
}

impl Exchange for GrpcCall {
    fn head(&mut self, head: &response::Parts) -> bool {
        self.http_status = Some(head.status);
        self.code = status(&head.headers);
        self.code.is_some()
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        self.code = status(trailers);
    }

    fn end(&mut self, end: End) {
        let code = match (self.code, end) {
            (Some(code), _) => code,
            (None, End::Cancelled) => Code::Cancelled,
            (None, End::Failed) => Code::Unavailable,
            (None, End::Complete) => self.http_status.map_or(Code::Unknown, without_status),
        };
        let name = code_name(code);
        self.span.set_attribute("rpc.response.status_code", name);
        self.attributes.push(KeyValue::new("rpc.response.status_code", name));
        if code != Code::Ok {
            self.span.set_attribute("error.type", name);
            self.attributes.push(KeyValue::new("error.type", name));
        }
        if self.side == Side::Client && code != Code::Ok || server_fault(code) {
            self.span.set_status(Status::error(name));
        }
        self.duration.record(self.started.elapsed().as_secs_f64(), &self.attributes);
    }

    fn span(&self) -> &tracing::Span {
        &self.span
    }
}

fn status(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// The code of a response that carries none, by its HTTP status, as the gRPC specification maps it.
fn without_status(status: http::StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

const fn server_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// The name of a gRPC status code, as the semantic conventions and the protocol write it.
pub const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
