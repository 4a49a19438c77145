//! `GET /healthcheck`.

use axum::{
    Router,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::get,
};
use http::StatusCode;
use tokio::sync::watch;
use tonic::Status;

use super::{
    response::{Failure, with_json},
    unknown_method,
};

/// Whether the manager can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Health {
    /// The first check or the first reconcile pass is not complete.
    Starting,
    /// It can serve.
    Serving,
    /// A check failed.
    Failing {
        /// Why; part of the response.
        why: String,
    },
    /// It is shutting down.
    Stopping,
}

/// Routes `GET /healthcheck`: 200 `{"status":"ok"}` when serving, otherwise 503 and an error of code 14 with the reason. If the sender of `health`
/// is dropped, the health is unknown, and the manager does not count as serving.
pub(crate) fn router(health: watch::Receiver<Health>) -> Router {
    Router::new().route("/healthcheck", get(healthcheck)).method_not_allowed_fallback(unknown_method).with_state(health)
}

async fn healthcheck(State(health): State<watch::Receiver<Health>>) -> Response {
    let watched = health.has_changed().is_ok();
    let why = match &*health.borrow() {
        Health::Serving if watched => return with_json(StatusCode::OK, r#"{"status":"ok"}"#),
        Health::Serving => "The health of the manager is no longer checked.".to_owned(),
        Health::Starting => "The manager is starting: it checks its instances.".to_owned(),
        Health::Stopping => "The manager is stopping.".to_owned(),
        Health::Failing { why } => format!("The manager cannot serve: {why}."),
    };
    Failure::from(Status::unavailable(why)).into_response()
}
