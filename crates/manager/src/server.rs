//! One port for gRPC, gRPC-web and REST; another for the debug page.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::{Router, extract::Request};
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
use tokio::net::TcpListener;
use tower::{Layer as _, ServiceExt as _};

use crate::{grpc::Handlers, tasks::Tasks};

/// The RPCs that are served, as `package.Service/Method`.
const METHODS: [&str; 11] = [
    "api.v1.challenge.ChallengeStore/CreateChallenge",
    "api.v1.challenge.ChallengeStore/RetrieveChallenge",
    "api.v1.challenge.ChallengeStore/QueryChallenge",
    "api.v1.challenge.ChallengeStore/UpdateChallenge",
    "api.v1.challenge.ChallengeStore/DeleteChallenge",
    "api.v1.instance.InstanceManager/CreateInstance",
    "api.v1.instance.InstanceManager/RetrieveInstance",
    "api.v1.instance.InstanceManager/QueryInstance",
    "api.v1.instance.InstanceManager/RenewInstance",
    "api.v1.instance.InstanceManager/DeleteInstance",
    "gauntlet.v1.Sweeper/ListExpired",
];

/// Everything on the API's port, told apart by content type: gRPC says what it is, the rest is REST.
pub(crate) fn api<H>(handlers: Handlers, rest: Router, health: H, instruments: &Instruments) -> Result<Router>
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
    let routes = tonic::service::Routes::new(ChallengeStoreServer::new(handlers.clone()))
        .add_service(InstanceManagerServer::new(handlers.clone()))
        .add_service(SweeperServer::new(handlers))
        .add_service(health)
        .add_service(reflection().build_v1().context("reflection")?)
        .add_service(reflection().build_v1alpha().context("reflection")?)
        .prepare();
    let grpc = tonic_web::GrpcWebLayer::new().layer(GrpcServerLayer::new(instruments, METHODS).layer(routes));
    let rest = rest.layer(HttpServerLayer::new(instruments, &["/healthcheck"]));
    Ok(Router::new().fallback(move |request: Request| {
        let (grpc, rest) = (grpc.clone(), rest.clone());
        async move {
            if is_grpc(&request) {
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

fn is_grpc(request: &Request) -> bool {
    let content_type = request.headers().get(http::header::CONTENT_TYPE);
    content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// Serves a router until the tasks stop, then until the calls under way have ended. Answers the address it listens on.
pub(crate) async fn serve(
    tasks: &Tasks,
    name: &'static str,
    address: SocketAddr,
    router: Router,
) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for the {name}; is something else running there?"))?;
    let address = listener.local_addr()?;
    tasks.background(name, |stop| async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(name, %error, "the server ended");
        }
    });
    Ok(address)
}
