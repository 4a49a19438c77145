//! The stored form of records: JSON with a version, converted from and to the domain's types. IDs are in the keys and not repeated.

use std::time::Duration;

use gauntlet_domain::{
    Additional, Challenge, ChallengeId, Failure, Identity, Instance, InstanceKey, Operation, Phase, Pinned, PoolBounds,
    Rollout, Strategy, Target,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The record version that this build writes, and the only one it reads.
const VERSION: u32 = 1;

/// Why a record could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unreadable(pub(crate) String);

#[derive(Serialize)]
struct Versioned<'a, T> {
    v: u32,
    #[serde(flatten)]
    record: &'a T,
}

#[derive(Deserialize)]
struct VersionOf {
    v: u32,
}

fn write<T: Serialize>(record: &T) -> Vec<u8> {
    // Cannot fail: the records have text keys, texts and numbers only.
    serde_json::to_vec(&Versioned { v: VERSION, record }).unwrap_or_default()
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    let unreadable = |error: serde_json::Error| Unreadable(error.to_string());
    let VersionOf { v } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if v != VERSION {
        return Err(Unreadable(format!(
            "version {v} is not supported (this build reads {VERSION}): run a newer build"
        )));
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}

#[derive(Serialize, Deserialize)]
struct ChallengeRecord {
    scenario: PinnedRecord,
    timeout: Option<DurationText>,
    until: Option<Timestamp>,
    additional: Additional,
    min: i64,
    max: i64,
    revision: u64,
    content: u64,
    rollout: Option<RolloutRecord>,
    closing: bool,
    origin: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct PinnedRecord {
    reference: String,
    digest: String,
}

#[derive(Serialize, Deserialize)]
struct RolloutRecord {
    strategy: StrategyName,
    origin: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct InstanceRecord {
    identity: IdentityText,
    phase: PhaseRecord,
    since: Timestamp,
    last_renew: Timestamp,
    until: Option<Timestamp>,
    scenario: PinnedRecord,
    applied: u64,
    additional: Additional,
    connection_info: String,
    flags: Vec<String>,
    /// The id of the key of its flags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    flag_key: Option<String>,
    target: Option<TargetRecord>,
    origin: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
enum PhaseRecord {
    Provisioning,
    Ready,
    Updating,
    Deleting,
    Failed { during: OperationName, reason: String, since: Timestamp, attempts: u32, retry_at: Timestamp },
}

#[derive(Serialize, Deserialize)]
struct TargetRecord {
    identity: IdentityText,
    scenario: PinnedRecord,
    applied: u64,
    strategy: StrategyName,
}

/// The operation that the owner of an instance has begun.
#[derive(Serialize, Deserialize)]
#[serde(tag = "intent", rename_all = "lowercase")]
enum IntentRecord {
    Update { target: TargetRecord },
    Delete,
}

/// The holder of an ownership or lock, or a waiter for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// The replica's name.
    pub(crate) replica: String,
    /// The caller's trace, as a W3C traceparent.
    pub(crate) origin: Option<String>,
    /// When the key was put, by the replica's clock.
    pub(crate) since: Timestamp,
    /// Differs between any two acquisitions.
    pub(crate) unique: String,
}

impl Owner {
    pub(crate) fn write(&self) -> Vec<u8> {
        write(self)
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        read(bytes)
    }
}

pub(crate) fn write_challenge(challenge: &Challenge) -> Vec<u8> {
    let Challenge {
        id: _,
        scenario,
        timeout,
        until,
        additional,
        bounds,
        revision,
        content_revision,
        rollout,
        deleting,
        traceparent,
    } = challenge;
    write(&ChallengeRecord {
        scenario: scenario.into(),
        timeout: timeout.map(DurationText),
        until: *until,
        additional: additional.clone(),
        min: bounds.min(),
        max: bounds.max(),
        revision: *revision,
        content: *content_revision,
        rollout: rollout
            .as_ref()
            .map(|rollout| RolloutRecord { strategy: rollout.strategy.into(), origin: rollout.traceparent.clone() }),
        closing: *deleting,
        origin: traceparent.clone(),
    })
}

pub(crate) fn read_challenge(id: ChallengeId, bytes: &[u8]) -> Result<Challenge, Unreadable> {
    let record: ChallengeRecord = read(bytes)?;
    let bounds = PoolBounds::new(record.min, record.max)
        .ok_or_else(|| Unreadable(format!("pool bounds {} and {} are invalid", record.min, record.max)))?;
    Ok(Challenge {
        id,
        scenario: record.scenario.into(),
        timeout: record.timeout.map(|timeout| timeout.0),
        until: record.until,
        additional: record.additional,
        bounds,
        revision: record.revision,
        content_revision: record.content,
        rollout: record
            .rollout
            .map(|rollout| Rollout { strategy: rollout.strategy.into(), traceparent: rollout.origin }),
        deleting: record.closing,
        traceparent: record.origin,
    })
}

pub(crate) fn write_instance(instance: &Instance) -> Vec<u8> {
    let Instance {
        key: _,
        identity,
        phase,
        since,
        last_renew,
        until,
        scenario,
        applied_revision,
        additional,
        connection_info,
        flags,
        flag_key,
        target,
        traceparent,
    } = instance;
    write(&InstanceRecord {
        identity: IdentityText(identity.clone()),
        phase: phase.into(),
        since: *since,
        last_renew: *last_renew,
        until: *until,
        scenario: scenario.into(),
        applied: *applied_revision,
        additional: additional.clone(),
        connection_info: connection_info.clone(),
        flags: flags.clone(),
        flag_key: flag_key.clone(),
        target: target.as_ref().map(TargetRecord::from),
        origin: traceparent.clone(),
    })
}

pub(crate) fn read_instance(key: InstanceKey, bytes: &[u8]) -> Result<Instance, Unreadable> {
    let record: InstanceRecord = read(bytes)?;
    Ok(Instance {
        key,
        identity: record.identity.0,
        phase: record.phase.into(),
        since: record.since,
        last_renew: record.last_renew,
        until: record.until,
        scenario: record.scenario.into(),
        applied_revision: record.applied,
        additional: record.additional,
        connection_info: record.connection_info,
        flags: record.flags,
        flag_key: record.flag_key,
        target: record.target.map(Target::from),
        traceparent: record.origin,
    })
}

/// Encodes the intent to update an instance to a target, or with `None` to delete it.
pub(crate) fn write_intent(target: Option<&Target>) -> Vec<u8> {
    write(&match target {
        Some(target) => IntentRecord::Update { target: target.into() },
        None => IntentRecord::Delete,
    })
}

/// Applies an intent to the record that it belongs to.
pub(crate) fn apply_intent(instance: &mut Instance, bytes: &[u8]) -> Result<(), Unreadable> {
    match read(bytes)? {
        IntentRecord::Update { target } => {
            instance.phase = Phase::Updating;
            instance.target = Some(target.into());
        }
        IntentRecord::Delete => instance.phase = Phase::Deleting,
    }
    Ok(())
}

impl From<&Pinned> for PinnedRecord {
    fn from(pinned: &Pinned) -> Self {
        Self { reference: pinned.reference.clone(), digest: pinned.digest.clone() }
    }
}

impl From<PinnedRecord> for Pinned {
    fn from(record: PinnedRecord) -> Self {
        Self { reference: record.reference, digest: record.digest }
    }
}

impl From<&Target> for TargetRecord {
    fn from(target: &Target) -> Self {
        Self {
            identity: IdentityText(target.identity.clone()),
            scenario: (&target.scenario).into(),
            applied: target.revision,
            strategy: target.strategy.into(),
        }
    }
}

impl From<TargetRecord> for Target {
    fn from(record: TargetRecord) -> Self {
        Self {
            identity: record.identity.0,
            scenario: record.scenario.into(),
            revision: record.applied,
            strategy: record.strategy.into(),
        }
    }
}

impl From<&Phase> for PhaseRecord {
    fn from(phase: &Phase) -> Self {
        match phase {
            Phase::Provisioning => Self::Provisioning,
            Phase::Ready => Self::Ready,
            Phase::Updating => Self::Updating,
            Phase::Deleting => Self::Deleting,
            Phase::Failed(failure) => Self::Failed {
                during: failure.during.into(),
                reason: failure.reason.clone(),
                since: failure.since,
                attempts: failure.attempts,
                retry_at: failure.retry_at,
            },
        }
    }
}

impl From<PhaseRecord> for Phase {
    fn from(record: PhaseRecord) -> Self {
        match record {
            PhaseRecord::Provisioning => Self::Provisioning,
            PhaseRecord::Ready => Self::Ready,
            PhaseRecord::Updating => Self::Updating,
            PhaseRecord::Deleting => Self::Deleting,
            PhaseRecord::Failed { during, reason, since, attempts, retry_at } => {
                Self::Failed(Failure { during: during.into(), reason, since, attempts, retry_at })
            }
        }
    }
}

/// Defines the stored names of a domain enum. They are separate from the enum so that renaming its variants doesn't change stored records.
macro_rules! names {
    ($name:ident of $domain:ident { $($value:ident),+ }) => {
        #[derive(Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum $name { $($value),+ }

        impl From<$domain> for $name {
            fn from(value: $domain) -> Self {
                match value { $($domain::$value => Self::$value),+ }
            }
        }

        impl From<$name> for $domain {
            fn from(value: $name) -> Self {
                match value { $($name::$value => Self::$value),+ }
            }
        }
    };
}

names!(StrategyName of Strategy { UpdateInPlace, BlueGreen, Recreate });
names!(OperationName of Operation { Create, Renew, Update, Delete });

/// A duration as seconds with nine decimals and an `s`, which is exact for any duration.
struct DurationText(Duration);

impl Serialize for DurationText {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}.{:09}s", self.0.as_secs(), self.0.subsec_nanos()))
    }
}

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parse = || {
            let (seconds, nanos) = text.strip_suffix('s')?.split_once('.')?;
            let nanos = (nanos.len() == 9).then(|| nanos.parse().ok())??;
            Some(Self(Duration::new(seconds.parse().ok()?, nanos)))
        };
        parse().ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration such as \"60.000000000s\"")))
    }
}

/// An identity as its sixteen hexadecimal digits.
struct IdentityText(Identity);

impl Serialize for IdentityText {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl<'de> Deserialize<'de> for IdentityText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Identity::parse(&String::deserialize(deserializer)?).map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
