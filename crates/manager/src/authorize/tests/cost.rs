//! What authentication costs. Nothing is asserted: `docs/performance.md` has the figures.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use super::*;

const CALLS: u32 = 20_000;

/// The time of one request through the layer, beyond that of the service behind it.
fn cost(authorizer: &Authorizer, authorization: Option<String>) -> Duration {
    let peer = Peer { address: PEER, certificate: None, policy: Policy { anonymous: Some(Scope::Admin) } };
    let request = || {
        let mut request = Request::post("/api.v1.instance.InstanceManager/CreateInstance")
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc");
        if let Some(value) = &authorization {
            request = request.header("authorization", value);
        }
        request.extension(peer.clone()).body(()).unwrap()
    };
    let time = |work: &mut dyn FnMut()| {
        let started = Instant::now();
        (0..CALLS).for_each(|_| work());
        started.elapsed()
    };
    let bare = time(&mut || drop(black_box(request())));
    let decided = time(&mut || drop(black_box(authorizer.decide(&request()).unwrap())));
    decided.saturating_sub(bare) / CALLS
}

/// `cargo test --release -p gauntlet-manager --lib cost_of_authentication -- --nocapture`
#[test]
fn cost_of_authentication_is_printed() {
    let mut issuer = Issuer::new();
    let jwt = issuer.jwt("gauntlet:operate", Timestamp::now() + 3600.seconds());
    let issuers = authorizer(std::mem::take(&mut issuer.credentials));
    let tokens = authorizer(Files::new().credentials());
    println!("no credentials       {:?}", cost(&tokens, None));
    println!("token                {:?}", cost(&tokens, bearer(&text(&token(2))).pop()));
    println!("JWT, remembered      {:?}", cost(&issuers, bearer(&jwt).pop()));
    let started = Instant::now();
    for n in 0..1000 {
        let jwt = issuer.jwt("gauntlet:operate", Timestamp::now() + (3600 + n).seconds());
        black_box(issuers.credentials.by_header(&bearer(&jwt).concat().parse().unwrap()).unwrap());
    }
    println!("JWT, signed and seen for the first time {:?}", started.elapsed() / 1000);
}
