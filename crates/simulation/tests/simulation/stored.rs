//! Stored keys and records, parsed as `keys.rs` and `records.rs` of the coordination document them. Shares no code with the coordination, so that
//! checks do not repeat its mistakes.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::PREFIX;
use crate::etcd::Entry;

/// The key of an instance: challenge, `s` (source) or `p` (pool), and name.
pub type InstanceKey = (String, String, String);

/// An instance as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub identity: String,
    /// The identities of the target in the record and of the target in the recorded intent.
    pub target: Option<String>,
    pub intent: Option<String>,
    pub phase: String,
    /// Whether its phase or its recorded intent is to delete it.
    pub deleting: bool,
    pub since: String,
    pub last_renew: Timestamp,
    pub until: Option<String>,
    pub digest: String,
}

impl Record {
    pub fn identities(&self) -> impl Iterator<Item = &String> {
        let all: BTreeSet<&String> =
            [Some(&self.identity), self.target.as_ref(), self.intent.as_ref()].into_iter().flatten().collect();
        all.into_iter()
    }
}

/// A challenge as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    pub deleting: bool,
    pub min: i64,
    pub max: i64,
    pub revision: u64,
    pub rollout: bool,
}

/// Returns the instance that a stored key belongs to, and whether it is the key of the intent.
pub fn instance_key_of(key: &str) -> Option<(InstanceKey, bool)> {
    match key.strip_prefix(PREFIX)?.split(' ').collect::<Vec<_>>().as_slice() {
        ["instances", c, kind, name] => Some((((*c).to_owned(), (*kind).to_owned(), (*name).to_owned()), false)),
        ["instances", c, kind, name, "intent"] => {
            Some((((*c).to_owned(), (*kind).to_owned(), (*name).to_owned()), true))
        }
        _ => None,
    }
}

pub fn challenge_id_of(key: &str) -> Option<&str> {
    let c = key.strip_prefix(PREFIX)?.strip_prefix("challenges ")?;
    (!c.contains(' ')).then_some(c)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

pub fn json(entry: &Entry) -> Value {
    serde_json::from_slice(&entry.value).expect("records are JSON")
}

pub fn target(value: &Value) -> Option<String> {
    Some(value["target"].as_object()?.get("identity")?.as_str()?.to_owned())
}

pub fn read_record(entry: &Entry) -> Record {
    let value = json(entry);
    let deleting = value["phase"]["name"] == "deleting";
    Record {
        deleting,
        identity: text(&value["identity"]),
        target: target(&value),
        phase: text(&value["phase"]["name"]),
        since: text(&value["since"]),
        last_renew: text(&value["last_renew"]).parse().expect("a record has last_renew"),
        until: value["until"].as_str().map(str::to_owned),
        digest: text(&value["scenario"]["digest"]),
        intent: None,
    }
}

pub fn read_challenge(entry: &Entry) -> Challenge {
    let value = json(entry);
    Challenge {
        deleting: value["closing"] == Value::Bool(true),
        min: value["min"].as_i64().unwrap(),
        max: value["max"].as_i64().unwrap(),
        revision: value["revision"].as_u64().unwrap(),
        rollout: !value["rollout"].is_null(),
    }
}
