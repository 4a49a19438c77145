//! Tower layers that record one span and one duration for each call, under the names of OpenTelemetry's semantic conventions.
//!
//! A call ends with its body or trailers, when it fails, or when it is dropped: it then counts as cancelled. No span stays open.
//!
//! - [`GrpcServerLayer`] wraps a gRPC service. It must be inside `tonic_web`'s layer, because gRPC-web moves the trailers, where the status is,
//!   into the body.
//! - [`HttpServerLayer`] wraps an axum router with `Router::layer`, where the matched route is known.
//! - [`GrpcClientLayer`] wraps a `tonic` channel.
//!
//! Health checks and reflection are not observed: they say nothing about the service, and their number would hide the calls that do.

mod exchange;
mod grpc;
mod http;

pub use self::exchange::{End, Exchange, ObserveLayer, ObserveService, ObservedBody, Observer, ResponseFuture};
pub use self::grpc::{GrpcCall, GrpcClient, GrpcClientLayer, GrpcServer, GrpcServerLayer, code_name};
pub use self::http::{HttpCall, HttpServer, HttpServerLayer};
