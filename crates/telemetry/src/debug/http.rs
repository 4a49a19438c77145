use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Encoder, TextEncoder};

use super::DebugPage;

/// The page loads nothing and runs only what is in it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";

impl DebugPage {
    /// The pages: `/` for people, `/debug/state.json` for programs, `/healthz`, and `/metrics` where
    /// `OTEL_METRICS_EXPORTER` names prometheus.
    ///
    /// They show names of challenges and identities, and there is no authentication: serve them on a local address.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/", get(page))
            .route("/debug/state.json", get(state))
            .route("/healthz", get(async || "ok\n"))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }
}

async fn page() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(include_str!("page.html")))
}

async fn state(State(debug): State<DebugPage>) -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "no-store")], Json(debug.snapshot().await))
}

async fn metrics(State(debug): State<DebugPage>) -> Response {
    let Some(registry) = debug.shared.sources.get().and_then(|sources| sources.registry.clone()) else {
        let how = "metrics are not served here; set OTEL_METRICS_EXPORTER=prometheus, or otlp,prometheus for both\n";
        return (StatusCode::NOT_FOUND, how).into_response();
    };
    // Gathering waits for the gauges, so it must not hold up this runtime.
    let text = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).map(|()| text)
    });
    match text.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => {
            tracing::error!(%error, "metrics could not be encoded");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
