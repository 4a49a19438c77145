//! Snapshots of the responses of the v1 API over REST: each route and each error.

#![allow(clippy::unwrap_used, reason = "tests")]

use axum::{body::Body, extract::MatchedPath};
use futures::StreamExt as _;
use gauntlet_api::v1::{
    challenge::Challenge,
    instance::{QueryInstanceRequest, instance_manager_server::InstanceManager as _},
};
use insta::assert_snapshot;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
};

use super::{Health, health, response::stream};
use crate::fixture::{Api, call, text};
use crate::grpc::Messages;

/// Makes calls one after the other, and returns requests and responses as text.
async fn calls(api: &Api, calls: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (line, body) in calls {
        let separator = if body.is_empty() { "" } else { " " };
        let response = api.call(line, (*body).to_owned()).await;
        text.push_str(&format!("> {line}{separator}{body}\n{}\n", response.trim_end_matches('\n')));
    }
    text
}

/// Like [`calls`], for calls that must not change the store.
async fn refused(api: &Api, requests: &[(&str, &str)]) -> String {
    let before = api.stored().await;
    let responses = calls(api, requests).await;
    assert_eq!(api.stored().await, before);
    responses
}

#[tokio::test]
async fn create_challenge() {
    let whole = r#"{"id":"a/b c","scenario":"reg/web:v1","timeout":"1.5s","until":"2999-01-01T01:00:00+01:00","additional":{"k-1":"v"},"min":"1","max":2}"#;
    let least = r#"{"id":"least","scenario":"reg/web:v1","unknown":[1],"timeout":null}"#;
    let responses =
        calls(&Api::new().await, &[("POST /api/v1/challenge", whole), ("POST /api/v1/challenge?x=%zz", least)]).await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn retrieve_challenge() {
    let api = Api::with_instance().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"a/é %","scenario":"reg/web:v1"}"#).await;
    let targets = [("GET /api/v1/challenge/web", ""), ("GET /api/v1/challenge/a%2F%C3%A9%20%25", "")];
    assert_snapshot!(calls(&api, &targets).await);
}

#[tokio::test]
async fn query_challenge() {
    let api = Api::new().await;
    let mut responses = calls(&api, &[("GET /api/v1/challenge", "")]).await;
    for id in ["one", "two"] {
        api.call_ok("POST /api/v1/challenge", format!(r#"{{"id":"{id}","scenario":"reg/two"}}"#)).await;
    }
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"two","sourceId":"7"}"#).await;
    responses += &calls(&api, &[("GET /api/v1/challenge", "")]).await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn update_challenge() {
    let api = Api::with_instance().await;
    let target = "PATCH /api/v1/challenge/web";
    let responses = calls(
        &api,
        &[
            (
                target,
                r#"{"updateMask":"additional,until","additional":{"a":"b"},"until":"2999-01-01T00:00:00Z","min":9}"#,
            ),
            (target, r#"{"id":"other","updateMask":"timeout","updateStrategy":"blue_green"}"#),
            (target, r#"{"update_mask":"scenario","scenario":"reg/two","update_strategy":2}"#),
            (target, "{}"),
            (target, ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn delete_challenge() {
    let api = Api::with_instance().await;
    assert_snapshot!(calls(&api, &[("DELETE /api/v1/challenge/web", ""), ("GET /api/v1/challenge", "")]).await);
}

#[tokio::test]
async fn create_instance() {
    let api = Api::with_challenge().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"two","scenario":"reg/two"}"#).await;
    let target = "POST /api/v1/instance";
    let responses = calls(
        &api,
        &[
            (target, r#"{"challengeId":"web","sourceId":"7","additional":{"add-flag":"x"}}"#),
            (target, r#"{"challenge_id":"two","source_id":"0"}"#),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn query_instance() {
    let api = Api::with_instance().await;
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"web","sourceId":"team/é+8"}"#).await;
    let responses = calls(
        &api,
        &[
            ("GET /api/v1/instance?sourceId=7", ""),
            ("GET /api/v1/instance?source_id=team%2F%C3%A9%2B8&page=2", ""),
            ("GET /api/v1/instance?sourceId=nobody", ""),
            ("GET /api/v1/instance", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn retrieve_renew_and_delete_instance() {
    let api = Api::with_instance().await;
    let responses = calls(
        &api,
        &[
            ("GET /api/v1/instance/web/7", ""),
            ("PATCH /api/v1/instance/web/7", "{}"),
            ("PATCH /api/v1/instance/web/7", ""),
            ("PATCH /api/v1/instance/web/7", r#"{"challengeId":"other"}"#),
            ("DELETE /api/v1/instance/web/7", ""),
            ("GET /api/v1/instance", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn healthcheck() {
    let mut responses = String::new();
    let (sender, receiver) = watch::channel(Health::Starting);
    let failing = Health::Failing { why: "etcd does not answer".to_owned() };
    for health in [Health::Starting, Health::Serving, failing, Health::Stopping] {
        sender.send_replace(health);
        responses += &call(health::router(receiver.clone()), "GET /healthcheck", "").await;
        responses.push('\n');
    }
    sender.send_replace(Health::Serving);
    responses += &call(health::router(receiver.clone()), "POST /healthcheck", "").await;
    drop(sender);
    responses.push('\n');
    responses += &call(health::router(receiver), "GET /healthcheck", "").await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn challenge_exists() {
    let api = Api::with_challenge().await;
    assert_snapshot!(refused(&api, &[("POST /api/v1/challenge", r#"{"id":"web","scenario":"reg/web:v1"}"#)]).await);
}

#[tokio::test]
async fn challenge_unknown() {
    let responses = refused(
        &Api::new().await,
        &[
            ("GET /api/v1/challenge/no", ""),
            ("PATCH /api/v1/challenge/no", "{}"),
            ("DELETE /api/v1/challenge/no", ""),
            ("POST /api/v1/instance", r#"{"challengeId":"no","sourceId":"7"}"#),
            ("PATCH /api/v1/instance/no/7", "{}"),
            ("DELETE /api/v1/instance/no/7", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn challenge_expired() {
    let api = Api::new().await;
    let past = r#"{"id":"past","scenario":"reg/web:v1","until":"1999-01-01T00:00:00Z"}"#;
    api.call_ok("POST /api/v1/challenge", past).await;
    assert_snapshot!(refused(&api, &[("POST /api/v1/instance", r#"{"challengeId":"past","sourceId":"7"}"#)]).await);
}

#[tokio::test]
async fn challenge_without_renewal() {
    let api = Api::new().await;
    let until = r#"{"id":"until","scenario":"reg/web:v1","until":"2999-01-01T00:00:00Z"}"#;
    api.call_ok("POST /api/v1/challenge", until).await;
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"until","sourceId":"7"}"#).await;
    assert_snapshot!(refused(&api, &[("PATCH /api/v1/instance/until/7", "{}")]).await);
}

#[tokio::test]
async fn pool_bounds() {
    let api = Api::with_challenge().await;
    let responses = refused(
        &api,
        &[
            ("POST /api/v1/challenge", r#"{"id":"b","scenario":"reg/web:v1","min":-1,"max":-2}"#),
            ("POST /api/v1/challenge", r#"{"id":"b","scenario":"reg/web:v1","min":"3","max":"2"}"#),
            ("POST /api/v1/challenge", r#"{"id":"b","scenario":"reg/web:v1","min":"9000000000000000000"}"#),
            ("PATCH /api/v1/challenge/web", r#"{"updateMask":"min,max","min":3,"max":2}"#),
            ("PATCH /api/v1/challenge/web", r#"{"updateMask":"max","max":1001}"#),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn update_mask() {
    let api = Api::with_challenge().await;
    let responses = refused(
        &api,
        &[
            ("PATCH /api/v1/challenge/web", r#"{"updateMask":"min,instances"}"#),
            ("PATCH /api/v1/challenge/web", r#"{"updateMask":"update_strategy"}"#),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn instance_exists() {
    let api = Api::with_instance().await;
    assert_snapshot!(refused(&api, &[("POST /api/v1/instance", r#"{"challengeId":"web","sourceId":"7"}"#)]).await);
}

#[tokio::test]
async fn instance_unknown() {
    let api = Api::with_challenge().await;
    let responses = refused(
        &api,
        &[
            ("GET /api/v1/instance/no/7", ""),
            ("GET /api/v1/instance/web/7", ""),
            ("PATCH /api/v1/instance/web/7", "{}"),
            ("DELETE /api/v1/instance/web/7", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn instance_expired() {
    let api = Api::new().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"short","scenario":"reg/web:v1","timeout":"0s"}"#).await;
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"short","sourceId":"7"}"#).await;
    assert_snapshot!(refused(&api, &[("PATCH /api/v1/instance/short/7", "{}")]).await);
}

#[tokio::test]
async fn scenarios() {
    let api = Api::new().await;
    let references =
        ["reg/malformed:", "reg/unreachable", "reg/unknown", "reg/wrong", "reg/missing", "reg/unready", "reg/away", ""];
    let bodies = references.map(|reference| format!(r#"{{"id":"a","scenario":"{reference}"}}"#));
    let bodies: Vec<_> = bodies.iter().map(|body| ("POST /api/v1/challenge", &**body)).collect();
    assert_snapshot!(refused(&api, &bodies).await);
}

#[tokio::test]
async fn internal() {
    let api = Api::new().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"fails","scenario":"reg/fails"}"#).await;
    assert_snapshot!(refused(&api, &[("POST /api/v1/instance", r#"{"challengeId":"fails","sourceId":"7"}"#)]).await);
}

#[tokio::test]
async fn bodies() {
    let api = Api::with_challenge().await;
    let bodies = [
        "",
        "{",
        "[]",
        "{} {}",
        r#"{"id":1}"#,
        r#"{"id":"","scenario":"reg/web:v1"}"#,
        "{\"id\":\"a\\u0000b\",\"scenario\":\"reg/web:v1\"}",
        r#"{"id":"a","id":"b"}"#,
        r#"{"id":"a","additional":{"k":7}}"#,
        r#"{"id":"a","min":"many"}"#,
        r#"{"id":"a","timeout":"10 minutes"}"#,
        r#"{"id":"a","scenario":"reg/web:v1","timeout":"-1s"}"#,
        r#"{"id":"a","until":"tomorrow"}"#,
    ];
    let mut requests: Vec<_> = bodies.iter().map(|body| ("POST /api/v1/challenge", *body)).collect();
    requests.push(("PATCH /api/v1/challenge/web", r#"{"updateMask":"update_strategy,no_such"}"#));
    requests.push(("PATCH /api/v1/challenge/web", r#"{"updateStrategy":7}"#));
    requests.push(("PATCH /api/v1/instance/web/7", "no"));
    assert_snapshot!(refused(&api, &requests).await);
}

#[tokio::test]
async fn body_too_long() {
    let api = Api::new().await;
    let body = format!(r#"{{"id":"{}"}}"#, "a".repeat(1024 * 1024));
    assert_snapshot!(api.call("POST /api/v1/challenge", body).await);
}

/// A client that is still sending must get the error, not a reset connection.
#[tokio::test]
async fn client_that_sends_too_much_gets_the_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let api = Api::new().await;
    let client = async {
        let length = 8 * 1024 * 1024;
        let head = format!(
            "POST /api/v1/challenge HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&vec![b' '; length]).await.unwrap();
        let mut response = String::new();
        client.read_to_string(&mut response).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 400 "), "{response}");
        assert!(
            response.ends_with(r#""message":"The body is longer than 1048576 bytes; send less.","details":[]}"#),
            "{response}"
        );
    };
    tokio::select! {
        () = client => {}
        served = axum::serve(listener, api.router()).into_future() => panic!("the server stopped: {served:?}"),
    }
}

#[tokio::test]
async fn calls_have_the_route_that_matched() {
    let api = Api::with_instance().await;
    let (sender, mut routes) = futures::channel::mpsc::unbounded();
    let router = api.router().layer(axum::middleware::map_request(move |request: axum::extract::Request| {
        let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
        sender.unbounded_send(route).unwrap();
        std::future::ready(request)
    }));
    for (line, route) in [
        ("GET /api/v1/challenge", Some("/api/v1/challenge")),
        ("GET /api/v1/challenge/a%2Fb", Some("/api/v1/challenge/{id}")),
        ("PUT /api/v1/challenge/web", Some("/api/v1/challenge/{id}")),
        ("GET /api/v1/instance?sourceId=7", Some("/api/v1/instance")),
        ("GET /api/v1/instance/a%2Fb/c%2Fd", Some("/api/v1/instance/{challenge_id}/{source_id}")),
        ("GET /elsewhere", None),
    ] {
        call(router.clone(), line, "").await;
        assert_eq!(routes.next().await.unwrap().as_deref(), route, "{line}");
    }
}

#[tokio::test]
async fn paths() {
    let api = Api::with_challenge().await;
    let long = format!("GET /api/v1/challenge/{}", "a".repeat(257));
    let responses = refused(
        &api,
        &[
            ("GET /", ""),
            ("GET /api/v1/challenge/", ""),
            ("GET /api/v1/challenge/web/", ""),
            ("GET /api/v1/challenge/web/7", ""),
            ("GET /api/v1/instance/web", ""),
            ("GET /api/v1/instance/web/", ""),
            ("GET /api/v1/instance/web/7/8", ""),
            ("GET /api/v2/challenge", ""),
            ("GET /api/v1/challenge/..", ""),
            ("GET /api/v1/challenge/%2E%2E%2Fetc", ""),
            ("GET /api/v1/challenge/%zz", ""),
            ("GET /api/v1/challenge/%", ""),
            ("GET /api/v1/instance/%FF/7", ""),
            ("GET /api/v1/challenge/a%00b", ""),
            (&long, ""),
            ("GET /api/v1/instance?sourceId=7&source_id=7", ""),
            ("GET /api/v1/instance?sourceId=%ff", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

#[tokio::test]
async fn methods() {
    let api = Api::with_instance().await;
    let responses = refused(
        &api,
        &[
            ("PUT /api/v1/challenge", "{}"),
            ("POST /api/v1/challenge/web", "{}"),
            ("DELETE /api/v1/instance", ""),
            ("OPTIONS /api/v1/instance", ""),
            ("PUT /api/v1/instance/web/7", "{}"),
            ("HEAD /api/v1/challenge/web", ""),
        ],
    )
    .await;
    assert_snapshot!(responses);
}

/// Builds the response of a handler that returns these messages.
fn messages<const N: usize>(messages: [Result<Challenge, tonic::Status>; N]) -> tonic::Response<Messages<Challenge>> {
    tonic::Response::new(futures::stream::iter(messages).boxed())
}

fn message(until: Option<i64>) -> Result<Challenge, tonic::Status> {
    let until = until.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 });
    Ok(Challenge { id: "a".to_owned(), until, ..Challenge::default() })
}

fn error() -> Result<Challenge, tonic::Status> {
    Err(gauntlet_api::error::internal_error())
}

#[tokio::test]
async fn streams_that_fail() {
    let before = stream(messages([error()])).await;
    assert!(before.is_err(), "an error before the first message must be the response");
    let midway = stream(messages([message(None), error()])).await.unwrap_or_default();
    assert_snapshot!(text(midway).await);
}

#[tokio::test]
async fn messages_that_cannot_be_encoded_are_skipped() {
    let unencodable = || message(Some(i64::MAX));
    let response =
        stream(messages([unencodable(), message(None), unencodable(), message(None)])).await.unwrap_or_default();
    let response = text(response).await;
    assert!(
        response.starts_with("200 application/json") && response.matches("{\"result\":").count() == 2,
        "{response}"
    );
    assert!(!response.contains("error"), "{response}");
    let response = stream(messages([unencodable()])).await.unwrap_or_default();
    assert_eq!(text(response).await.lines().next(), Some("200"));
}

#[tokio::test]
async fn times_at_the_end_of_the_year_9999() {
    let api = Api::new().await;
    for (id, fields) in [("last", r#""until":"9999-12-31T23:59:59Z""#), ("overflow", r#""timeout":"315576000000s""#)] {
        api.call_ok("POST /api/v1/challenge", format!(r#"{{"id":"{id}","scenario":"reg/web:v1",{fields}}}"#)).await;
        api.call_ok("POST /api/v1/instance", format!(r#"{{"challengeId":"{id}","sourceId":"7"}}"#)).await;
    }
    let request = crate::fixture::caller(gauntlet_access::Scope::Read).request(QueryInstanceRequest::default());
    let listed: Vec<_> = api.handlers().query_instance(request).await.unwrap().into_inner().collect().await;
    let ends: Vec<_> = listed.into_iter().map(|instance| instance.unwrap().until.unwrap().seconds).collect();
    assert_eq!(ends, [253_402_300_799; 2]);
    assert_eq!(api.stored().await.matches("{\"result\":").count(), 2);
}

#[tokio::test]
async fn messages_are_sent_at_once() {
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    sender.unbounded_send(message(None)).unwrap();
    let response = stream(tonic::Response::new(receiver.boxed())).await.unwrap_or_default();
    let mut body = Body::into_data_stream(response.into_body());
    for _ in 0..2 {
        // No further message is available yet.
        let line = body.next().await.unwrap().unwrap();
        assert!(line.starts_with(b"{\"result\":{") && line.ends_with(b"}\n"), "{line:?}");
        sender.unbounded_send(message(None)).unwrap();
    }
}
