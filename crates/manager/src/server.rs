//! What is served: gRPC, gRPC-web and REST on the same listeners, and the debug page on another.

use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::{Router, extract::Request, response::Response};
use gauntlet_api::{
    extension::{self, sweeper_server::SweeperServer},
    v1::{
        self, challenge::challenge_store_server::ChallengeStoreServer,
        instance::instance_manager_server::InstanceManagerServer,
    },
};
use gauntlet_telemetry::{
    instruments::Instruments,
    layers::{GrpcServerLayer, HttpServerLayer},
};
use http::HeaderName;
use tonic::Status;
use tower::{Layer as _, ServiceExt as _, util::MapResponseLayer};
use tower_http::cors::{AllowHeaders, AllowMethods, CorsLayer};

use crate::{
    authorize::{AuthorizeLayer, Authorizer, is_grpc, rpcs},
    connections::{Port, accept},
    deadline::{DeadlineLayer, TimedRequestBody},
    grpc::Handlers,
    listen::socket::Socket,
    origin::Origin,
    report,
    rest::BODY_LIMIT,
    tasks::Tasks,
};

/// How long the message of a gRPC call may take to arrive. REST has a limit of its own.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Routes the requests of the API's port by content type: to gRPC and gRPC-web, or to REST.
pub(crate) fn api<H>(
    handlers: Handlers,
    rest: Router,
    health: H,
    authorizer: Authorizer,
    instruments: &Instruments,
) -> Result<Router>
where
    H: tower::Service<http::Request<tonic::body::Body>, Error = std::convert::Infallible>
        + tonic::server::NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    H::Response: axum::response::IntoResponse,
    H::Future: Send + 'static,
{
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(extension::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes =
        tonic::service::Routes::new(ChallengeStoreServer::new(handlers.clone()).max_decoding_message_size(BODY_LIMIT))
            .add_service(InstanceManagerServer::new(handlers.clone()).max_decoding_message_size(BODY_LIMIT))
            .add_service(SweeperServer::new(handlers).max_decoding_message_size(BODY_LIMIT))
            .add_service(health)
            .add_service(reflection().build_v1().context("reflection")?)
            .add_service(reflection().build_v1alpha().context("reflection")?)
            .prepare();
    let reported = MapResponseLayer::new(report::report_failure);
    let authorized = AuthorizeLayer::new(authorizer.clone(), Status::into_http).layer(DeadlineLayer.layer(routes));
    let grpc = GrpcServerLayer::new(instruments, rpcs()).layer(reported.layer(authorized));
    let grpc = tonic_web::GrpcWebLayer::new().layer(grpc);
    let rest = rest
        .layer(AuthorizeLayer::new(authorizer, crate::rest::failure))
        .layer(MapResponseLayer::new(report::report_failure))
        .layer(HttpServerLayer::new(instruments, &["/healthcheck"]));
    Ok(Router::new().fallback(move |request: Request| {
        let (grpc, rest) = (grpc.clone(), rest.clone());
        async move {
            if is_grpc(&request) {
                let request = request.map(|body| axum::body::Body::new(TimedRequestBody::new(body, MESSAGE_TIMEOUT)));
                match grpc.oneshot(request).await {
                    Ok(response) => response.map(axum::body::Body::new),
                }
            } else {
                match rest.oneshot(request).await {
                    Ok(response) => response,
                }
            }
        }
    }))
}

/// Lets pages of the listed origins read responses. Their requests have been let through by [`OriginPolicy`](crate::origin::OriginPolicy).
pub(crate) fn with_cors(router: Router, origins: &[Origin]) -> Router {
    if origins.is_empty() {
        return router;
    }
    let cors = CorsLayer::new()
        .allow_origin(origins.iter().filter_map(Origin::header).collect::<Vec<_>>())
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(["grpc-status", "grpc-message", "grpc-status-details-bin"].map(HeaderName::from_static));
    router.layer(cors)
}

/// Whether a request is a health check, to which the limit on calls does not apply.
pub(crate) fn is_health_check(request: &Request) -> bool {
    matches!(request.uri().path(), "/healthcheck" | "/healthz") || request.uri().path().starts_with("/grpc.health.")
}

/// The response to a call that is refused before it reaches the router, in the caller's protocol.
pub(crate) fn refuse(request: &Request, status: Status) -> Response {
    if is_grpc(request) { status.into_http() } else { crate::rest::failure(status) }
}

/// Serves the port until the tasks stop and the running calls have ended.
pub(crate) fn serve(tasks: &Tasks, socket: Socket, port: Port) {
    let owner = tasks.clone();
    tasks.spawn(port.name, |stop| accept(owner, port, socket, stop));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use axum::{body::Body, routing::get};
    use http::header::ACCESS_CONTROL_ALLOW_ORIGIN;

    use super::*;

    #[tokio::test]
    async fn responses_are_readable_by_pages_of_listed_origins_only() {
        let router = || Router::new().route("/", get(async || "here"));
        let allowed = async |origins: &[&str], origin: &str| {
            let origins: Vec<Origin> = origins.iter().map(|origin| origin.parse().unwrap()).collect();
            let preflight = Request::options("/")
                .header("origin", origin)
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "authorization")
                .body(Body::empty())
                .unwrap();
            let response = with_cors(router(), &origins).oneshot(preflight).await.unwrap();
            response.headers().get(ACCESS_CONTROL_ALLOW_ORIGIN).is_some_and(|allowed| allowed == origin)
        };
        assert!(allowed(&["https://ctf.example"], "https://ctf.example").await);
        assert!(!allowed(&["https://ctf.example"], "https://evil.example").await);
        assert!(!allowed(&[], "https://ctf.example").await);
    }
}
