//! Spans and durations of gRPC calls, served and made.

use std::collections::HashSet;
use std::sync::Arc;

use http::{HeaderMap, Request, Uri, response};
use opentelemetry::KeyValue;
use opentelemetry::metrics::Histogram;
use tonic::Code;

use super::exchange::{End, Exchange, ObserveLayer, Observer};
use crate::call::{Call, server_attributes};
use crate::context;
use crate::instruments::Instruments;
use crate::names;

/// The name of every method that the server does not serve. Callers must not be able to create span names.
const OTHER: &str = "_OTHER";
/// Services that are not observed.
const UNOBSERVED: [&str; 2] = ["grpc.health.", "grpc.reflection."];
/// The most bytes of an unknown method's name that `rpc.method_original` keeps.
const MAX_ORIGINAL: usize = 256;

/// Observes a gRPC server: a SERVER span and `rpc.server.call.duration` for each call.
///
/// The parent of the span comes from the W3C headers of the call. Its status is Error only when the server is at fault (UNKNOWN,
/// DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS). Every call that does not end with OK has its code as `error.type`.
pub type GrpcServerLayer = ObserveLayer<GrpcServer>;

/// Observes a gRPC client: a CLIENT span and `rpc.client.call.duration` for each call.
///
/// The context of the span is sent in W3C headers. The status of every call that does not end with OK is Error.
pub type GrpcClientLayer = ObserveLayer<GrpcClient>;

/// The observer of [`GrpcServerLayer`].
#[derive(Clone, Debug)]
pub struct GrpcServer {
    duration: Histogram<f64>,
    methods: Arc<HashSet<String>>,
}

impl GrpcServerLayer {
    /// A layer for a server of `methods`, each `package.Service/Method`. Calls of other methods are recorded as `_OTHER`, with the requested
    /// name in the attribute `rpc.method_original`.
    pub fn new<M: Into<String>>(instruments: &Instruments, methods: impl IntoIterator<Item = M>) -> Self {
        let methods = Arc::new(methods.into_iter().map(Into::into).collect());
        Self(GrpcServer { duration: instruments.calls.rpc_server.clone(), methods })
    }
}

impl Observer for GrpcServer {
    type Exchange = GrpcCall;

    fn start<B>(&self, request: &mut Request<B>) -> Option<GrpcCall> {
        let requested = request.uri().path().trim_start_matches('/');
        if UNOBSERVED.iter().any(|service| requested.starts_with(service)) {
            return None;
        }
        let known = self.methods.get(requested);
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
            let original = requested.get(..requested.len().min(MAX_ORIGINAL)).unwrap_or_default();
            span.record("rpc.method_original", original);
        }
        context::set_parent_from(request.headers(), &span);
        let call = Call::start(span, &self.duration, rpc_attributes(method));
        Some(GrpcCall::new(Side::Server, call))
    }
}

/// The observer of [`GrpcClientLayer`].
#[derive(Clone, Debug)]
pub struct GrpcClient {
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
        let address = server.host().map(str::to_owned);
        Self(GrpcClient { duration: instruments.calls.rpc_client.clone(), address, port })
    }
}

impl Observer for GrpcClient {
    type Exchange = GrpcCall;

    fn start<B>(&self, request: &mut Request<B>) -> Option<GrpcCall> {
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
        context::inject_into(request.headers_mut(), &span);
        let mut attributes = rpc_attributes(&method);
        attributes.extend(server_attributes(self.address.as_deref(), self.port));
        Some(GrpcCall::new(Side::Client, Call::start(span, &self.duration, attributes)))
    }
}

fn rpc_attributes(method: &str) -> Vec<KeyValue> {
    vec![KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method.to_owned())]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

/// One gRPC call.
#[derive(Debug)]
pub struct GrpcCall {
    side: Side,
    call: Call,
    http_status: Option<http::StatusCode>,
    code: Option<Code>,
}

impl GrpcCall {
    fn new(side: Side, call: Call) -> Self {
        Self { side, call, http_status: None, code: None }
    }
}

impl Exchange for GrpcCall {
    fn on_head(&mut self, head: &response::Parts) -> bool {
        self.http_status = Some(head.status);
        self.code = code_in(&head.headers);
        self.code.is_some()
    }

    fn on_trailers(&mut self, trailers: &HeaderMap) {
        self.code = code_in(trailers);
    }

    fn on_end(&mut self, end: End) {
        let code = match (self.code, end) {
            (Some(code), _) => code,
            (None, End::Cancelled) => Code::Cancelled,
            (None, End::Failed) => Code::Unavailable,
            (None, End::Complete) => self.http_status.map_or(Code::Unknown, code_for),
        };
        let name = code_name(code);
        self.call.set_attribute("rpc.response.status_code", name);
        if code != Code::Ok {
            self.call.set_attribute("error.type", name);
        }
        if self.side == Side::Client && code != Code::Ok || is_server_fault(code) {
            self.call.fail(name);
        }
        self.call.record_duration();
    }

    fn span(&self) -> &tracing::Span {
        self.call.span()
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// The code of a response without `grpc-status`: the gRPC specification maps it from the HTTP status.
fn code_for(status: http::StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

const fn is_server_fault(code: Code) -> bool {
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

/// The name of a gRPC status code, as written in the protocol and the semantic conventions.
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
