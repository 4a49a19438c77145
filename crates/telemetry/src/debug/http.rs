//! The HTTP routes of the debug page.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Encoder, TextEncoder};

use super::DebugPage;

/// Nothing is loaded from outside, and only inline scripts run.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";

impl DebugPage {
    /// The routes: `/` (the page), `/debug/state.json` (the same data), `/healthz`, and `/metrics` if `OTEL_METRICS_EXPORTER` includes
    /// prometheus.
    ///
    /// There is no authentication, and the page shows challenge ids and identities. Serve it on a local address only.
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
        let message = "this process does not serve metrics; set OTEL_METRICS_EXPORTER=prometheus, or otlp,prometheus to also export them\n";
        return (StatusCode::NOT_FOUND, message).into_response();
    };
    // Gathering blocks until the gauges are read.
    let text = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).map(|()| text)
    });
    match text.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot encode the metrics for Prometheus");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
