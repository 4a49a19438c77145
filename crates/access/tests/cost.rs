//! What authentication costs. Nothing is asserted: `docs/performance.md` has the figures, and the command that prints them.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use gauntlet_access::{
    JwtPolicy, JwtVerifier, Keys, Name, RateLimit, Scope, Token, TokenFile, TokenRecord, append_record,
};
use jiff::Timestamp;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use secrecy::ExposeSecret as _;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

fn print(what: &str, calls: u32, work: impl FnMut(u32)) {
    let started = Instant::now();
    (0..calls).for_each(work);
    println!("{what:44} {:?}", started.elapsed() / calls);
}

/// A file with this many tokens, and the text of one of them.
fn tokens(count: u16) -> (TokenFile, String) {
    let token = |number: u16| {
        let mut random = [7; Token::RANDOM_BYTES];
        random.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
        Token::generate(&random)
    };
    let name = Name::new("holder").unwrap();
    let record = |number| TokenRecord::new(&token(number), name.clone(), Scope::Operate, NOW);
    let text: String = (0..count).map(|number| append_record("", &record(number)).unwrap()).collect();
    (TokenFile::parse(&text).unwrap(), token(0).reveal().expose_secret().to_owned())
}

#[test]
fn cost_of_authentication_is_printed() {
    for count in [1, 10_000] {
        let (file, text) = tokens(count);
        print(&format!("token, of {count}"), 20_000, |_| {
            black_box(file.authenticate(&text.parse().unwrap(), NOW).unwrap());
        });
    }

    let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    let x = encode(key.public_key().as_ref());
    let jwks = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","kid":"k","x":"{x}"}}]}}"#);
    let policy = JwtPolicy {
        issuer: "i".to_owned(),
        audience: "a".to_owned(),
        scope_claim: "scope".to_owned(),
        challenges_claim: "challenges".to_owned(),
    };
    let verifier = JwtVerifier::new(Arc::new(policy), Keys::parse(&jwks).unwrap());
    let jwt = |number: u32| {
        let claims = format!(r#"{{"iss":"i","aud":"a","sub":"s{number}","scope":"gauntlet:read","exp":1000}}"#);
        let signed = format!("{}.{}", encode(br#"{"alg":"EdDSA","kid":"k"}"#), encode(claims.as_bytes()));
        format!("{signed}.{}", encode(key.sign(signed.as_bytes()).as_ref()))
    };
    let known = jwt(0);
    print("JWT, remembered", 20_000, |_| {
        black_box(verifier.authenticate(&known, NOW).unwrap());
    });
    let mut unknown = (1..=500).map(jwt).collect::<Vec<_>>().into_iter();
    print("JWT (EdDSA), seen for the first time", 500, |_| {
        black_box(verifier.authenticate(&unknown.next().unwrap(), NOW).unwrap());
    });

    let limit = RateLimit::new(1_000_000);
    print("counting a call of 10,000 callers", 20_000, |number| {
        limit.take(number % 10_000, Duration::from_millis(number.into())).unwrap();
    });
}
