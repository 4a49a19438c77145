//! Requests with a part that is larger than any honest one.

use std::io::Write as _;

use gauntlet_api::v1::{
    challenge::{CreateChallengeRequest, challenge_store_client::ChallengeStoreClient},
    instance::CreateInstanceRequest,
};
use serde_json::json;
use tonic::{Code, Request, metadata::MetadataValue};

use super::{Target, read_to_close};

const MIB: usize = 1024 * 1024;

/// Sends a raw request and returns the status of the response; `None` if the connection was closed without one.
fn status(target: &Target, head: &str, body: &[u8]) -> Option<u16> {
    let mut stream = target.connect();
    // The server may respond and close before it has read everything.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let received = read_to_close(&mut stream);
    let line = String::from_utf8_lossy(received.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
    line.split(' ').nth(1).and_then(|status| status.parse().ok())
}

#[test]
fn oversized_requests_are_refused() {
    let target = Target::start();
    let bearer = format!("host: localhost\r\nconnection: close\r\nauthorization: Bearer {}\r\n", target.token);
    let refused = |what: &str, head: &str, body: &[u8], allowed: &[u16]| {
        let status = status(&target, head, body);
        assert!(status.is_none_or(|status| allowed.contains(&status)), "{what}: {status:?}");
    };
    target.under_attack(|| {
        let long = "x".repeat(MIB);
        refused("path", &format!("GET /{long} HTTP/1.1\r\n{bearer}\r\n"), b"", &[414, 431, 404, 400]);
        let path = format!("GET /api/v1/instance/web/{} HTTP/1.1\r\n{bearer}\r\n", "y".repeat(10_000));
        refused("id in a path", &path, b"", &[400, 414, 404]);
        refused("header", &format!("GET /healthcheck HTTP/1.1\r\n{bearer}x: {long}\r\n\r\n"), b"", &[431, 400]);
        let many: String = (0..10_000).map(|number| format!("x-{number}: y\r\n")).collect();
        refused("headers", &format!("GET /healthcheck HTTP/1.1\r\n{bearer}{many}\r\n"), b"", &[431, 400]);
        let head =
            |length: usize| format!("POST /api/v1/instance HTTP/1.1\r\n{bearer}content-length: {length}\r\n\r\n");
        refused("body", &head(64 * MIB), &vec![b' '; 64 * MIB], &[400, 413]);
        refused("announced body", &head(usize::MAX), b"{}", &[400, 408, 413, 431]);
        let chunk = format!("{MIB:x}\r\n{}\r\n", " ".repeat(MIB));
        let chunked = format!("POST /api/v1/instance HTTP/1.1\r\n{bearer}transfer-encoding: chunked\r\n\r\n");
        refused("chunks", &chunked, chunk.repeat(64).as_bytes(), &[400, 413]);
        let deep = "[".repeat(100_000);
        refused("depth", &head(deep.len()), deep.as_bytes(), &[400]);
        let body = json!({ "challengeId": "web", "sourceId": "y".repeat(100_000) }).to_string();
        refused("id", &head(body.len()), body.as_bytes(), &[400]);
        let additional: serde_json::Map<_, _> = (0..20_000).map(|number| (format!("k{number}"), json!("v"))).collect();
        let body = json!({ "challengeId": "web", "sourceId": "s", "additional": additional }).to_string();
        refused("additional", &head(body.len()), body.as_bytes(), &[400, 200]);
        target.world.runtime.block_on(grpc_messages(&target));
    });
}

/// gRPC messages above the limit of a message, and with long ids within it.
async fn grpc_messages(target: &Target) {
    let bearer: MetadataValue<_> = format!("Bearer {}", target.token).parse().unwrap();
    let interceptor = move |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", bearer.clone());
        Ok(request)
    };
    let channel = target.manager.channel().await;
    let mut challenges = ChallengeStoreClient::with_interceptor(channel.clone(), interceptor.clone());
    let large = CreateChallengeRequest { id: "x".repeat(16 * MIB), ..CreateChallengeRequest::default() };
    let refused = challenges.create_challenge(large).await.unwrap_err();
    assert!(
        matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted | Code::Unknown | Code::Internal),
        "{refused}"
    );
    let mut instances = gauntlet_api::v1::instance::instance_manager_client::InstanceManagerClient::with_interceptor(
        channel,
        interceptor,
    );
    let long = CreateInstanceRequest {
        challenge_id: "web".to_owned(),
        source_id: "x".repeat(MIB / 2),
        ..CreateInstanceRequest::default()
    };
    let refused = instances.create_instance(long).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}
