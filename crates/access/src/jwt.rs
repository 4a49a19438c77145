//! JWTs of an OpenID Connect issuer.

mod ring_provider;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{Jwk, JwkSet, KeyAlgorithm, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::{Challenges, Kind, Name, Principal, Scope, tokens::EMPTY_CHALLENGES};

/// The signatures that are accepted: by public keys only.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];
/// How far the clocks of issuer and manager may be apart.
const LEEWAY: SignedDuration = SignedDuration::from_secs(60);
/// How many JWTs are remembered as verified. Beyond that, all are forgotten and verified again.
const MAX_VERIFIED: usize = 4096;
/// In front of a scope's name in the scope claim: the issuer's scopes are not ours.
const SCOPE_PREFIX: &str = "gauntlet:";

/// What a JWT must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtPolicy {
    /// The value of `iss`.
    pub issuer: String,
    /// The value of `aud`, or one of them.
    pub audience: String,
    /// The claim with the scopes: `gauntlet:read`, `gauntlet:operate` or `gauntlet:admin`, in a list or a text with spaces, among others. The highest
    /// counts.
    pub scope_claim: String,
    /// The claim with a list of the challenges that the holder sees and changes. Without it, all of them.
    pub challenges_claim: String,
}

/// The public keys of an issuer. Keys of other kinds are left out.
#[derive(Clone)]
pub struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    id: Option<String>,
    /// The only algorithm that the issuer uses it with, if the key set names one.
    algorithm: Option<Algorithm>,
    key: DecodingKey,
}

/// A text is not a set of keys (JWKS, RFC 7517).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeys {
    /// It is not JSON, or not of that form.
    #[error("not a JSON Web Key Set: {0}")]
    Form(String),
    /// It has no key of a known kind.
    #[error("the set has no public RSA, EC or Ed25519 key for signatures")]
    Empty,
}

/// Why a JWT was refused. The text is for operators and has no part of the token but its key id and its subject.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtRejection {
    /// No key has this id: it is another issuer's, or newer than the keys.
    #[error("the JWT is signed with an unknown key {0:?}")]
    UnknownKey(String),
    /// It is not valid, whatever the time.
    #[error("{0}")]
    Invalid(String),
    /// It was valid until it expired.
    #[error("the JWT of {0:?} has expired")]
    Expired(String),
}

impl Keys {
    /// Parses a JWKS.
    ///
    /// # Errors
    /// See [`InvalidKeys`].
    pub fn parse(text: &str) -> Result<Self, InvalidKeys> {
        let set: JwkSet = serde_json::from_str(text).map_err(|error| InvalidKeys::Form(error.to_string()))?;
        let keys: Vec<Key> = set.keys.iter().filter_map(public_key).collect();
        if keys.is_empty() { Err(InvalidKeys::Empty) } else { Ok(Self(keys)) }
    }

    /// The key with the id. Without an id, the only key: guessing among several would make ids pointless.
    fn find(&self, id: Option<&str>) -> Option<&Key> {
        match (id, self.0.as_slice()) {
            (Some(id), keys) => keys.iter().find(|key| key.id.as_deref() == Some(id)),
            (None, [only]) => Some(only),
            (None, _) => None,
        }
    }
}

fn public_key(jwk: &Jwk) -> Option<Key> {
    if matches!(&jwk.common.public_key_use, Some(usage) if *usage != PublicKeyUse::Signature) {
        return None;
    }
    let algorithm = match jwk.common.key_algorithm {
        Some(named) => Some(ALGORITHMS.into_iter().find(|algorithm| KeyAlgorithm::from(*algorithm) == named)?),
        None => None,
    };
    let key = DecodingKey::from_jwk(jwk).ok().filter(|key| key.family() != AlgorithmFamily::Hmac)?;
    Some(Key { id: jwk.common.key_id.clone(), algorithm, key })
}

/// Checks JWTs with one set of keys.
pub struct JwtVerifier {
    policy: Arc<JwtPolicy>,
    keys: Keys,
    validation: Validation,
    /// By the SHA-256 of the JWT: a signature costs more than the rest of a call's authentication.
    verified: Mutex<HashMap<[u8; 32], Verified>>,
}

#[derive(Clone)]
struct Verified {
    not_before: Option<Timestamp>,
    expires: Timestamp,
    principal: Arc<Principal>,
}

/// The claims with a fixed name. Issuer and audience are checked by `jsonwebtoken`.
#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    nbf: Option<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl JwtVerifier {
    /// Makes a verifier. Nothing is remembered as verified.
    pub fn new(policy: Arc<JwtPolicy>, keys: Keys) -> Self {
        ring_provider::install();
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[&policy.issuer]);
        validation.set_audience(&[&policy.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // Times are checked here, against the caller's clock.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        Self { policy, keys, validation, verified: Mutex::default() }
    }

    /// Returns the holder of a JWT, named by its subject.
    ///
    /// # Errors
    /// The JWT is not valid at `now`: signature, issuer, audience, times, scope or challenges.
    pub fn authenticate(&self, jwt: &str, now: Timestamp) -> Result<Arc<Principal>, JwtRejection> {
        let digest: [u8; 32] = Sha256::digest(jwt).into();
        let known = self.verified.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        let verified = match known {
            Some(verified) => verified,
            None => {
                let verified = self.verify(jwt)?;
                let mut all = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
                if all.len() >= MAX_VERIFIED {
                    all.clear();
                }
                all.insert(digest, verified.clone());
                verified
            }
        };
        let name = || verified.principal.name.as_str().to_owned();
        if now.duration_since(verified.expires) >= LEEWAY {
            return Err(JwtRejection::Expired(name()));
        }
        if verified.not_before.is_some_and(|at| at.duration_since(now) > LEEWAY) {
            return Err(JwtRejection::Invalid(format!("the JWT of {:?} is not valid yet", name())));
        }
        Ok(verified.principal)
    }

    /// Checks everything but the time.
    fn verify(&self, jwt: &str) -> Result<Verified, JwtRejection> {
        let invalid = |why: &str| JwtRejection::Invalid(why.to_owned());
        let header = decode_header(jwt).map_err(|_| invalid("neither a token of this manager nor a JWT"))?;
        let unknown = || JwtRejection::UnknownKey(shortened(header.kid.as_deref().unwrap_or_default()));
        let key = self.keys.find(header.kid.as_deref()).ok_or_else(unknown)?;
        if key.algorithm.is_some_and(|algorithm| algorithm != header.alg) {
            return Err(invalid("the JWT has another algorithm than its key"));
        }
        if !ALGORITHMS.contains(&header.alg) {
            return Err(invalid("the algorithm of the JWT is not accepted"));
        }
        // jsonwebtoken wants all of them to be of the key's family.
        let validation = Validation { algorithms: vec![header.alg], ..self.validation.clone() };
        let claims = decode::<Claims>(jwt, &key.key, &validation).map_err(|error| {
            JwtRejection::Invalid(match error.kind() {
                ErrorKind::InvalidSignature => "the signature of the JWT is wrong".to_owned(),
                ErrorKind::InvalidIssuer => "the JWT is from another issuer".to_owned(),
                ErrorKind::InvalidAudience => "the JWT is for another audience".to_owned(),
                ErrorKind::InvalidAlgorithm => "the JWT has another algorithm than its key".to_owned(),
                ErrorKind::MissingRequiredClaim(claim) => format!("the JWT has no claim {claim:?}, or a wrong one"),
                // Other errors may quote the token.
                _ => "the JWT is malformed".to_owned(),
            })
        })?;
        let Claims { sub, exp, nbf, others } = claims.claims;
        let time = |seconds| time(seconds).ok_or_else(|| invalid("a time of the JWT is out of range"));
        let scope = self.scope(&others).ok_or_else(|| {
            JwtRejection::Invalid(format!(
                "the JWT has no {SCOPE_PREFIX} scope in its claim {:?}",
                self.policy.scope_claim
            ))
        })?;
        let name = Name::new(sub).map_err(|_| invalid("the subject of the JWT is not a name"))?;
        let challenges = self.challenges(&others)?;
        Ok(Verified {
            not_before: nbf.map(time).transpose()?,
            expires: time(exp)?,
            principal: Arc::new(Principal { name, kind: Kind::Jwt, scope, challenges }),
        })
    }

    fn scope(&self, claims: &Map<String, Value>) -> Option<Scope> {
        let scope = |text: &str| text.strip_prefix(SCOPE_PREFIX)?.parse().ok();
        match claims.get(&self.policy.scope_claim)? {
            Value::String(text) => text.split(' ').filter_map(scope).max(),
            Value::Array(items) => items.iter().filter_map(Value::as_str).filter_map(scope).max(),
            _ => None,
        }
    }

    fn challenges(&self, claims: &Map<String, Value>) -> Result<Challenges, JwtRejection> {
        let claim = &self.policy.challenges_claim;
        let Some(value) = claims.get(claim) else { return Ok(Challenges::All) };
        let ids: BTreeSet<String> = serde_json::from_value(value.clone())
            .map_err(|_| JwtRejection::Invalid(format!("the claim {claim:?} of the JWT is not a list of texts")))?;
        if ids.is_empty() { Err(JwtRejection::Invalid(EMPTY_CHALLENGES.to_owned())) } else { Ok(Challenges::Only(ids)) }
    }
}

/// Seconds since 1970, cut to whole ones.
#[allow(clippy::cast_possible_truncation, reason = "checked against the range of times")]
fn time(seconds: f64) -> Option<Timestamp> {
    Timestamp::from_second(seconds.is_finite().then_some(seconds as i64)?).ok()
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
