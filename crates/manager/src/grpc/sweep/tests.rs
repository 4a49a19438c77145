#![allow(clippy::unwrap_used, reason = "tests")]

use futures::TryStreamExt as _;
use gauntlet_access::Scope;
use gauntlet_api::extension::sweeper_client::SweeperClient;
use gauntlet_testing::eventually;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint};

use super::*;
use crate::{
    authorize::Credentials,
    fixture::{Api, caller},
};

/// Serves the API on a port, and returns a client of it.
async fn serve(api: &Api) -> SweeperClient<Channel> {
    let router = api.service(Credentials::default(), Some(Scope::Admin));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // The task ends with the runtime of the test.
    drop(tokio::spawn(async move { axum::serve(listener, router).await }));
    SweeperClient::new(Endpoint::from_shared(address).unwrap().connect_lazy())
}

async fn list(client: &mut SweeperClient<Channel>, limit: u32) -> Vec<ExpiredInstance> {
    client.list_expired(ListExpiredRequest { limit }).await.unwrap().into_inner().try_collect().await.unwrap()
}

#[tokio::test]
async fn lists_expired_instances_longest_overdue_first() {
    let api = Api::with_instance().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"short","scenario":"reg/web:v1","timeout":"0.001s"}"#).await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"endless","scenario":"reg/web:v1"}"#).await;
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"endless","sourceId":"7"}"#).await;
    let mut client = serve(&api).await;
    assert_eq!(list(&mut client, 0).await, []);

    for source in ["3", "1", "2"] {
        let body = format!(r#"{{"challengeId":"short","sourceId":"{source}"}}"#);
        api.call_ok("POST /api/v1/instance", body).await;
    }
    let expired = eventually("three expired instances", async || {
        Some(list(&mut client, 0).await).filter(|listed| listed.len() == 3)
    });
    let expired = expired.await;
    let sources: Vec<_> =
        expired.iter().map(|instance| (instance.challenge_id.as_str(), instance.source_id.as_str())).collect();
    assert_eq!(sources, [("short", "3"), ("short", "1"), ("short", "2")]);
    for instance in &expired {
        let (since, until) = (instance.since.unwrap(), instance.until.unwrap());
        assert!((since.seconds, since.nanos) < (until.seconds, until.nanos));
    }
    assert_eq!(list(&mut client, 2).await, expired.iter().take(2).cloned().collect::<Vec<_>>());
    assert_eq!(list(&mut client, 99).await, expired);

    api.call_ok("DELETE /api/v1/instance/short/3", "").await;
    assert_eq!(list(&mut client, 0).await, expired.iter().skip(1).cloned().collect::<Vec<_>>());
}

#[tokio::test]
async fn deletes_the_listed_instance_but_not_its_successor() {
    let api = Api::new().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"short","scenario":"reg/web:v1","timeout":"0.001s"}"#).await;
    let create = async || api.call_ok("POST /api/v1/instance", r#"{"challengeId":"short","sourceId":"1"}"#).await;
    create().await;
    let mut client = serve(&api).await;
    let mut only_expired = async || {
        eventually("one expired instance", async || match list(&mut client, 0).await.as_slice() {
            [instance] => Some(instance.clone()),
            _ => None,
        })
        .await
    };
    let request = |listed: ExpiredInstance| DeleteExpiredRequest {
        challenge_id: listed.challenge_id,
        source_id: listed.source_id,
        since: listed.since,
    };
    let first = request(only_expired().await);
    api.call_ok("DELETE /api/v1/instance/short/1", "").await;
    create().await;
    let second = request(only_expired().await);
    let delete = async |request: &DeleteExpiredRequest| {
        let response = api.handlers().delete_expired(caller(Scope::Admin).request(request.clone())).await;
        response.map(|response| response.into_inner().deleted).map_err(|status| status.code())
    };
    assert_eq!(delete(&first).await, Ok(false));
    assert_eq!(delete(&second).await, Ok(true));
    assert_eq!(delete(&second).await, Err(tonic::Code::NotFound));
    let without_since = DeleteExpiredRequest { since: None, ..second };
    assert_eq!(delete(&without_since).await, Err(tonic::Code::InvalidArgument));
}
