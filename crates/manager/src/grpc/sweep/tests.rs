#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use futures::TryStreamExt as _;
use gauntlet_api::extension::sweeper_client::SweeperClient;
use gauntlet_telemetry::instruments::Instruments;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint};

use super::*;
use crate::fixture::Api;

/// The API's port, as clients reach it.
async fn served(api: &Api) -> SweeperClient<Channel> {
    let (_, health) = tonic_health::server::health_reporter();
    let router = crate::server::api(api.handlers(), api.router(), health, &Instruments::noop()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // Ends with the test's runtime.
    drop(tokio::spawn(async move { axum::serve(listener, router).await }));
    SweeperClient::new(Endpoint::from_shared(address).unwrap().connect_lazy())
}

async fn list(client: &mut SweeperClient<Channel>, limit: u32) -> Vec<ExpiredInstance> {
    client.list_expired(ListExpiredRequest { limit }).await.unwrap().into_inner().try_collect().await.unwrap()
}

#[tokio::test]
async fn lists_what_has_expired_longest_overdue_first() {
    let api = Api::with_instance().await;
    api.done("POST /api/v1/challenge", r#"{"id":"short","scenario":"reg/web:v1","timeout":"0.001s"}"#).await;
    api.done("POST /api/v1/challenge", r#"{"id":"endless","scenario":"reg/web:v1"}"#).await;
    api.done("POST /api/v1/instance", r#"{"challengeId":"endless","sourceId":"7"}"#).await;
    let mut client = served(&api).await;
    assert_eq!(list(&mut client, 0).await, []);

    for source in ["3", "1", "2"] {
        let body = format!(r#"{{"challengeId":"short","sourceId":"{source}"}}"#);
        api.done("POST /api/v1/instance", body).await;
    }
    let found = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let found = list(&mut client, 0).await;
            if found.len() == 3 {
                break found;
            }
        }
    });
    let found = found.await.unwrap();
    let sources: Vec<_> = found.iter().map(|one| (one.challenge_id.as_str(), one.source_id.as_str())).collect();
    assert_eq!(sources, [("short", "3"), ("short", "1"), ("short", "2")]);
    for one in &found {
        let (since, until) = (one.since.unwrap(), one.until.unwrap());
        assert!((since.seconds, since.nanos) < (until.seconds, until.nanos));
    }
    assert_eq!(list(&mut client, 2).await, found.iter().take(2).cloned().collect::<Vec<_>>());
    assert_eq!(list(&mut client, 99).await, found);

    api.done("DELETE /api/v1/instance/short/3", "").await;
    assert_eq!(list(&mut client, 0).await, found.iter().skip(1).cloned().collect::<Vec<_>>());
}

#[tokio::test]
async fn deletes_what_was_listed_and_nothing_that_took_its_place() {
    let api = Api::new().await;
    api.done("POST /api/v1/challenge", r#"{"id":"short","scenario":"reg/web:v1","timeout":"0.001s"}"#).await;
    let create = async || api.done("POST /api/v1/instance", r#"{"challengeId":"short","sourceId":"1"}"#).await;
    create().await;
    let mut client = served(&api).await;
    let mut only = async || {
        let found = async {
            loop {
                if let [only] = list(&mut client, 0).await.as_slice() {
                    break only.clone();
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), found).await.unwrap()
    };
    let request = |listed: ExpiredInstance| DeleteExpiredRequest {
        challenge_id: listed.challenge_id,
        source_id: listed.source_id,
        since: listed.since,
    };
    let first = request(only().await);
    api.done("DELETE /api/v1/instance/short/1", "").await;
    create().await;
    let second = request(only().await);
    let delete = async |request: &DeleteExpiredRequest| {
        let answer = api.handlers().delete_expired(Request::new(request.clone())).await;
        answer.map(|answer| answer.into_inner().deleted).map_err(|status| status.code())
    };
    assert_eq!(delete(&first).await, Ok(false));
    assert_eq!(delete(&second).await, Ok(true));
    assert_eq!(delete(&second).await, Err(tonic::Code::NotFound));
    let without = DeleteExpiredRequest { since: None, ..second };
    assert_eq!(delete(&without).await, Err(tonic::Code::InvalidArgument));
}
