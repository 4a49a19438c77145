//! The v1 API over REST: decodes JSON, calls the gRPC handlers in process, and encodes their messages as JSON.
//!
//! Ids in the path override those in the body. Paths are matched segment by segment: `%2F` is part of an id, and a trailing slash makes another
//! path. `HEAD` works like `GET`; other methods that a path does not have are refused.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub(crate) mod health;
mod request;
mod response;

use axum::{
    Router,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use gauntlet_api::{
    error,
    v1::{
        challenge::{
            Challenge, CreateChallengeRequest, DeleteChallengeRequest, RetrieveChallengeRequest,
            UpdateChallengeRequest, challenge_store_server::ChallengeStore as _,
        },
        instance::{
            CreateInstanceRequest, DeleteInstanceRequest, Instance, QueryInstanceRequest, RenewInstanceRequest,
            RetrieveInstanceRequest, instance_manager_server::InstanceManager as _,
        },
    },
};

use crate::{caller::Caller, grpc::Handlers};
pub(crate) use health::Health;
pub(crate) use request::BODY_LIMIT;
use request::{Message, Path, SourceId};
use response::{Failure, Json, stream};

/// A response, or an error that becomes one.
type Result<T> = std::result::Result<T, Failure>;

/// The routes of the v1 API. Every response is JSON, also to unknown paths and methods, except the empty one of a stream without messages.
pub(crate) fn router(handlers: Handlers) -> Router {
    Router::new()
        .route("/api/v1/challenge", post(create_challenge).get(query_challenge))
        .route("/api/v1/challenge/{id}", get(retrieve_challenge).patch(update_challenge).delete(delete_challenge))
        .route("/api/v1/instance", post(create_instance).get(query_instance))
        .route(
            "/api/v1/instance/{challenge_id}/{source_id}",
            get(retrieve_instance).patch(renew_instance).delete(delete_instance),
        )
        .method_not_allowed_fallback(unknown_method)
        .fallback(async || Failure::refused(error::unknown_path()))
        .with_state(handlers)
}

/// The response to a call that was rejected before it reached the router.
pub(crate) fn failure(status: tonic::Status) -> Response {
    Failure::from(status).into_response()
}

async fn unknown_method() -> Failure {
    Failure::refused(error::unknown_method())
}

async fn create_challenge(
    State(handlers): State<Handlers>,
    caller: Caller,
    Message(message): Message<CreateChallengeRequest>,
) -> Result<Json<Challenge>> {
    Ok(handlers.create_challenge(caller.request(message)).await?.into())
}

async fn retrieve_challenge(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Challenge>> {
    Ok(handlers.retrieve_challenge(caller.request(RetrieveChallengeRequest { id })).await?.into())
}

async fn query_challenge(State(handlers): State<Handlers>, caller: Caller) -> Result<Response> {
    stream(handlers.query_challenge(caller.request(())).await?).await
}

async fn update_challenge(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path(id): Path<String>,
    Message(message): Message<UpdateChallengeRequest>,
) -> Result<Json<Challenge>> {
    let message = UpdateChallengeRequest { id, ..message };
    Ok(handlers.update_challenge(caller.request(message)).await?.into())
}

async fn delete_challenge(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<()>> {
    Ok(handlers.delete_challenge(caller.request(DeleteChallengeRequest { id })).await?.into())
}

async fn create_instance(
    State(handlers): State<Handlers>,
    caller: Caller,
    Message(message): Message<CreateInstanceRequest>,
) -> Result<Json<Instance>> {
    Ok(handlers.create_instance(caller.request(message)).await?.into())
}

async fn query_instance(
    State(handlers): State<Handlers>,
    caller: Caller,
    SourceId(source_id): SourceId,
) -> Result<Response> {
    stream(handlers.query_instance(caller.request(QueryInstanceRequest { source_id })).await?).await
}

async fn retrieve_instance(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path((challenge_id, source_id)): Path<(String, String)>,
) -> Result<Json<Instance>> {
    let message = RetrieveInstanceRequest { challenge_id, source_id };
    Ok(handlers.retrieve_instance(caller.request(message)).await?.into())
}

async fn renew_instance(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path((challenge_id, source_id)): Path<(String, String)>,
    // Only checked: the path has both ids.
    Message(_): Message<RenewInstanceRequest>,
) -> Result<Json<Instance>> {
    let message = RenewInstanceRequest { challenge_id, source_id };
    Ok(handlers.renew_instance(caller.request(message)).await?.into())
}

async fn delete_instance(
    State(handlers): State<Handlers>,
    caller: Caller,
    Path((challenge_id, source_id)): Path<(String, String)>,
) -> Result<Json<()>> {
    let message = DeleteInstanceRequest { challenge_id, source_id };
    Ok(handlers.delete_instance(caller.request(message)).await?.into())
}

#[cfg(test)]
mod tests;
