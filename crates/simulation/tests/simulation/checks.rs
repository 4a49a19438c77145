//! The invariants, checked after every step against what was stored and what runs. Reads the stored keys and records as `keys.rs` and
//! `records.rs` of the coordination document them, by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use gauntlet_coordination::kv::{Condition, KeyRange, Op, Txn, TxnResponse};
use gauntlet_domain::{ChallengeId, Identity};
use jiff::Timestamp;
use serde_json::Value;

use super::{PREFIX, machine::Homes};
use crate::etcd::{Change, Entry, Server};

/// A seat: challenge, `s` or `p`, and the name.
pub type Seat = (String, String, String);

/// An instance as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub identity: String,
    /// Of the record, and of the intent beside it.
    target: Option<String>,
    intent: Option<String>,
    pub phase: String,
    /// By its phase, or by the intent beside it.
    deleting: bool,
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
    pub closing: bool,
    pub min: i64,
    pub max: i64,
    pub revision: u64,
    pub rollout: bool,
}

/// What clients were told of one thing.
#[derive(Debug, Default)]
struct Told {
    /// Acknowledged, and nobody has asked for its end since.
    acknowledged: bool,
    /// Ends asked for and not answered yet.
    ending: u32,
    /// Until when an end that was asked for and not answered well may still come.
    unsure: Duration,
    /// And to which instance: the one that was there when its manager gave up. None that was begun since.
    unsure_of: Option<String>,
    /// How often an end was asked for.
    ends: u64,
}

/// How often an end had been asked for when something was begun; of the instance and of its challenge. `None` if one may still come.
pub type Begun = Option<(u64, u64)>;

/// What is known besides what is stored.
#[derive(Default)]
pub struct Checks {
    pub records: BTreeMap<Seat, Record>,
    pub challenges: BTreeMap<String, Challenge>,
    /// Every identity ever recorded, and whether it was the first of a seat (not a replacement); by which challenge.
    known: BTreeMap<String, (String, bool)>,
    seats: BTreeMap<(String, String), Told>,
    created: BTreeMap<String, Told>,
    /// Steps that were checked.
    pub steps: u64,
}

/// Whether a transaction carries a token that no longer stands.
pub fn stale(etcd: &Server, txn: &Txn) -> bool {
    txn.compare.iter().any(|compare| matches!(compare.condition, Condition::CreateRevision(_)) && !etcd.holds(compare))
}

/// The seat of a key of an instance's record or intent, and which.
fn seat_of(key: &str) -> Option<(Seat, bool)> {
    match key.strip_prefix(PREFIX)?.split(' ').collect::<Vec<_>>().as_slice() {
        ["instances", c, kind, name] => Some((((*c).to_owned(), (*kind).to_owned(), (*name).to_owned()), false)),
        ["instances", c, kind, name, "intent"] => {
            Some((((*c).to_owned(), (*kind).to_owned(), (*name).to_owned()), true))
        }
        _ => None,
    }
}

fn challenge_of(key: &str) -> Option<&str> {
    let c = key.strip_prefix(PREFIX)?.strip_prefix("challenges ")?;
    (!c.contains(' ')).then_some(c)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn json(entry: &Entry) -> Value {
    serde_json::from_slice(&entry.value).expect("records are JSON")
}

fn target(value: &Value) -> Option<String> {
    Some(value["target"].as_object()?.get("identity")?.as_str()?.to_owned())
}

fn read_record(entry: &Entry) -> Record {
    let value = json(entry);
    let deleting = value["phase"]["name"] == "deleting";
    Record {
        deleting,
        identity: text(&value["identity"]),
        target: target(&value),
        phase: text(&value["phase"]["name"]),
        since: text(&value["since"]),
        last_renew: text(&value["last_renew"]).parse().expect("a record has its times"),
        until: value["until"].as_str().map(str::to_owned),
        digest: text(&value["scenario"]["digest"]),
        intent: None,
    }
}

fn read_challenge(entry: &Entry) -> Challenge {
    let value = json(entry);
    Challenge {
        closing: value["closing"] == Value::Bool(true),
        min: value["min"].as_i64().unwrap(),
        max: value["max"].as_i64().unwrap(),
        revision: value["revision"].as_u64().unwrap(),
        rollout: !value["rollout"].is_null(),
    }
}

impl Checks {
    /// After a transaction.
    pub fn written(
        &mut self,
        now: Duration,
        homes: &Homes,
        txn: &Txn,
        result: &TxnResponse,
        changes: &[Change],
    ) -> Result<(), String> {
        if changes.is_empty() {
            return Ok(());
        }
        self.steps += 1;
        if !changes.iter().any(|change| seat_of(&change.key).is_some() || challenge_of(&change.key).is_some()) {
            return Ok(());
        }
        let before = (self.records.clone(), self.challenges.clone());
        for change in changes {
            if let Some((seat, intent)) = seat_of(&change.key) {
                // Invariant 6: whatever changes an instance says in the same transaction that nobody else owns it.
                let owner = format!("{PREFIX}live owners {} {} {}", seat.0, seat.1, seat.2);
                let tested = txn.compare.iter().any(|compare| {
                    compare.range == KeyRange::key(&owner)
                        && matches!(compare.condition, Condition::Absent | Condition::CreateRevision(_))
                });
                ensure(result.succeeded && tested, || format!("6: {seat:?} changes without a test of its owner key"))?;
                self.learn(&seat, intent, change.after.as_ref());
            } else if let Some(id) = challenge_of(&change.key) {
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
        for id in changes.iter().filter_map(|change| challenge_of(&change.key)) {
            self.challenge_changed(homes, id, before.1.get(id))?;
        }
        let seats: BTreeSet<Seat> =
            changes.iter().filter_map(|change| seat_of(&change.key)).map(|(seat, _)| seat).collect();
        for seat in &seats {
            self.seat_changed(now, homes, seat, &before.0, txn)?;
        }
        self.one_seat_each()
    }

    fn learn(&mut self, seat: &Seat, intent: bool, after: Option<&Entry>) {
        match (intent, after) {
            (false, None) => {
                self.records.remove(seat);
            }
            (false, Some(entry)) => {
                let mut record = read_record(entry);
                if let Some(before) = self.records.get(seat) {
                    record.intent.clone_from(&before.intent);
                }
                self.records.insert(seat.clone(), record);
            }
            (true, after) => {
                if let Some(record) = self.records.get_mut(seat) {
                    record.intent = after.and_then(|entry| target(&json(entry)));
                    let intends = after.is_some_and(|entry| json(entry)["intent"] == "delete");
                    record.deleting = intends || record.phase == "deleting";
                }
            }
        }
    }

    /// Invariants 2 and 5 on a challenge.
    fn challenge_changed(&self, homes: &Homes, id: &str, before: Option<&Challenge>) -> Result<(), String> {
        match (before, self.challenges.get(id)) {
            (None, _) => {}
            (Some(before), Some(after)) => {
                ensure(!before.closing || after.closing, || format!("2: challenge {id} reopens"))?;
                ensure(before.revision <= after.revision, || {
                    format!("5: challenge {id} goes back to an older revision")
                })?;
            }
            (Some(before), None) => {
                ensure(before.closing, || format!("2: challenge {id} is removed though it was not closing"))?;
                let left = self.records.keys().find(|seat| seat.0 == id);
                ensure(left.is_none(), || format!("2: challenge {id} is removed and leaves {left:?}"))?;
                let left = homes.there().find(|(challenge, ..)| challenge.as_str() == id);
                ensure(left.is_none(), || format!("2: challenge {id} is removed and leaves resources {left:?}"))?;
                let lost = self.created.get(id).is_some_and(|told| told.acknowledged);
                ensure(!lost, || format!("5: challenge {id} was acknowledged and is gone, and nobody deleted it"))?;
            }
        }
        Ok(())
    }

    /// Invariants 1 to 5 on one seat.
    fn seat_changed(
        &mut self,
        now: Duration,
        homes: &Homes,
        seat: &Seat,
        before: &BTreeMap<Seat, Record>,
        txn: &Txn,
    ) -> Result<(), String> {
        let open = self.challenges.get(&seat.0).filter(|challenge| !challenge.closing);
        match (before.get(seat), self.records.get(seat)) {
            (None, Some(after)) => {
                let Some(challenge) = open else {
                    return Err(format!("2: {seat:?} begins on a challenge that is closing or gone"));
                };
                let from = before.iter().find(|(_, record)| record.identity == after.identity);
                match from {
                    // Invariant 3: claimed from a pool, once.
                    Some((from, record)) => {
                        let once =
                            from.0 == seat.0 && from.1 == "p" && seat.1 == "s" && !self.records.contains_key(from);
                        ensure(once && record.phase == "ready", || format!("3: {seat:?} takes what {from:?} has"))?;
                    }
                    None => {
                        let known = self.known.contains_key(&after.identity);
                        ensure(!known, || format!("1: {seat:?} begins with an identity that was used before"))?;
                    }
                }
                if seat.1 == "p" {
                    let of = |kind: &str| {
                        let counts = |(of, record): &(&Seat, &Record)| {
                            of.0 == seat.0 && of.1 == kind && !(kind == "p" && record.deleting)
                        };
                        self.records.iter().filter(counts).count() as i64
                    };
                    let (claimed, pooled) = (of("s"), of("p"));
                    let within = pooled <= challenge.min && (challenge.max == 0 || claimed + pooled <= challenge.max);
                    ensure(within, || {
                        let of: Vec<_> = self.records.iter().filter(|(of, _)| of.0 == seat.0).collect();
                        format!("3: the pool of {} grows to {pooled} beside {claimed}: {challenge:?}, {of:?}", seat.0)
                    })?;
                }
            }
            (Some(before), None) => {
                let claimed = self.records.values().any(|record| record.identity == before.identity);
                if !claimed {
                    // Invariant 4: a record goes after its resources.
                    for identity in before.identities() {
                        let left = homes.there().any(|(_, there, _)| there.as_str() == identity);
                        ensure(!left, || format!("4: the record of {seat:?} goes and leaves {identity}"))?;
                    }
                    let told = self.seats.get(&(seat.0.clone(), seat.2.clone())).filter(|_| seat.1 == "s");
                    ensure(!told.is_some_and(|told| told.acknowledged), || {
                        format!("5: {seat:?} was acknowledged and is gone, and nobody deleted it")
                    })?;
                }
            }
            (Some(before), Some(after)) if before.since == after.since => {
                let may_come = |told: &Told| told.unsure > now && told.unsure_of.as_ref() == Some(&before.since);
                let asked = |told: Option<&Told>| told.is_some_and(|told| told.ending > 0 || may_come(told));
                let wanted = before.deleting
                    || seat.1 == "p"
                    || open.is_none()
                    || asked(self.seats.get(&(seat.0.clone(), seat.2.clone())))
                    // A deletion of the challenge that was answered with Unavailable may yet come.
                    || self.created.get(&seat.0).is_some_and(|told| told.unsure > now);
                ensure(wanted || !after.deleting, || format!("5: {seat:?} is ended, and nobody asked for it"))?;
                ensure(before.last_renew <= after.last_renew, || format!("5: {seat:?} loses a renewal"))?;
                ensure(seat.1 == "p" || !(before.phase == "ready" && after.phase == "provisioning"), || {
                    format!("5: {seat:?} was ready and is begun again")
                })?;
            }
            _ => {}
        }
        // What becomes known.
        if let Some(after) = self.records.get(seat) {
            let first = !before.contains_key(seat);
            for identity in after.identities() {
                let first = first && *identity == after.identity;
                self.known.entry(identity.clone()).or_insert_with(|| (seat.0.clone(), first));
            }
        }
        let deletes = txn.success.iter().filter(|op| matches!(op, Op::Delete(_))).count();
        ensure(deletes <= 16, || format!("a transaction on {seat:?} deletes {deletes} keys"))
    }

    /// Invariants 1 and 3: no identity is of two seats.
    fn one_seat_each(&self) -> Result<(), String> {
        let mut of: BTreeMap<&String, &Seat> = BTreeMap::new();
        for (seat, record) in &self.records {
            for identity in record.identities() {
                if let Some(other) = of.insert(identity, seat) {
                    return Err(format!("3: {identity} is of {other:?} and of {seat:?}"));
                }
            }
        }
        Ok(())
    }

    /// After something was started on the machine: invariants 1 and 4.
    pub fn started(&mut self, homes: &Homes, challenge: &ChallengeId, identity: &Identity) -> Result<(), String> {
        self.steps += 1;
        let (challenge, identity) = (challenge.as_str(), identity.as_str().to_owned());
        ensure(self.known.contains_key(&identity), || format!("4: {identity} runs and was never recorded"))?;
        ensure(self.challenges.contains_key(challenge), || {
            format!("2: {identity} runs for {challenge}, which is gone")
        })?;
        let named = self.records.iter().find(|(_, record)| record.identities().any(|own| *own == identity));
        ensure(named.is_some(), || format!("4: {identity} is started though no record names it any more"))?;
        // What else runs is named by a record too, or is an orphan; an orphan that once had a seat to itself would be a double.
        for (of, other, running) in homes.there() {
            let first = self.known.get(other.as_str()).is_some_and(|(_, first)| *first);
            let stray = !self.records.values().any(|record| record.identities().any(|own| own == other.as_str()));
            ensure(!(running.is_some() && first && stray && of.as_str() == challenge), || {
                format!("1: {other} still runs without a record while {identity} is started")
            })?;
        }
        Ok(())
    }

    /// A client asks for an instance, or (without a source) for a challenge.
    pub fn begin(&mut self, now: Duration, c: &str, s: Option<&str>) -> Begun {
        let challenge = self.created.entry(c.to_owned()).or_default();
        let (sure, ends) = (challenge.sure(now), challenge.ends);
        let Some(s) = s else { return sure.then_some((0, ends)) };
        let told = self.seats.entry((c.to_owned(), s.to_owned())).or_default();
        (sure && told.ending == 0).then_some((told.ends, ends))
    }

    /// A client was told that what it had asked for is there.
    pub fn acknowledge(&mut self, begun: Begun, c: &str, s: Option<&str>) {
        let Some((ends, of_challenge)) = begun else { return };
        let challenge = self.created.entry(c.to_owned()).or_default();
        if challenge.ends != of_challenge {
            return;
        }
        let Some(s) = s else {
            challenge.acknowledged = true;
            return;
        };
        let told = self.seats.entry((c.to_owned(), s.to_owned())).or_default();
        told.acknowledged = told.ends == ends;
    }

    /// Whether a client may rely on the instance being there: how often the end of it, and of its challenge, was asked for before. The same
    /// answer twice means that it was there all the time between.
    pub fn relied_on(&self, c: &str, s: &str) -> Option<(u64, u64)> {
        let told = self.seats.get(&(c.to_owned(), s.to_owned())).filter(|told| told.acknowledged)?;
        Some((told.ends, self.created.get(c).map_or(0, |challenge| challenge.ends)))
    }

    /// A client asks for the end of an instance, or (without a source) of a challenge.
    pub fn ending(&mut self, c: &str, s: Option<&str>) {
        match s {
            Some(s) => self.seats.entry((c.to_owned(), s.to_owned())).or_default().end(),
            None => {
                self.created.entry(c.to_owned()).or_default().end();
                for (_, told) in self.seats.iter_mut().filter(|((of, _), _)| of == c) {
                    told.acknowledged = false;
                }
            }
        }
    }

    /// The answer to that came, or never will; `sure` if nothing of it can happen any more.
    pub fn ended(&mut self, now: Duration, c: &str, s: Option<&str>, sure: bool) {
        let there = s.and_then(|s| self.records.get(&(c.to_owned(), "s".to_owned(), s.to_owned())));
        let there = there.map(|record| record.since.clone());
        let told = match s {
            Some(s) => self.seats.entry((c.to_owned(), s.to_owned())).or_default(),
            None => self.created.entry(c.to_owned()).or_default(),
        };
        told.ending -= 1;
        if !sure {
            (told.unsure, told.unsure_of) = (now + Duration::from_secs(15), there);
        }
    }

    /// When nothing goes wrong any more and nothing is under way: invariants 3 to 5 as they stand at rest.
    pub fn at_rest(&self, etcd: &Server, homes: &Homes, expired: impl Fn(&str) -> bool) -> Result<(), String> {
        let all = |what: &str| {
            let begin = format!("{PREFIX}{what} ");
            etcd.entries()
                .filter(|(key, _)| key.starts_with(&begin))
                .map(|(key, _)| key.to_string())
                .collect::<Vec<_>>()
        };
        for rest in ["live", "working", "rollouts"] {
            let left = all(rest);
            ensure(left.is_empty(), || format!("at rest: {left:?}"))?;
        }
        for (id, challenge) in &self.challenges {
            ensure(!challenge.closing && !challenge.rollout, || format!("at rest: {id} is {challenge:?}"))?;
            let of = |kind: &str| self.records.keys().filter(|seat| seat.0 == *id && seat.1 == kind).count() as i64;
            let (claimed, pooled) = (of("s"), of("p"));
            let room = if challenge.max == 0 { challenge.min } else { (challenge.max - claimed).max(0) };
            let wanted = challenge.min.min(room);
            ensure(pooled == wanted, || {
                format!("3: at rest the pool of {id} has {pooled}, not {wanted}: {challenge:?}")
            })?;
        }
        let running: BTreeMap<_, _> =
            homes.there().map(|(c, i, content)| (i.as_str(), (c.as_str(), content))).collect();
        for (seat, record) in &self.records {
            ensure(record.phase == "ready" && record.intent.is_none(), || format!("at rest: {seat:?} is {record:?}"))?;
            let content = running.get(record.identity.as_str()).and_then(|(_, content)| *content);
            let is_lapsed = record.until.as_deref().is_some_and(&expired);
            match content {
                None => ensure(is_lapsed, || format!("5: at rest {seat:?} has a record and does not run"))?,
                Some((digest, _)) => ensure(*digest == record.digest, || {
                    format!("5: at rest {seat:?} runs {digest} and its record says {}", record.digest)
                })?,
            }
        }
        for (identity, (challenge, _)) in &running {
            let named = self.records.values().any(|record| record.identity == **identity);
            ensure(named, || format!("4: at rest {identity} of {challenge} is there without a record"))?;
        }
        for ((c, s), told) in &self.seats {
            let there = self.records.contains_key(&(c.clone(), "s".to_owned(), s.clone()));
            ensure(there || !told.acknowledged, || format!("5: {c} {s} was acknowledged and is not there"))?;
        }
        for (c, told) in &self.created {
            let there = self.challenges.contains_key(c);
            ensure(there || !told.acknowledged, || format!("5: challenge {c} was acknowledged and is not there"))?;
        }
        // The indexes hold what follows from the records, and nothing else.
        let sources = self
            .records
            .keys()
            .filter(|seat| seat.1 == "s")
            .map(|seat| format!("{PREFIX}by-source {} {}", seat.2, seat.0));
        let sources: BTreeSet<String> = sources.collect();
        let found: BTreeSet<String> = all("by-source").into_iter().collect();
        ensure(sources == found, || format!("at rest the index by source is {found:?}, not {sources:?}"))?;
        let lapsing = self.records.iter().filter(|(seat, record)| seat.1 == "s" && record.until.is_some()).count();
        let found = all("by-expiry");
        ensure(found.len() == lapsing, || format!("at rest the index by expiry has {found:?}, not {lapsing}"))
    }
}

impl Told {
    fn end(&mut self) {
        self.acknowledged = false;
        self.ending += 1;
        self.ends += 1;
    }

    fn sure(&self, now: Duration) -> bool {
        self.ending == 0 && self.unsure <= now
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
