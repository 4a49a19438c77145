//! One file, because each test calls the same server, with other credentials.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::{collections::BTreeSet, path::Path};

use axum::{Extension, Router, body::Body, routing::get};
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use gauntlet_access::{Name, Scope, Token, TokenRecord, append_record};
use gauntlet_api::{error::reason, extension, v1};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use jiff::{Timestamp, ToSpan as _};
use prost::Message as _;
use rcgen::{CertificateParams, DnType, KeyPair};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use secrecy::ExposeSecret as _;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use super::{rules::RULES, *};
use crate::{
    config::AccessConfig,
    fixture::{Api, Logs, PEER, limits},
    peer::{ClientCertificate, PeerAddress, Policy},
    rest::{failure as rest_failure, router as rest_router},
    tasks::Tasks,
};

mod audited;
mod cost;
mod rates;
mod reload;

/// Ids of challenges in the token file of [`Files`].
const BOUND: &str = "web";

fn token(byte: u8) -> Token {
    Token::generate(&[byte; Token::RANDOM_BYTES])
}

fn text(token: &Token) -> String {
    token.reveal().expose_secret().to_owned()
}

/// The token of each scope, one bound to [`BOUND`], and an expired one.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        let record = |byte, name: &str, scope| {
            TokenRecord::new(&token(byte), Name::new(name).unwrap(), scope, Timestamp::UNIX_EPOCH)
        };
        let mut bound = record(4, "bound", Scope::Admin);
        bound.challenges = Some(BTreeSet::from([Name::new(BOUND).unwrap()]));
        let mut late = record(5, "late", Scope::Admin);
        late.expires = Some(Timestamp::now() - 1.second());
        files.write(&[
            record(1, "reader", Scope::Read),
            record(2, "platform", Scope::Operate),
            record(3, "author", Scope::Admin),
            bound,
            late,
        ]);
        let subjects = r#"{"subject":"CN:platform","name":"mesh","scope":"operate"}"#;
        std::fs::write(files.dir.path().join("subjects"), subjects).unwrap();
        files
    }

    fn tokens(&self) -> std::path::PathBuf {
        self.dir.path().join("tokens")
    }

    fn write(&self, records: &[TokenRecord]) {
        let text = records.iter().fold(String::new(), |text, record| append_record(&text, record).unwrap());
        std::fs::write(self.tokens(), text).unwrap();
    }

    fn config(&self) -> AccessConfig {
        let mut config = <crate::Config as clap::Parser>::parse_from(["gauntlet-manager"]).access;
        config.tokens = Some(self.tokens());
        config.client_subjects = Some(self.dir.path().join("subjects"));
        config
    }

    fn credentials(&self) -> Credentials {
        Credentials::load(&self.config()).unwrap()
    }
}

/// The token with the scope.
fn token_of(scope: Scope) -> Option<String> {
    Some(text(&token(match scope {
        Scope::Read => 1,
        Scope::Operate => 2,
        Scope::Admin => 3,
    })))
}

fn bearer(token: &str) -> Vec<String> {
    vec![format!("Bearer {token}")]
}

fn request(method: &str, target: &str, authorization: &[String]) -> http::request::Builder {
    let request = Request::builder().method(method).uri(target);
    authorization.iter().fold(request, |request, value| request.header("authorization", value))
}

/// Makes a gRPC call with an empty message. Returns how it ended.
async fn grpc(router: &Router, rpc: &str, authorization: &[String]) -> Status {
    let request = request("POST", &format!("/{rpc}"), authorization)
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc");
    ended(router.clone().oneshot(request.body(Body::from(vec![0; 5])).unwrap()).await.unwrap()).await
}

async fn ended(response: Response<Body>) -> Status {
    assert_eq!(response.status(), StatusCode::OK);
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let trailers = response.into_body().collect().await.unwrap().trailers().cloned().unwrap();
    Status::from_header_map(&trailers).unwrap()
}

/// Makes a REST call. Returns status, header `www-authenticate` and body.
async fn rest(
    router: &Router,
    method: &str,
    target: &str,
    authorization: &[String],
    body: &str,
) -> (u16, Option<String>, String) {
    let request = request(method, target, authorization).body(Body::from(body.to_owned())).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let challenge = response.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned());
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, challenge, String::from_utf8(body.to_vec()).unwrap())
}

fn target(route: &str) -> String {
    route.replace("{id}", "none").replace("{challenge_id}", "none").replace("{source_id}", "7")
}

#[test]
fn every_rpc_has_a_row() {
    let sets = [v1::FILE_DESCRIPTOR_SET, extension::FILE_DESCRIPTOR_SET];
    let mut served = BTreeSet::new();
    for file in sets.into_iter().flat_map(|set| prost_types::FileDescriptorSet::decode(set).unwrap().file) {
        for service in &file.service {
            let methods = service.method.iter();
            served.extend(methods.map(|method| format!("{}.{}/{}", file.package(), service.name(), method.name())));
        }
    }
    let rows: BTreeSet<String> = RULES.iter().map(|rule| rule.rpc.to_owned()).collect();
    assert_eq!(served, rows);
    assert_eq!(rows.len(), RULES.len());
}

#[tokio::test]
async fn every_call_needs_its_scope_over_grpc_and_rest() {
    let files = Files::new();
    let (api, credentials) = (Api::new().await, || files.credentials());
    let protected = api.service(credentials(), None);
    let callers = [None, Some(Scope::Read), Some(Scope::Operate), Some(Scope::Admin)];
    for rule in &RULES {
        for granted in callers {
            let authorization: Vec<String> =
                granted.and_then(token_of).iter().flat_map(|token| bearer(token)).collect();
            let expected = match granted {
                None => Some((Code::Unauthenticated, "CREDENTIALS_REQUIRED")),
                Some(scope) if scope < rule.scope => Some((Code::PermissionDenied, "SCOPE_INSUFFICIENT")),
                Some(_) => None,
            };
            // The same scope, given to callers without credentials by the listener.
            let open = granted.map(|scope| api.service(credentials(), Some(scope)));
            let mut routers: Vec<(&Router, Vec<String>)> = vec![(&protected, authorization)];
            routers.extend(open.as_ref().map(|open| (open, Vec::new())));
            for (router, authorization) in routers {
                let status = grpc(router, rule.rpc, &authorization).await;
                let denied = matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied);
                let got = denied.then(|| (status.code(), reason(&status).unwrap()));
                assert_eq!(
                    got.as_ref().map(|(code, reason)| (*code, reason.as_str())),
                    expected,
                    "{} {granted:?}",
                    rule.rpc
                );
                let Some((method, route)) = &rule.rest else { continue };
                let (status, challenge, body) = rest(router, method, &target(route), &authorization, "{}").await;
                let wanted = expected.map(|(code, _)| if code == Code::Unauthenticated { 401 } else { 403 });
                assert_eq!(
                    matches!(status, 401 | 403).then_some(status),
                    wanted,
                    "{method} {route} {granted:?}: {body}"
                );
                assert_eq!(challenge.is_some(), status == 401);
                assert!(expected.is_none_or(|(_, reason)| body.contains(reason)), "{body}");
            }
        }
    }
}

#[tokio::test]
async fn credentials_that_nobody_holds_are_refused_also_where_none_are_needed() {
    let files = Files::new();
    let api = Api::new().await;
    let good = text(&token(3));
    let mut other_secret = [3; Token::RANDOM_BYTES];
    other_secret[Token::RANDOM_BYTES - 1] = 9;
    let late = text(&token(5));
    let cases: Vec<(Vec<String>, &str)> = vec![
        (bearer(&text(&Token::generate(&other_secret))), "CREDENTIALS_INVALID"),
        (bearer(&text(&token(9))), "CREDENTIALS_INVALID"),
        (bearer(&good[..good.len() - 1]), "CREDENTIALS_INVALID"),
        (bearer(&good[..20]), "CREDENTIALS_INVALID"),
        (bearer(&format!("{good}0")), "CREDENTIALS_INVALID"),
        (bearer(&good.to_uppercase()), "CREDENTIALS_INVALID"),
        (bearer("ghp_0123456789abcdef0123456789abcdef0123"), "CREDENTIALS_INVALID"),
        (bearer("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."), "CREDENTIALS_INVALID"),
        (bearer(""), "CREDENTIALS_INVALID"),
        (vec![good.clone()], "CREDENTIALS_INVALID"),
        (vec![format!("Basic {good}")], "CREDENTIALS_INVALID"),
        (vec!["Bearer é".to_owned()], "CREDENTIALS_INVALID"),
        ([bearer(&good), bearer(&good)].concat(), "CREDENTIALS_INVALID"),
        (bearer(&late), "CREDENTIALS_EXPIRED"),
    ];
    for anonymous in [None, Some(Scope::Admin)] {
        let router = api.service(files.credentials(), anonymous);
        for (authorization, expected) in &cases {
            let status = grpc(&router, "api.v1.challenge.ChallengeStore/QueryChallenge", authorization).await;
            assert_eq!(
                (status.code(), reason(&status).as_deref()),
                (Code::Unauthenticated, Some(*expected)),
                "{authorization:?}"
            );
            let (status, challenge, body) = rest(&router, "GET", "/api/v1/challenge", authorization, "").await;
            assert_eq!((status, challenge.as_deref()), (401, Some(r#"Bearer error="invalid_token""#)), "{body}");
            assert!(body.contains(expected) && !body.contains("gnt_") && !body.contains(&"05".repeat(4)), "{body}");
        }
        for scheme in ["Bearer", "bearer"] {
            let (status, ..) = rest(&router, "GET", "/api/v1/challenge", &[format!("{scheme} {good}")], "").await;
            assert_eq!(status, 200);
        }
    }
    let nothing = api.service(Credentials::default(), Some(Scope::Admin));
    assert_eq!(rest(&nothing, "GET", "/api/v1/challenge", &bearer(&good), "").await.0, 401);
}

#[tokio::test]
async fn grpc_web_is_decided_like_grpc() {
    let router = Api::new().await.service(Files::new().credentials(), None);
    let call = async |authorization: &[String]| {
        let request = request("POST", "/api.v1.challenge.ChallengeStore/QueryChallenge", authorization);
        let request =
            request.header("content-type", "application/grpc-web+proto").body(Body::from(vec![0; 5])).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.headers().get("grpc-status").cloned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        format!("{status:?} {}", String::from_utf8_lossy(&body))
    };
    assert!(call(&[]).await.contains("16"));
    assert!(call(&bearer(&token_of(Scope::Read).unwrap())).await.contains("grpc-status:0"));
}

#[tokio::test]
async fn caller_bound_to_challenges_sees_and_changes_only_these() {
    let api = Api::with_instance().await;
    api.call_ok("POST /api/v1/challenge", r#"{"id":"other","scenario":"reg/web:v1","timeout":"0.001s"}"#).await;
    api.call_ok("POST /api/v1/instance", r#"{"challengeId":"other","sourceId":"7"}"#).await;
    let router = api.service(Files::new().credentials(), None);
    let authorization = bearer(&text(&token(4)));
    for id in ["other", "unknown"] {
        let create = format!(r#"{{"id":"{id}","scenario":"reg/web:v1"}}"#);
        let instance = format!(r#"{{"challengeId":"{id}","sourceId":"8"}}"#);
        for (method, target, body) in [
            ("POST", "/api/v1/challenge".to_owned(), create.as_str()),
            ("GET", format!("/api/v1/challenge/{id}"), ""),
            ("PATCH", format!("/api/v1/challenge/{id}"), "{}"),
            ("DELETE", format!("/api/v1/challenge/{id}"), ""),
            ("POST", "/api/v1/instance".to_owned(), instance.as_str()),
            ("GET", format!("/api/v1/instance/{id}/7"), ""),
            ("PATCH", format!("/api/v1/instance/{id}/7"), "{}"),
            ("DELETE", format!("/api/v1/instance/{id}/7"), ""),
        ] {
            let (status, _, response) = rest(&router, method, &target, &authorization, body).await;
            assert_eq!(status, 403, "{method} {target}: {response}");
            assert!(response.contains("CHALLENGE_NOT_PERMITTED"), "{response}");
        }
    }
    for target in ["/api/v1/challenge", "/api/v1/instance", "/api/v1/instance?sourceId=7"] {
        let (status, _, body) = rest(&router, "GET", target, &authorization, "").await;
        assert_eq!((status, body.lines().count()), (200, 1), "{body}");
        assert!(body.contains("\"web\"") && !body.contains("other"), "{body}");
    }
    let bound = Caller { principal: files_principal(4), address: PEER, limits: Arc::new(limits(0, 0)) };
    let mut expired = {
        use gauntlet_api::extension::sweeper_server::Sweeper as _;
        api.handlers().list_expired(bound.request(Default::default())).await.unwrap().into_inner()
    };
    assert!(futures::StreamExt::next(&mut expired).await.is_none());
    assert_eq!(rest(&router, "PATCH", "/api/v1/instance/web/7", &authorization, "{}").await.0, 200);
    assert_eq!(rest(&router, "DELETE", "/api/v1/challenge/web", &authorization, "").await.0, 200);
}

fn files_principal(byte: u8) -> Arc<Principal> {
    Files::new().credentials().by_header(&format!("Bearer {}", text(&token(byte))).parse().unwrap()).unwrap()
}

/// A peer with a certificate, on a listener that gives those without credentials the scope `anonymous`.
fn certified(common_name: &str, anonymous: Option<Scope>) -> Peer {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    Peer {
        address: PEER,
        certificate: Some(ClientCertificate::new(certificate.der().to_vec())),
        policy: Policy { anonymous },
    }
}

#[tokio::test]
async fn certificate_gets_the_scope_of_its_rule() {
    let credentials = Files::new().credentials();
    let authorizer = authorizer(credentials);
    let caller = |peer: &Peer| authorizer.caller(&HeaderMap::new(), Some(peer));
    let found = caller(&certified("platform", None)).unwrap().principal;
    assert_eq!((found.name.as_str(), found.scope), ("mesh", Scope::Operate));
    // Removing a rule revokes, also where callers without credentials get more.
    assert!(matches!(caller(&certified("other", Some(Scope::Admin))), Err(Denial::Invalid(_))));
    assert_eq!(authorizer.caller(&HeaderMap::new(), None).unwrap_err(), Denial::Missing);

    let without_rules = self::authorizer(Credentials::default());
    let anonymous = without_rules.caller(&HeaderMap::new(), Some(&certified("other", Some(Scope::Operate))));
    assert_eq!(anonymous.unwrap().principal, Arc::new(Principal::anonymous(Scope::Operate)));
    assert_eq!(without_rules.caller(&HeaderMap::new(), Some(&certified("other", None))).unwrap_err(), Denial::Missing);
}

fn authorizer(credentials: Credentials) -> Authorizer {
    Authorizer::new(Arc::new(credentials), (Openness(None), Openness(Some(Scope::Read))), limits(0, 0))
}

#[tokio::test]
async fn health_is_open_and_reflection_needs_the_scope_read() {
    let router = Api::new().await.service(Files::new().credentials(), None);
    // Its sender is gone: the point is that it answers.
    assert_eq!(rest(&router, "GET", "/healthcheck", &[], "").await.0, 503);
    assert_ne!(grpc(&router, "grpc.health.v1.Health/Check", &[]).await.code(), Code::Unauthenticated);
    let reflection = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    assert_eq!(grpc(&router, reflection, &[]).await.code(), Code::Unauthenticated);
    let reader = bearer(&token_of(Scope::Read).unwrap());
    assert_ne!(grpc(&router, reflection, &reader).await.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn unknown_paths_tell_a_stranger_nothing() {
    let router = Api::new().await.service(Files::new().credentials(), None);
    let reader = bearer(&token_of(Scope::Read).unwrap());
    for (method, target, status) in
        [("GET", "/", 404), ("GET", "/api/v2/challenge", 404), ("PUT", "/api/v1/challenge", 501)]
    {
        assert_eq!(rest(&router, method, target, &[], "").await.0, 401, "{target}");
        assert_eq!(rest(&router, method, target, &reader, "").await.0, status, "{target}");
    }
    assert_eq!(grpc(&router, "api.v1.challenge.ChallengeStore/Drop", &[]).await.code(), Code::Unauthenticated);
    let admin = bearer(&token_of(Scope::Admin).unwrap());
    assert_eq!(grpc(&router, "api.v1.challenge.ChallengeStore/Drop", &admin).await.code(), Code::Unimplemented);
}

#[tokio::test]
async fn route_without_a_row_needs_the_highest_scope() {
    let layer = AuthorizeLayer::new(authorizer(Files::new().credentials()), rest_failure);
    let peer = Peer { address: PEER, certificate: None, policy: Policy { anonymous: Some(Scope::Operate) } };
    let router = Router::new().route("/forgotten", get(async || "open")).layer(layer).layer(Extension(peer));
    assert_eq!(rest(&router, "GET", "/forgotten", &[], "").await.0, 403);
    assert_eq!(rest(&router, "GET", "/forgotten", &bearer(&token_of(Scope::Admin).unwrap()), "").await.0, 200);
}

#[tokio::test]
async fn handlers_refuse_calls_that_did_not_pass_the_layer() {
    let router = rest_router(Api::new().await.handlers());
    for rule in &RULES {
        if let Some((method, route)) = &rule.rest {
            assert_eq!(rest(&router, method, &target(route), &[], "{}").await.0, 401, "{method} {route}");
        }
    }
}

/// An issuer with one key, and the configuration that accepts its JWTs.
struct Issuer {
    key: Ed25519KeyPair,
    _dir: tempfile::TempDir,
    credentials: Credentials,
}

impl Issuer {
    fn new() -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("jwks.json");
        let x = BASE64_URL_SAFE_NO_PAD.encode(key.public_key());
        let jwks = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","kid":"one","x":"{x}"}}]}}"#);
        std::fs::write(&file, jwks).unwrap();
        let flags = ["", "--oidc-issuer", "https://id.example", "--oidc-audience", "gauntlet", "--oidc-jwks"];
        let config = crate::Config::checked(flags.into_iter().chain(file.to_str())).unwrap();
        Self { credentials: Credentials::load(&config.access).unwrap(), key, _dir: dir }
    }

    fn jwt(&self, scope: &str, expires: Timestamp) -> String {
        let claims = format!(
            r#"{{"iss":"https://id.example","aud":"gauntlet","sub":"ctfd","scope":"{scope}","exp":{}}}"#,
            expires.as_second()
        );
        let part = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        let signed = format!("{}.{}", part(r#"{"alg":"EdDSA","kid":"one"}"#), part(&claims));
        let signature = BASE64_URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

#[tokio::test]
async fn jwt_of_the_issuer_gets_its_scope() {
    let mut issuer = Issuer::new();
    let router = Api::new().await.service(std::mem::take(&mut issuer.credentials), None);
    let now = Timestamp::now();
    let call = async |jwt: String| {
        let status = grpc(&router, "api.v1.instance.InstanceManager/CreateInstance", &bearer(&jwt)).await;
        let (over_rest, _, body) = rest(&router, "POST", "/api/v1/instance", &bearer(&jwt), "{}").await;
        assert!(!body.contains(jwt.rsplit('.').next().unwrap()), "{body}");
        (reason(&status), over_rest)
    };
    let denied = |reason: &str, status| (Some(reason.to_owned()), status);
    assert_eq!(call(issuer.jwt("openid gauntlet:operate", now + 60.seconds())).await.1, 400);
    assert_eq!(call(issuer.jwt("gauntlet:read", now + 60.seconds())).await, denied("SCOPE_INSUFFICIENT", 403));
    assert_eq!(call(issuer.jwt("openid", now + 60.seconds())).await, denied("CREDENTIALS_INVALID", 401));
    assert_eq!(call(issuer.jwt("gauntlet:admin", now - 61.seconds())).await, denied("CREDENTIALS_EXPIRED", 401));
    let other =
        issuer.jwt("gauntlet:admin", now + 60.seconds()).replace("eyJhbGciOiJFZERTQSIs", "eyJhbGciOiJub25lIiwg");
    assert_eq!(call(other).await, denied("CREDENTIALS_INVALID", 401));
    // A token of the token file means nothing here.
    assert_eq!(call(text(&token(3))).await, denied("CREDENTIALS_INVALID", 401));
}
