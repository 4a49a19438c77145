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
    answer::{Failure, with_json},
    unknown_method,
};

/// Whether the manager can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Health {
    /// Not yet.
    Starting,
    /// It can.
    Serving,
    /// It cannot.
    Failing {
        /// Why, shown to whoever asks.
        why: String,
    },
    /// Not any more.
    Stopping,
}

/// `GET /healthcheck`: 200 `{"status":"ok"}` when serving, else 503 and an error of code 14 that says why. A channel whose sender is gone
/// is not serving: nobody looks any more.
pub(crate) fn router(health: watch::Receiver<Health>) -> Router {
    Router::new().route("/healthcheck", get(healthcheck)).method_not_allowed_fallback(unknown_method).with_state(health)
}

async fn healthcheck(State(health): State<watch::Receiver<Health>>) -> Response {
    let watched = health.has_changed().is_ok();
    let why = match &*health.borrow() {
        Health::Serving if watched => return with_json(StatusCode::OK, r#"{"status":"ok"}"#),
        Health::Serving => "The manager no longer looks after its health.".to_owned(),
        Health::Starting => "The manager is starting: it looks at what runs.".to_owned(),
        Health::Stopping => "The manager is stopping.".to_owned(),
        Health::Failing { why } => format!("The manager cannot serve: {why}."),
    };
    Failure::from(Status::unavailable(why)).into_response()
}
