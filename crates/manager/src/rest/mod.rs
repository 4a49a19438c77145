//! The v1 API over REST: JSON in, the gRPC handlers in process, JSON out.
//!
//! What stands in a path goes over what stands in a body. A path is known with its segments whole: `%2F` is part of an id, a slash at
//! the end is another path. `HEAD` is answered as `GET` without its body; any other method that the table does not have is refused.

mod answer;
pub(crate) mod health;
mod request;

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
use tonic::Request;

use crate::grpc::Handlers;
use answer::{Answer, Failure, stream};
pub(crate) use health::Health;
use request::{Message, Path, SourceId};

/// A failure is answered with the code's HTTP status and the error as JSON.
type Result<T> = std::result::Result<T, Failure>;

/// The REST table of the v1 API. Every answer but that of a stream without items is JSON, those to unknown paths and methods too.
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

/// An error that is answered before there is a call.
pub(crate) fn failure(status: tonic::Status) -> Response {
    Failure::from(status).into_response()
}

async fn unknown_method() -> Failure {
    Failure::refused(error::unknown_method())
}

async fn create_challenge(
    State(handlers): State<Handlers>,
    Message(message): Message<CreateChallengeRequest>,
) -> Result<Answer<Challenge>> {
    Ok(handlers.create_challenge(Request::new(message)).await?.into())
}

async fn retrieve_challenge(State(handlers): State<Handlers>, Path(id): Path<String>) -> Result<Answer<Challenge>> {
    Ok(handlers.retrieve_challenge(Request::new(RetrieveChallengeRequest { id })).await?.into())
}

async fn query_challenge(State(handlers): State<Handlers>) -> Result<Response> {
    stream(handlers.query_challenge(Request::new(())).await?).await
}

async fn update_challenge(
    State(handlers): State<Handlers>,
    Path(id): Path<String>,
    Message(message): Message<UpdateChallengeRequest>,
) -> Result<Answer<Challenge>> {
    let message = UpdateChallengeRequest { id, ..message };
    Ok(handlers.update_challenge(Request::new(message)).await?.into())
}

async fn delete_challenge(State(handlers): State<Handlers>, Path(id): Path<String>) -> Result<Answer<()>> {
    Ok(handlers.delete_challenge(Request::new(DeleteChallengeRequest { id })).await?.into())
}

async fn create_instance(
    State(handlers): State<Handlers>,
    Message(message): Message<CreateInstanceRequest>,
) -> Result<Answer<Instance>> {
    Ok(handlers.create_instance(Request::new(message)).await?.into())
}

async fn query_instance(State(handlers): State<Handlers>, SourceId(source_id): SourceId) -> Result<Response> {
    stream(handlers.query_instance(Request::new(QueryInstanceRequest { source_id })).await?).await
}

async fn retrieve_instance(
    State(handlers): State<Handlers>,
    Path((challenge_id, source_id)): Path<(String, String)>,
) -> Result<Answer<Instance>> {
    let message = RetrieveInstanceRequest { challenge_id, source_id };
    Ok(handlers.retrieve_instance(Request::new(message)).await?.into())
}

async fn renew_instance(
    State(handlers): State<Handlers>,
    Path((challenge_id, source_id)): Path<(String, String)>,
    // Read for its form only: the path says all there is to say.
    Message(_): Message<RenewInstanceRequest>,
) -> Result<Answer<Instance>> {
    let message = RenewInstanceRequest { challenge_id, source_id };
    Ok(handlers.renew_instance(Request::new(message)).await?.into())
}

async fn delete_instance(
    State(handlers): State<Handlers>,
    Path((challenge_id, source_id)): Path<(String, String)>,
) -> Result<Answer<()>> {
    let message = DeleteInstanceRequest { challenge_id, source_id };
    Ok(handlers.delete_instance(Request::new(message)).await?.into())
}

#[cfg(test)]
mod tests;
