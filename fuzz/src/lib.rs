//! Fuzz targets: functions that take any bytes and panic if a property does not hold. `cargo xtask fuzz TARGET` feeds them with libFuzzer, and the
//! tests with the inputs kept in `corpora/`.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed property must end the fuzzer")]

use std::{
    path::PathBuf,
    str,
    sync::{Arc, LazyLock},
};

use gauntlet_access::{JwtPolicy, JwtVerifier, Keys, SubjectFile, Token, TokenFile};
use gauntlet_api::{
    json,
    v1::{
        challenge::{CreateChallengeRequest, UpdateChallengeRequest},
        instance::{CreateInstanceRequest, RenewInstanceRequest},
    },
};
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use serde_json::json;

/// A function that any bytes may be given to.
pub type Target = fn(&[u8]);

/// Every target by name. Its corpus is the directory of this name.
pub const TARGETS: [(&str, Target); 10] = [
    ("archive", archive),
    ("body", body),
    ("jwt", jwt),
    ("manifest", gauntlet_scenario::fuzzing::manifest),
    ("mask", mask),
    ("reference", reference),
    ("request", gauntlet_manager::fuzzing::request),
    ("scenario", scenario),
    ("template", template),
    ("token", token),
];

/// The directory of a target's corpus.
pub fn corpus(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "corpora", target].iter().collect()
}

/// Directories packed by a registry.
fn archive(bytes: &[u8]) {
    static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary directory"));
    gauntlet_scenario::fuzzing::archive(bytes, DIR.path());
}

/// JSON bodies of requests.
fn body(bytes: &[u8]) {
    decode::<CreateChallengeRequest>(bytes);
    decode::<UpdateChallengeRequest>(bytes);
    decode::<CreateInstanceRequest>(bytes);
    decode::<RenewInstanceRequest>(bytes);
}

/// A message that is decoded is the same once it is written and decoded again.
fn decode<M: prost::Message + prost::Name + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(message) = json::from_slice::<M>(bytes) else { return };
    // Some times and durations have no JSON form.
    let Ok(text) = json::to_string(&message) else { return };
    let again = json::from_slice::<M>(text.as_bytes()).expect("own JSON is decoded");
    assert_eq!(again, message, "{text}");
}

/// The mask of an update, which lists field names.
fn mask(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    decode::<UpdateChallengeRequest>(json!({ "id": "x", "updateMask": text }).to_string().as_bytes());
}

/// References of scenarios, and patterns of allowed registries.
fn reference(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    gauntlet_scenario::fuzzing::reference(text);
    let _ = text.parse::<gauntlet_scenario::RegistryPattern>();
}

fn scenario(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    gauntlet_scenario::fuzzing::scenario_file(text);
}

fn template(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    gauntlet_scenario::fuzzing::template(text);
}

/// JWTs, of which none has the issuer's signature, and key sets of an issuer.
fn jwt(bytes: &[u8]) {
    const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","alg":"EdDSA","use":"sig","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
    static VERIFIER: LazyLock<JwtVerifier> = LazyLock::new(|| {
        let policy = JwtPolicy {
            issuer: "https://issuer.example".to_owned(),
            audience: "gauntlet".to_owned(),
            scope_claim: "scope".to_owned(),
            challenges_claim: "challenges".to_owned(),
        };
        JwtVerifier::new(Arc::new(policy), Keys::parse(KEYS).expect("valid keys"))
    });
    let Ok(text) = str::from_utf8(bytes) else { return };
    assert!(
        VERIFIER.authenticate(text, Timestamp::UNIX_EPOCH).is_err(),
        "a JWT without the issuer's signature is accepted"
    );
    let _ = Keys::parse(text);
}

/// Tokens, and the files that list tokens and certificates.
fn token(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.reveal().expose_secret(), text, "a token has one form");
    }
    let _ = TokenFile::parse(text);
    let _ = SubjectFile::parse(text);
}
