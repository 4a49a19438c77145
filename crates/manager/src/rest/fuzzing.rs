//! The entry point for the fuzz target of REST requests. Only with the feature `fuzzing`.
#![allow(clippy::expect_used, reason = "a failed property must end the fuzzer")]

use std::{cell::LazyCell, convert::Infallible};

use axum::{Router, body::Body, routing::any};
use gauntlet_api::v1::{
    challenge::{CreateChallengeRequest, UpdateChallengeRequest},
    instance::{CreateInstanceRequest, RenewInstanceRequest},
};
use http::{Request, StatusCode};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt as _;

use super::request::{Message, Path, SourceId};

thread_local! {
    static SERVER: LazyCell<(Runtime, Router)> = LazyCell::new(|| {
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        let router = Router::new()
            .route("/api/v1/challenge", any(async |Message(_): Message<CreateChallengeRequest>| ()))
            .route("/api/v1/challenge/{id}", any(async |Path(_): Path<String>, Message(_): Message<UpdateChallengeRequest>| ()))
            .route("/api/v1/instance", any(async |SourceId(_): SourceId, Message(_): Message<CreateInstanceRequest>| ()))
            .route(
                "/api/v1/instance/{challenge_id}/{source_id}",
                any(async |Path(_): Path<(String, String)>, Message(_): Message<RenewInstanceRequest>| ()),
            );
        (runtime, router)
    });
}

/// Decodes a request: the first line is path and query, the rest is the body. It is decoded, or refused as the client's fault.
pub fn request(bytes: &[u8]) {
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (path, body) = bytes.split_at(line);
    let body = body.get(1..).unwrap_or_default().to_vec();
    let Ok(request) = Request::builder().method("POST").uri(path).body(Body::from(body)) else { return };
    SERVER.with(|server| {
        let (runtime, router) = &**server;
        let Ok::<_, Infallible>(response) = runtime.block_on(router.clone().oneshot(request));
        assert_ne!(response.status(), StatusCode::INTERNAL_SERVER_ERROR, "a request was the server's fault");
    });
}
