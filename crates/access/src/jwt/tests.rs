#![allow(clippy::unwrap_used, reason = "tests")]
//! `tokens.json` has one JWT for each case, valid from second 1000 to 2000 and signed with the private keys of `jwks.json`, which were thrown away.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const JWKS: &str = include_str!("jwks.json");

fn tokens() -> BTreeMap<String, String> {
    serde_json::from_str(include_str!("tokens.json")).unwrap()
}

fn verifier() -> JwtVerifier {
    let policy = JwtPolicy {
        issuer: "https://id.example".to_owned(),
        audience: "gauntlet".to_owned(),
        scope_claim: "scope".to_owned(),
        challenges_claim: "gauntlet_challenges".to_owned(),
    };
    JwtVerifier::new(Arc::new(policy), Keys::parse(JWKS).unwrap())
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

#[test]
fn holder_of_a_valid_jwt_is_its_subject() {
    let (verifier, tokens) = (verifier(), tokens());
    for case in ["rs256", "es256", "eddsa"] {
        // The second time it is remembered.
        for _ in 0..2 {
            let principal = verifier.authenticate(tokens.get(case).unwrap(), at(1500)).unwrap();
            assert_eq!((principal.name.as_str(), principal.kind), ("ctfd", Kind::Jwt), "{case}");
            assert_eq!(principal.scope, Scope::Operate);
            assert!(principal.challenges.contain("web") && !principal.challenges.contain("other"));
        }
    }
    let listed = verifier.authenticate(tokens.get("scope_list").unwrap(), at(1500)).unwrap();
    assert_eq!((listed.scope, &listed.challenges), (Scope::Admin, &Challenges::All));
}

#[test]
fn every_other_jwt_is_refused_with_its_reason() {
    let (verifier, tokens) = (verifier(), tokens());
    let expected = [
        ("without_kid", "unknown key \"\""),
        ("unknown_kid", "unknown key \"next\""),
        ("other_alg_than_the_keys", "another algorithm than its key"),
        ("none", "neither a token of this manager nor a JWT"),
        ("hmac_with_the_public_key", "another algorithm than its key"),
        ("hmac_of_the_set", "unknown key \"hmac\""),
        ("foreign_issuer", "from another issuer"),
        ("without_issuer", "no claim \"iss\""),
        ("foreign_audience", "for another audience"),
        ("without_audience", "no claim \"aud\""),
        ("without_end", "malformed"),
        ("end_is_text", "malformed"),
        ("without_subject", "malformed"),
        ("without_scope", "no gauntlet: scope in its claim \"scope\""),
        ("challenges_are_text", "\"gauntlet_challenges\" of the JWT is not a list"),
        ("no_challenges", "the list is empty"),
    ];
    for (case, part) in expected {
        let error = verifier.authenticate(tokens.get(case).unwrap(), at(1500)).unwrap_err().to_string();
        assert!(error.contains(part), "{case}: {error}");
    }
    let accepted = ["rs256", "es256", "eddsa", "scope_list"];
    assert_eq!(tokens.len(), expected.len() + accepted.len());
}

#[test]
fn times_are_checked_with_a_leeway_also_when_the_signature_is_remembered() {
    let (verifier, tokens) = (verifier(), tokens());
    let check = |second| verifier.authenticate(tokens.get("es256").unwrap(), at(second)).map(drop);
    assert!(check(1500).is_ok());
    assert!(check(940).is_ok() && check(2059).is_ok());
    assert_eq!(check(939), Err(JwtRejection::Invalid("the JWT of \"ctfd\" is not valid yet".to_owned())));
    assert_eq!(check(2060), Err(JwtRejection::Expired("ctfd".to_owned())));
}

#[test]
fn keys_of_other_kinds_are_left_out() {
    assert_eq!(Keys::parse(JWKS).unwrap().0.len(), 3);
    let secret = r#"{"keys":[{"kty":"oct","kid":"a","k":"c2VjcmV0"},{"kty":"RSA","use":"enc","n":"AQAB","e":"AQAB"},{"kty":"new"}]}"#;
    assert_eq!(Keys::parse(secret).map(drop), Err(InvalidKeys::Empty));
    for wrong in ["", "{}", "[]", r#"{"keys":7}"#, "<html>"] {
        assert!(matches!(Keys::parse(wrong), Err(InvalidKeys::Form(_))), "{wrong}");
    }
}

#[test]
fn remembered_jwts_are_bounded() {
    let (verifier, tokens) = (verifier(), tokens());
    let verified = verifier.verify(tokens.get("es256").unwrap()).unwrap();
    let filler = (0..MAX_VERIFIED as u64).map(|n| (Sha256::digest(n.to_le_bytes()).into(), verified.clone()));
    verifier.verified.lock().unwrap().extend(filler);
    assert!(verifier.authenticate(tokens.get("es256").unwrap(), at(1500)).is_ok());
    assert_eq!(verifier.verified.lock().unwrap().len(), 1);
}

proptest! {
    #[test]
    fn truncated_or_changed_jwt_is_refused(index in 0..200_usize, length in 0..300_usize, character in "[A-Za-z0-9_-]") {
        let (verifier, good) = (verifier(), tokens().get("es256").unwrap().clone());
        prop_assert!(verifier.authenticate(good.get(..length).unwrap(), at(1500)).is_err());
        let mut changed = good.clone();
        changed.replace_range(index..=index, &character);
        prop_assert!(changed == good || verifier.authenticate(&changed, at(1500)).is_err());
    }

    #[test]
    fn no_text_panics(text in ".*", header in "[A-Za-z0-9_-]{0,40}") {
        let _ = verifier().authenticate(&text, at(1500));
        let _ = verifier().authenticate(&format!("{header}.e30.AA"), at(1500));
        let _ = Keys::parse(&text);
    }
}
