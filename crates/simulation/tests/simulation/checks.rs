//! The invariants, checked after every step against stored data and running instances.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use gauntlet_coordination::kv::{Condition, KeyRange, Op, Txn, TxnResponse};
use gauntlet_domain::{ChallengeId, Identity};

use super::{
    PREFIX,
    machine::Directories,
    stored::{
        Challenge, InstanceKey, Record, challenge_id_of, instance_key_of, json, read_challenge, read_record, target,
    },
};
use crate::etcd::{Change, Entry, Server};

/// What clients know about an instance or a challenge.
#[derive(Debug, Default)]
struct ClientView {
    /// Its creation was acknowledged, and no deletion has been requested since.
    acknowledged: bool,
    /// Deletions in progress.
    pending_deletions: u32,
    /// The time until which a failed deletion may still take effect.
    uncertain_until: Duration,
    /// The instance that such a deletion may affect: the one that existed when its manager gave up.
    possible_victim: Option<String>,
    /// The number of requested deletions.
    deletions: u64,
}

/// The numbers of deletions of the instance and its challenge requested before a create began. `None` if one may still take effect.
pub type Begun = Option<(u64, u64)>;

/// The model: stored records, and what clients know.
#[derive(Default)]
pub struct Checks {
    pub records: BTreeMap<InstanceKey, Record>,
    pub challenges: BTreeMap<String, Challenge>,
    /// Every identity ever recorded, its challenge, and whether it was the first of its instance (not a replacement).
    known: BTreeMap<String, (String, bool)>,
    instances: BTreeMap<(String, String), ClientView>,
    challenge_views: BTreeMap<String, ClientView>,
    /// The number of checked steps.
    pub steps: u64,
}

/// Returns whether a transaction compares a token that is no longer valid.
pub fn stale(etcd: &Server, txn: &Txn) -> bool {
    txn.compare.iter().any(|compare| matches!(compare.condition, Condition::CreateRevision(_)) && !etcd.holds(compare))
}

impl Checks {
    /// Checks the invariants after a transaction.
    pub fn check_transaction(
        &mut self,
        now: Duration,
        directories: &Directories,
        txn: &Txn,
        result: &TxnResponse,
        changes: &[Change],
    ) -> Result<(), String> {
        if changes.is_empty() {
            return Ok(());
        }
        self.steps += 1;
        if !changes
            .iter()
            .any(|change| instance_key_of(&change.key).is_some() || challenge_id_of(&change.key).is_some())
        {
            return Ok(());
        }
        let before = (self.records.clone(), self.challenges.clone());
        for change in changes {
            if let Some((key, intent)) = instance_key_of(&change.key) {
                // Invariant 6: a transaction that changes an instance compares its owner key.
                let owner = format!("{PREFIX}live owners {} {} {}", key.0, key.1, key.2);
                let tested = txn.compare.iter().any(|compare| {
                    compare.range == KeyRange::key(&owner)
                        && matches!(compare.condition, Condition::Absent | Condition::CreateRevision(_))
                });
                ensure(result.succeeded && tested, || format!("6: {key:?} changes without comparing its owner key"))?;
                self.apply_change(&key, intent, change.after.as_ref());
            } else if let Some(id) = challenge_id_of(&change.key) {
                let inserted = change.before.is_none();
                let tested = txn.compare.iter().any(|compare| match compare.condition {
                    Condition::Absent => inserted && compare.range.start == *change.key,
                    Condition::CreateRevision(_) => {
                        compare.range.start.starts_with(&format!("{PREFIX}live locks challenge {id} w "))
                    }
                    _ => false,
                });
                ensure(result.succeeded && tested, || format!("6: challenge {id} changes without its lock"))?;
                match &change.after {
                    Some(entry) => self.challenges.insert(id.to_owned(), read_challenge(entry)),
                    None => self.challenges.remove(id),
                };
            }
        }
        for id in changes.iter().filter_map(|change| challenge_id_of(&change.key)) {
            self.check_challenge(directories, id, before.1.get(id))?;
        }
        let keys: BTreeSet<InstanceKey> =
            changes.iter().filter_map(|change| instance_key_of(&change.key)).map(|(key, _)| key).collect();
        for key in &keys {
            self.check_instance(now, directories, key, &before.0, txn)?;
        }
        self.check_identities_are_unique()
    }

    fn apply_change(&mut self, key: &InstanceKey, intent: bool, after: Option<&Entry>) {
        match (intent, after) {
            (false, None) => {
                self.records.remove(key);
            }
            (false, Some(entry)) => {
                let mut record = read_record(entry);
                if let Some(before) = self.records.get(key) {
                    record.intent.clone_from(&before.intent);
                }
                self.records.insert(key.clone(), record);
            }
            (true, after) => {
                if let Some(record) = self.records.get_mut(key) {
                    record.intent = after.and_then(|entry| target(&json(entry)));
                    let intends = after.is_some_and(|entry| json(entry)["intent"] == "delete");
                    record.deleting = intends || record.phase == "deleting";
                }
            }
        }
    }

    /// Checks invariants 2 and 5 on a challenge.
    fn check_challenge(&self, directories: &Directories, id: &str, before: Option<&Challenge>) -> Result<(), String> {
        match (before, self.challenges.get(id)) {
            (None, _) => {}
            (Some(before), Some(after)) => {
                ensure(!before.deleting || after.deleting, || format!("2: the deletion of challenge {id} is undone"))?;
                ensure(before.revision <= after.revision, || {
                    format!("5: challenge {id} returns to an older revision")
                })?;
            }
            (Some(before), None) => {
                ensure(before.deleting, || format!("2: challenge {id} is removed though it was not being deleted"))?;
                let left = self.records.keys().find(|key| key.0 == id);
                ensure(left.is_none(), || format!("2: challenge {id} is removed and its instance {left:?} is left"))?;
                let left = directories.existing().find(|(challenge, ..)| challenge.as_str() == id);
                ensure(left.is_none(), || {
                    format!("2: challenge {id} is removed and these resources are left: {left:?}")
                })?;
                let lost = self.challenge_views.get(id).is_some_and(|view| view.acknowledged);
                ensure(!lost, || format!("5: challenge {id} was acknowledged and disappeared without a deletion"))?;
            }
        }
        Ok(())
    }

    /// Checks invariants 1 to 5 on an instance.
    fn check_instance(
        &mut self,
        now: Duration,
        directories: &Directories,
        key: &InstanceKey,
        before: &BTreeMap<InstanceKey, Record>,
        txn: &Txn,
    ) -> Result<(), String> {
        let open = self.challenges.get(&key.0).filter(|challenge| !challenge.deleting);
        match (before.get(key), self.records.get(key)) {
            (None, Some(after)) => {
                let Some(challenge) = open else {
                    return Err(format!("2: {key:?} is created for a challenge that is being deleted or removed"));
                };
                let from = before.iter().find(|(_, record)| record.identity == after.identity);
                match from {
                    // Invariant 3: a pooled instance is claimed once.
                    Some((from, record)) => {
                        let once = from.0 == key.0 && from.1 == "p" && key.1 == "s" && !self.records.contains_key(from);
                        ensure(once && record.phase == "ready", || {
                            format!("3: {key:?} takes the instance of {from:?}")
                        })?;
                    }
                    None => {
                        let known = self.known.contains_key(&after.identity);
                        ensure(!known, || format!("1: {key:?} is created with an identity that was used before"))?;
                    }
                }
                if key.1 == "p" {
                    let of = |kind: &str| {
                        let counts = |(of, record): &(&InstanceKey, &Record)| {
                            of.0 == key.0 && of.1 == kind && !(kind == "p" && record.deleting)
                        };
                        self.records.iter().filter(counts).count() as i64
                    };
                    let (claimed, pooled) = (of("s"), of("p"));
                    let within = pooled <= challenge.min && (challenge.max == 0 || claimed + pooled <= challenge.max);
                    ensure(within, || {
                        let of: Vec<_> = self.records.iter().filter(|(of, _)| of.0 == key.0).collect();
                        format!(
                            "3: the pool of {} grows to {pooled} with {claimed} claimed: {challenge:?}, {of:?}",
                            key.0
                        )
                    })?;
                }
            }
            (Some(before), None) => {
                let claimed = self.records.values().any(|record| record.identity == before.identity);
                if !claimed {
                    // Invariant 4: a record is removed after its resources.
                    for identity in before.identities() {
                        let left = directories.existing().any(|(_, there, _)| there.as_str() == identity);
                        ensure(!left, || format!("4: the record of {key:?} is removed and {identity} is left"))?;
                    }
                    let view = self.instances.get(&(key.0.clone(), key.2.clone())).filter(|_| key.1 == "s");
                    ensure(!view.is_some_and(|view| view.acknowledged), || {
                        format!("5: {key:?} was acknowledged and disappeared without a deletion")
                    })?;
                }
            }
            (Some(before), Some(after)) if before.since == after.since => {
                let may_come = |view: &ClientView| {
                    view.uncertain_until > now && view.possible_victim.as_ref() == Some(&before.since)
                };
                let may_be_deleted =
                    |view: Option<&ClientView>| view.is_some_and(|view| view.pending_deletions > 0 || may_come(view));
                let wanted = before.deleting
                    || key.1 == "p"
                    || open.is_none()
                    || may_be_deleted(self.instances.get(&(key.0.clone(), key.2.clone())))
                    // A deletion of the challenge that failed may still take effect.
                    || self.challenge_views.get(&key.0).is_some_and(|view| view.uncertain_until > now);
                ensure(wanted || !after.deleting, || format!("5: {key:?} is deleted without a request"))?;
                ensure(before.last_renew <= after.last_renew, || format!("5: {key:?} loses a renewal"))?;
                ensure(key.1 == "p" || !(before.phase == "ready" && after.phase == "provisioning"), || {
                    format!("5: {key:?} was ready and is created again")
                })?;
            }
            _ => {}
        }
        if let Some(after) = self.records.get(key) {
            let first = !before.contains_key(key);
            for identity in after.identities() {
                let first = first && *identity == after.identity;
                self.known.entry(identity.clone()).or_insert_with(|| (key.0.clone(), first));
            }
        }
        let deletes = txn.success.iter().filter(|op| matches!(op, Op::Delete(_))).count();
        ensure(deletes <= 16, || format!("a transaction on {key:?} deletes {deletes} keys"))
    }

    /// Checks invariants 1 and 3: no identity belongs to two instances.
    fn check_identities_are_unique(&self) -> Result<(), String> {
        let mut of: BTreeMap<&String, &InstanceKey> = BTreeMap::new();
        for (key, record) in &self.records {
            for identity in record.identities() {
                if let Some(other) = of.insert(identity, key) {
                    return Err(format!("3: {identity} belongs to {other:?} and to {key:?}"));
                }
            }
        }
        Ok(())
    }

    /// Checks invariants 1 and 4 after an instance was started on the machine.
    pub fn check_start(
        &mut self,
        directories: &Directories,
        challenge: &ChallengeId,
        identity: &Identity,
    ) -> Result<(), String> {
        self.steps += 1;
        let (challenge, identity) = (challenge.as_str(), identity.as_str().to_owned());
        ensure(self.known.contains_key(&identity), || format!("4: {identity} runs and was never recorded"))?;
        ensure(self.challenges.contains_key(challenge), || {
            format!("2: {identity} runs for {challenge}, which was removed")
        })?;
        let named = self.records.iter().find(|(_, record)| record.identities().any(|own| *own == identity));
        ensure(named.is_some(), || format!("4: {identity} is started though no record names it"))?;
        // Other running instances have records or are orphans. An orphan whose identity was the first of its instance would be a duplicate.
        for (of, other, running) in directories.existing() {
            let first = self.known.get(other.as_str()).is_some_and(|(_, first)| *first);
            let stray = !self.records.values().any(|record| record.identities().any(|own| own == other.as_str()));
            ensure(!(running.is_some() && first && stray && of.as_str() == challenge), || {
                format!("1: {other} still runs without a record while {identity} is started")
            })?;
        }
        Ok(())
    }

    /// Records that a client starts to create an instance or, without a source, a challenge.
    pub fn begin_create(&mut self, now: Duration, c: &str, s: Option<&str>) -> Begun {
        let challenge = self.challenge_views.entry(c.to_owned()).or_default();
        let (sure, ends) = (challenge.is_certain(now), challenge.deletions);
        let Some(s) = s else { return sure.then_some((0, ends)) };
        let view = self.instances.entry((c.to_owned(), s.to_owned())).or_default();
        (sure && view.pending_deletions == 0).then_some((view.deletions, ends))
    }

    /// Records that a client received the acknowledgement of its create.
    pub fn acknowledge(&mut self, begun: Begun, c: &str, s: Option<&str>) {
        let Some((ends, of_challenge)) = begun else { return };
        let challenge = self.challenge_views.entry(c.to_owned()).or_default();
        if challenge.deletions != of_challenge {
            return;
        }
        let Some(s) = s else {
            challenge.acknowledged = true;
            return;
        };
        let view = self.instances.entry((c.to_owned(), s.to_owned())).or_default();
        view.acknowledged = view.deletions == ends;
    }

    /// Returns the numbers of requested deletions of the instance and its challenge, if a client may rely on the instance. Two equal results
    /// mean that the instance existed all the time in between.
    pub fn guaranteed(&self, c: &str, s: &str) -> Option<(u64, u64)> {
        let view = self.instances.get(&(c.to_owned(), s.to_owned())).filter(|view| view.acknowledged)?;
        Some((view.deletions, self.challenge_views.get(c).map_or(0, |challenge| challenge.deletions)))
    }

    /// Records that a client starts to delete an instance or, without a source, a challenge.
    pub fn begin_delete(&mut self, c: &str, s: Option<&str>) {
        match s {
            Some(s) => self.instances.entry((c.to_owned(), s.to_owned())).or_default().request_deletion(),
            None => {
                self.challenge_views.entry(c.to_owned()).or_default().request_deletion();
                for (_, view) in self.instances.iter_mut().filter(|((of, _), _)| of == c) {
                    view.acknowledged = false;
                }
            }
        }
    }

    /// Records the end of a deletion, with or without a response; `sure` if it can have no further effect.
    pub fn end_delete(&mut self, now: Duration, c: &str, s: Option<&str>, sure: bool) {
        let there = s.and_then(|s| self.records.get(&(c.to_owned(), "s".to_owned(), s.to_owned())));
        let there = there.map(|record| record.since.clone());
        let view = match s {
            Some(s) => self.instances.entry((c.to_owned(), s.to_owned())).or_default(),
            None => self.challenge_views.entry(c.to_owned()).or_default(),
        };
        view.pending_deletions -= 1;
        if !sure {
            (view.uncertain_until, view.possible_victim) = (now + Duration::from_secs(15), there);
        }
    }

    /// Checks invariants 3 to 5 on a system at rest: no faults are injected, and no call is in progress.
    pub fn check_at_rest(
        &self,
        etcd: &Server,
        directories: &Directories,
        expired: impl Fn(&str) -> bool,
    ) -> Result<(), String> {
        let all = |what: &str| {
            let begin = format!("{PREFIX}{what} ");
            etcd.entries()
                .filter(|(key, _)| key.starts_with(&begin))
                .map(|(key, _)| key.to_string())
                .collect::<Vec<_>>()
        };
        for rest in ["live", "working", "rollouts"] {
            let left = all(rest);
            ensure(left.is_empty(), || format!("at rest these keys are left: {left:?}"))?;
        }
        for (id, challenge) in &self.challenges {
            ensure(!challenge.deleting && !challenge.rollout, || format!("at rest: {id} is {challenge:?}"))?;
            let of = |kind: &str| self.records.keys().filter(|key| key.0 == *id && key.1 == kind).count() as i64;
            let (claimed, pooled) = (of("s"), of("p"));
            let room = if challenge.max == 0 { challenge.min } else { (challenge.max - claimed).max(0) };
            let wanted = challenge.min.min(room);
            ensure(pooled == wanted, || {
                format!("3: at rest the pool of {id} has {pooled}, not {wanted}: {challenge:?}")
            })?;
        }
        let running: BTreeMap<_, _> =
            directories.existing().map(|(c, i, content)| (i.as_str(), (c.as_str(), content))).collect();
        for (key, record) in &self.records {
            ensure(record.phase == "ready" && record.intent.is_none(), || format!("at rest: {key:?} is {record:?}"))?;
            let content = running.get(record.identity.as_str()).and_then(|(_, content)| *content);
            let is_lapsed = record.until.as_deref().is_some_and(&expired);
            match content {
                None => ensure(is_lapsed, || format!("5: at rest {key:?} has a record and is not running"))?,
                Some((digest, _)) => ensure(*digest == record.digest, || {
                    format!("5: at rest {key:?} runs {digest} and its record says {}", record.digest)
                })?,
            }
        }
        for (identity, (challenge, _)) in &running {
            let named = self.records.values().any(|record| record.identity == **identity);
            ensure(named, || format!("4: at rest {identity} of {challenge} exists without a record"))?;
        }
        for ((c, s), view) in &self.instances {
            let there = self.records.contains_key(&(c.clone(), "s".to_owned(), s.clone()));
            ensure(there || !view.acknowledged, || format!("5: {c} {s} was acknowledged and does not exist"))?;
        }
        for (c, view) in &self.challenge_views {
            let there = self.challenges.contains_key(c);
            ensure(there || !view.acknowledged, || format!("5: challenge {c} was acknowledged and does not exist"))?;
        }
        // The indexes match the records.
        let sources =
            self.records.keys().filter(|key| key.1 == "s").map(|key| format!("{PREFIX}by-source {} {}", key.2, key.0));
        let sources: BTreeSet<String> = sources.collect();
        let found: BTreeSet<String> = all("by-source").into_iter().collect();
        ensure(sources == found, || format!("at rest the index by source is {found:?}, not {sources:?}"))?;
        let lapsing = self.records.iter().filter(|(key, record)| key.1 == "s" && record.until.is_some()).count();
        let found = all("by-expiry");
        ensure(found.len() == lapsing, || format!("at rest the index by expiry has {found:?}, not {lapsing}"))
    }
}

impl ClientView {
    fn request_deletion(&mut self) {
        self.acknowledged = false;
        self.pending_deletions += 1;
        self.deletions += 1;
    }

    fn is_certain(&self, now: Duration) -> bool {
        self.pending_deletions == 0 && self.uncertain_until <= now
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
