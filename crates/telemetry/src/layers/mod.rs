//! Tower layers that make one span and one measurement of each call, with the names of the current semantic
//! conventions. A call ends when its body or its trailers end, when it fails, or when it is dropped: then it is recorded
//! as cancelled, so no span stays open.
//!
//! - [`GrpcServerLayer`] belongs on the gRPC service, inside `tonic_web`'s layer where there is one (it reads the
//!   status from headers and trailers, which gRPC-web hides in the body).
//! - [`HttpServerLayer`] belongs on an axum router with `Router::layer`, where the matched route is known.
//! - [`GrpcClientLayer`] belongs on a `tonic` channel.
//!
//! Health checks and reflection make no span and no measurement: they say nothing about the service and would drown
//! what does.

mod exchange;
mod grpc;
mod http;

pub use self::exchange::{End, Exchange, Observe, ObservedBody, ResponseFuture, Watch};
pub use self::grpc::{GrpcCall, GrpcClientLayer, GrpcServerLayer, code_name};
pub use self::http::{HttpCall, HttpServerLayer};
