//! Values of the domain, as small as they can be. Change the fields that the test is about with `..`:
//!
//! ```
//! use gauntlet_testing::fixtures::{challenge, timestamp};
//! let expired = gauntlet_domain::Challenge { until: Some(timestamp(1)), ..challenge("web") };
//! # assert!(expired.is_expired(timestamp(2)));
//! ```

use std::time::Duration;

use gauntlet_domain::{
    Additional, Assignment, Challenge, ChallengeId, Identity, Instance, InstanceKey, NewChallenge, Phase, Pinned,
    PoolBounds, SourceId,
};
use jiff::Timestamp;

/// The reference of every challenge here.
pub const REFERENCE: &str = "registry.test/web:1";

/// The trace that created every instance here, in W3C traceparent form.
pub const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A challenge's id.
///
/// # Panics
/// When the text is not a valid id.
pub fn challenge_id(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

/// A source's id.
///
/// # Panics
/// When the text is not a valid id.
pub fn source_id(text: &str) -> SourceId {
    SourceId::new(text).unwrap()
}

/// A time in seconds since 1970.
pub fn timestamp(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A digest that depends on `content` alone: equal contents have equal digests, different ones different digests.
pub fn digest(content: &str) -> String {
    // FNV-1a: short, and the same in every build.
    let hash = content
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("sha256:{hash:064x}")
}

/// A reference, pinned to the digest that [`FakeScenarios`](crate::fakes::FakeScenarios) resolves it to.
pub fn pinned(reference: &str) -> Pinned {
    Pinned { reference: reference.to_owned(), digest: digest(reference) }
}

/// A stored challenge of [`REFERENCE`] at revision 1: instances live for 60 seconds, no pool, nothing under way.
pub fn challenge(id: &str) -> Challenge {
    Challenge {
        id: challenge_id(id),
        scenario: pinned(REFERENCE),
        timeout: Some(Duration::from_secs(60)),
        until: None,
        additional: Additional::new(),
        bounds: PoolBounds::default(),
        revision: 1,
        content_revision: 1,
        rollout: None,
        deleting: false,
        traceparent: None,
    }
}

/// A request to create a challenge of [`REFERENCE`] whose pool has at least `min` instances, each of which lives for an hour.
pub fn new_challenge(id: &str, min: i64) -> NewChallenge {
    NewChallenge {
        id: challenge_id(id),
        scenario: REFERENCE.to_owned(),
        timeout: Some(Duration::from_secs(3600)),
        until: None,
        additional: Additional::new(),
        min,
        max: 0,
    }
}

/// The key of a source's instance.
pub fn source_key(challenge: &str, source: &str) -> InstanceKey {
    InstanceKey { challenge: challenge_id(challenge), assignment: Assignment::Source(source_id(source)) }
}

/// The key of a pooled instance, by the bits of its identity.
pub fn pool_key(challenge: &str, bits: u64) -> InstanceKey {
    InstanceKey { challenge: challenge_id(challenge), assignment: Assignment::Pool(Identity::from_bits(bits)) }
}

/// A stored instance of revision 1, created at second 10 and due to end at second 70. A pooled one has the identity in its key, any other the
/// identity of the bits 7.
pub fn instance(key: InstanceKey, phase: Phase) -> Instance {
    let identity = match &key.assignment {
        Assignment::Pool(identity) => identity.clone(),
        Assignment::Source(_) => Identity::from_bits(7),
    };
    Instance {
        key,
        identity,
        phase,
        since: timestamp(10),
        last_renew: timestamp(10),
        until: Some(timestamp(70)),
        scenario: pinned(REFERENCE),
        applied_revision: 1,
        additional: Additional::new(),
        connection_info: String::new(),
        flags: Vec::new(),
        flag_key: None,
        target: None,
        traceparent: Some(TRACEPARENT.to_owned()),
    }
}
