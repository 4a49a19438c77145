//! Tokens that are missing, wrong, expired, of others, or of too low a scope, on every RPC and REST route.

use gauntlet_api::v1::FILE_DESCRIPTOR_SET;
use prost::Message as _;
use tonic::{Code, Request, Status, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;

use super::{Target, as_holder, create_token, eventually};
use crate::harness::rest_with;

/// The scopes, lowest first.
const SCOPES: [&str; 3] = ["read", "operate", "admin"];

/// An RPC, the lowest scope that may call it, and the method and path of its REST route.
type Call = (&'static str, &'static str, Option<(&'static str, &'static str)>);

/// Every RPC.
const CALLS: [Call; 12] = [
    ("/api.v1.challenge.ChallengeStore/CreateChallenge", "admin", Some(("POST", "/api/v1/challenge"))),
    ("/api.v1.challenge.ChallengeStore/RetrieveChallenge", "read", Some(("GET", "/api/v1/challenge/none"))),
    ("/api.v1.challenge.ChallengeStore/QueryChallenge", "read", Some(("GET", "/api/v1/challenge"))),
    ("/api.v1.challenge.ChallengeStore/UpdateChallenge", "admin", Some(("PATCH", "/api/v1/challenge/none"))),
    ("/api.v1.challenge.ChallengeStore/DeleteChallenge", "admin", Some(("DELETE", "/api/v1/challenge/none"))),
    ("/api.v1.instance.InstanceManager/CreateInstance", "operate", Some(("POST", "/api/v1/instance"))),
    ("/api.v1.instance.InstanceManager/RetrieveInstance", "read", Some(("GET", "/api/v1/instance/none/none"))),
    ("/api.v1.instance.InstanceManager/QueryInstance", "read", Some(("GET", "/api/v1/instance"))),
    ("/api.v1.instance.InstanceManager/RenewInstance", "operate", Some(("PATCH", "/api/v1/instance/none/none"))),
    ("/api.v1.instance.InstanceManager/DeleteInstance", "operate", Some(("DELETE", "/api/v1/instance/none/none"))),
    ("/gauntlet.v1.Sweeper/ListExpired", "read", None),
    ("/gauntlet.v1.Sweeper/DeleteExpired", "operate", None),
];

/// Calls an RPC with an empty message, and returns its status.
async fn code(channel: &Channel, rpc: &'static str, authorization: Option<&str>) -> Code {
    let mut request = Request::new(());
    if let Some(authorization) = authorization {
        request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    }
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let called = client.server_streaming(request, PathAndQuery::from_static(rpc), ProstCodec::<(), ()>::default());
    let first = async { called.await?.into_inner().message().await };
    first.await.err().map_or(Code::Ok, |status: Status| status.code())
}

/// Whether REST refuses a caller for their credentials.
fn status(target: &Target, (method, path): (&str, &str), authorization: Option<&str>) -> u16 {
    let headers: Vec<_> = authorization.map(|value| ("authorization", value.to_owned())).into_iter().collect();
    rest_with(&target.manager.url, method, path, Some(b"{}"), &headers).unwrap().status
}

#[test]
fn every_call_needs_its_scope() {
    let target = Target::start();
    let tokens = SCOPES.map(|scope| create_token(&target.world, "tokens", &["--name", scope, "--scope", scope]));
    eventually("the tokens are read", || {
        let answer = as_holder(&target.manager.url, &tokens[2], "GET", "/api/v1/challenge", "")?;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    });
    let channel = target.world.runtime.block_on(target.manager.channel());
    for (rpc, needs, route) in CALLS {
        let needs = SCOPES.iter().position(|scope| *scope == needs).unwrap();
        for (has, token) in tokens.iter().enumerate() {
            let bearer = format!("Bearer {token}");
            let is_denied = target.world.runtime.block_on(code(&channel, rpc, Some(&bearer))) == Code::PermissionDenied;
            assert_eq!(is_denied, has < needs, "{rpc} with the scope {}", SCOPES[has]);
            if let Some(route) = route {
                let is_denied = status(&target, route, Some(&bearer)) == 403;
                assert_eq!(is_denied, has < needs, "{route:?} with the scope {}", SCOPES[has]);
            }
        }
    }
}

/// A new RPC needs a row in [`CALLS`].
#[test]
fn every_call_is_tested() {
    let mut defined = Vec::new();
    for set in [FILE_DESCRIPTOR_SET, gauntlet_api::extension::FILE_DESCRIPTOR_SET] {
        for file in prost_types::FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                let method = |method: &prost_types::MethodDescriptorProto| {
                    format!("/{}.{}/{}", file.package(), service.name(), method.name())
                };
                defined.extend(service.method.iter().map(method));
            }
        }
    }
    defined.sort();
    defined.dedup();
    let mut tested = CALLS.map(|(rpc, ..)| rpc.to_owned());
    tested.sort();
    assert_eq!(defined, tested);
}

#[test]
fn tokens_that_are_not_valid_are_refused_everywhere() {
    let target = Target::start();
    let foreign = create_token(&target.world, "other-tokens", &["--name", "foreign", "--scope", "admin"]);
    let expiring = create_token(&target.world, "tokens", &["--name", "old", "--scope", "admin", "--expires-in", "1s"]);
    let is_refused = |authorization: &str| status(&target, ("GET", "/api/v1/challenge"), Some(authorization)) == 401;
    eventually("the token expires", || {
        is_refused(&format!("Bearer {expiring}")).then_some(()).ok_or_else(|| "it is valid".to_owned())
    });
    let honest = target.token.as_str();
    let (start, secret) = honest.rsplit_once('_').unwrap();
    let (foreign_start, foreign_secret) = foreign.rsplit_once('_').unwrap();
    let flipped = if secret.ends_with('0') { "1" } else { "0" };
    let wrong = format!("{start}_{}{flipped}", &secret[..secret.len() - 1]);
    let invalid = [
        format!("Bearer {expiring}"),
        format!("Bearer {foreign}"),
        format!("Bearer {wrong}"),
        format!("Bearer {}", &honest[..honest.len() - 1]),
        format!("Bearer {honest}0"),
        format!("Bearer {start}_"),
        format!("Bearer {start}_{foreign_secret}"),
        format!("Bearer {foreign_start}_{secret}"),
        format!("Bearer {}", honest.to_uppercase()),
        format!("Bearer {honest} {honest}"),
        format!("Bearer {honest},Bearer {foreign}"),
        "Bearer ".to_owned(),
        "Bearer".to_owned(),
        "Basic aG9uZXN0OmhvbmVzdA==".to_owned(),
        honest.to_owned(),
        String::new(),
    ];
    let channel = target.world.runtime.block_on(target.manager.channel());
    for authorization in invalid.iter().map(|value| Some(value.as_str())).chain([None]) {
        for (rpc, _, route) in CALLS {
            let code = target.world.runtime.block_on(code(&channel, rpc, authorization));
            assert_eq!(code, Code::Unauthenticated, "{rpc} with {authorization:?}");
            if let Some(route) = route {
                assert_eq!(status(&target, route, authorization), 401, "{route:?} with {authorization:?}");
            }
        }
    }
    // A token in the query string would be in the logs of every proxy.
    let route = format!("/api/v1/challenge?access_token={honest}");
    assert_eq!(status(&target, ("GET", &route), None), 401);
    assert_eq!(status(&target, ("GET", "/api/v1/challenge"), Some(&format!("Bearer {honest}"))), 200);
}
