//! Limits on the rate of calls.

use super::*;

/// The API without credentials for callers at `address`.
fn limited(api: &Api, calls: u32, changes: u32, address: PeerAddress) -> Router {
    let openness = (Openness(None), Openness(Some(Scope::Read)));
    let authorizer = Authorizer::new(Arc::new(Files::new().credentials()), openness, limits(calls, changes));
    let layer = AuthorizeLayer::new(authorizer, rest_failure);
    let peer = Peer { address, certificate: None, policy: Policy { anonymous: Some(Scope::Admin) } };
    rest_router(api.handlers()).layer(layer).layer(Extension(peer))
}

#[tokio::test]
async fn caller_that_makes_too_many_calls_learns_when_to_retry() {
    let router = limited(&Api::new().await, 1, 0, PEER);
    let get = |authorization: Vec<String>| {
        let request = request("GET", "/api/v1/challenge", &authorization).body(Body::empty()).unwrap();
        let router = router.clone();
        async move { router.oneshot(request).await.unwrap() }
    };
    assert_eq!(get(Vec::new()).await.status(), 200);
    let refused = get(Vec::new()).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers().get("retry-after").unwrap(), "1");
    let body = refused.into_body().collect().await.unwrap().to_bytes();
    let body = str::from_utf8(&body).unwrap();
    assert!(body.contains("CALL_RATE_EXCEEDED") && body.contains("google.rpc.RetryInfo"), "{body}");
    // Others have allowances of their own: the holder of a token, also at the same address.
    assert_eq!(get(bearer(&token_of(Scope::Read).unwrap())).await.status(), 200);
    assert_eq!(get(bearer(&token_of(Scope::Read).unwrap())).await.status(), 429);
    // Guesses count against the address.
    assert_eq!(get(bearer(&text(&token(9)))).await.status(), 429);
}

#[tokio::test]
async fn source_whose_instances_change_too_often_is_refused() {
    let api = Api::with_instance().await;
    let router = limited(&api, 0, 1, PEER);
    let renew = async |source: &str| rest(&router, "PATCH", &format!("/api/v1/instance/web/{source}"), &[], "{}").await;
    assert_eq!(renew("7").await.0, 200);
    let (status, _, body) = renew("7").await;
    assert!(status == 429 && body.contains("SOURCE_RATE_EXCEEDED"), "{body}");
    assert_eq!(renew("8").await.0, 404);
    assert_eq!(rest(&router, "GET", "/api/v1/instance/web/7", &[], "").await.0, 200);
}

#[test]
fn addresses_of_one_host_are_counted_together() {
    let key = |address: &str| CallerKey::of_address(PeerAddress::Tcp(address.parse().unwrap()));
    assert_eq!(key("[2001:db8::1]:1"), key("[2001:db8::ffff:2]:2"));
    assert_ne!(key("[2001:db8::1]:1"), key("[2001:db8:0:1::1]:1"));
    assert_eq!(key("10.0.0.1:1"), key("[::ffff:10.0.0.1]:2"));
    assert_ne!(key("10.0.0.1:1"), key("10.0.0.2:1"));
}
