//! Clients that compare every answer with the operations acknowledged before, and a ledger of the violations.

use std::{
    fmt,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::{Value, json};

use super::scenario::quick_scenario;
use crate::harness::POLL;

/// Longer than managers are paused, and than they wait for locks.
const DEADLINE: Duration = Duration::from_secs(40);
/// The delay after a call without an answer.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// The number of instances that a driver uses at a time.
const INSTANCES_PER_DRIVER: usize = 6;

/// Counts the operations and collects the violations.
#[derive(Default)]
pub(super) struct Ledger {
    acknowledged: AtomicU64,
    unknown: AtomicU64,
    failed_reads: AtomicU64,
    violations: Mutex<Vec<Violation>>,
}

/// What kind of guarantee was violated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An acknowledged change is missing or differs.
    Lost,
    /// An operation took effect twice, or something deleted is back.
    Duplicated,
    /// Something has processes or a directory, but no record.
    Orphan,
    /// The contract does not allow the answer, or the cluster does not settle.
    Unexpected,
}

/// A violated guarantee, with a description.
#[derive(Debug)]
pub(super) struct Violation(pub(super) Kind, pub(super) String);

impl Ledger {
    pub(super) fn report(&self, kind: Kind, what: impl fmt::Display) {
        let what = what.to_string();
        eprintln!("{kind:?}: {what}");
        self.violations.lock().unwrap().push(Violation(kind, what));
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// The number of writes that may or may not have taken effect.
    pub(super) fn unknown_outcomes(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// The number of failed calls: writes with an unknown outcome, and reads.
    pub(super) fn failed(&self) -> u64 {
        self.unknown_outcomes() + self.failed_reads.load(Ordering::Relaxed)
    }

    pub(super) fn has_no_violations(&self) -> bool {
        self.violations.lock().unwrap().is_empty()
    }

    pub(super) fn assert_no_violations(&self) {
        let violations = self.violations.lock().unwrap();
        let violations: Vec<String> =
            violations.iter().map(|Violation(kind, what)| format!("{kind:?}: {what}")).collect();
        assert!(violations.is_empty(), "guarantees were violated:\n{}", violations.join("\n"));
        assert!(self.acknowledged() > 0, "no operation was acknowledged");
    }

    /// Counts the answer to a write and returns its outcome.
    fn classify(&self, what: &str, answer: Reply) -> Outcome {
        match answer {
            Reply::Response(200, body) => {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                Outcome::Done(body)
            }
            Reply::Response(404, _) => Outcome::NotFound,
            Reply::Response(409, _) => Outcome::AlreadyExists,
            Reply::Response(503, _) | Reply::NoResponse(_) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                Outcome::Unknown
            }
            Reply::Response(status, body) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                self.report(Kind::Unexpected, format_args!("{what}: {status} {body}"));
                Outcome::Unknown
            }
        }
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let violations = self.violations.lock().unwrap();
        let count = |kind| violations.iter().filter(|violation| violation.0 == kind).count();
        write!(
            f,
            "operations: {} acknowledged, {} of unknown outcome, {} reads failed; lost: {}; duplicated: {}; orphans: {}; unexpected: {}",
            self.acknowledged(),
            self.unknown_outcomes(),
            self.failed_reads.load(Ordering::Relaxed),
            count(Kind::Lost),
            count(Kind::Duplicated),
            count(Kind::Orphan),
            count(Kind::Unexpected)
        )
    }
}

/// Stops the clients when it is dropped, so that they also stop when the test panics.
pub(super) struct StopOnDrop<'a>(pub(super) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The result of a call.
pub(super) enum Reply {
    Response(u16, Value),
    /// The connection failed, or the deadline passed.
    NoResponse(String),
}

/// The outcome of a write.
enum Outcome {
    Done(Value),
    NotFound,
    AlreadyExists,
    /// The write may have taken effect, or may still do so.
    Unknown,
}

/// A client that uses its managers in turn.
pub(super) struct Client {
    agent: ureq::Agent,
    deadline: Duration,
    urls: Vec<String>,
    next: usize,
}

impl Client {
    pub(super) fn new(urls: &[String], first: usize) -> Client {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .proxy(None)
            .build();
        Client { agent: config.new_agent(), deadline: DEADLINE, urls: urls.to_vec(), next: first }
    }

    /// Sets the deadline of each call.
    pub(super) fn with_deadline(mut self, deadline: Duration) -> Client {
        self.deadline = deadline;
        self
    }

    /// Calls the next manager.
    pub(super) fn call(&mut self, method: &str, path: &str, body: &Value) -> Reply {
        self.next += 1;
        let reply = self.call_same_manager(method, path, body);
        if matches!(reply, Reply::NoResponse(_)) {
            std::thread::sleep(RETRY_DELAY);
        }
        reply
    }

    /// Calls the next manager until it answers with something other than 503. Use it after all faults have ended: the return of a
    /// partitioned member can still cause an election.
    pub(super) fn call_until_available(
        &mut self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<(u16, Value), String> {
        self.next += 1;
        POLL.try_until_blocking(|| match self.call_same_manager(method, path, body) {
            Reply::Response(503, body) => Err(body.to_string()),
            Reply::Response(status, body) => Ok((status, body)),
            Reply::NoResponse(why) => Err(why),
        })
    }

    /// Calls the same manager as the last call.
    fn call_same_manager(&self, method: &str, path: &str, body: &Value) -> Reply {
        let url = format!("{}{path}", self.urls[self.next % self.urls.len()]);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder().method(method).uri(url).body(body).unwrap();
        let request = self.agent.configure_request(request).timeout_global(Some(self.deadline)).build();
        let answer = self.agent.run(request).and_then(|mut answer| {
            let text = answer.body_mut().read_to_string()?;
            Ok((answer.status().as_u16(), text))
        });
        match answer {
            Ok((status, text)) => Reply::Response(status, serde_json::from_str(&text).unwrap_or(Value::String(text))),
            Err(error) => Reply::NoResponse(error.to_string()),
        }
    }

    pub(super) fn create(&mut self, challenge: &str, source: &str) -> Reply {
        self.call("POST", "/api/v1/instance", &json!({ "challengeId": challenge, "sourceId": source }))
    }
}

/// An instance that only one driver uses, with its expected state.
struct TrackedInstance {
    challenge: &'static str,
    source: String,
    /// The instance as last acknowledged; `None` if it does not exist.
    acknowledged: Option<Value>,
    /// The outcome of a call is unknown. It may take effect at any time, so the driver stops using this instance.
    is_uncertain: bool,
}

impl TrackedInstance {
    fn path(&self) -> String {
        format!("/api/v1/instance/{}/{}", self.challenge, self.source)
    }

    fn verify(&self, ledger: &Ledger, seen: Option<&Value>) {
        match (&self.acknowledged, seen) {
            (None, None) => {}
            (Some(acknowledged), Some(seen)) => {
                for field in ["flags", "connectionInfo", "since", "until", "lastRenew"] {
                    if acknowledged[field] != seen[field] {
                        ledger.report(
                            Kind::Lost,
                            format_args!("{}: {field}: acknowledged {acknowledged}, read {seen}", self.path()),
                        );
                    }
                }
            }
            (Some(acknowledged), None) => {
                ledger.report(Kind::Lost, format_args!("{}: acknowledged {acknowledged}, now missing", self.path()));
            }
            (None, Some(seen)) => {
                ledger.report(Kind::Duplicated, format_args!("{}: deleted, but read {seen}", self.path()));
            }
        }
    }
}

/// A client with its own instances, of a challenge with a pool and of one without.
pub(super) struct Driver {
    name: String,
    client: Client,
    rng: SmallRng,
    instances: Vec<TrackedInstance>,
    used: usize,
}

impl Driver {
    pub(super) fn new(name: &str, urls: &[String], seed: u64) -> Driver {
        let client = Client::new(urls, seed as usize);
        Driver { name: name.to_owned(), client, rng: SmallRng::seed_from_u64(seed), instances: Vec::new(), used: 0 }
    }

    /// Makes random calls until `stop` is set.
    pub(super) fn drive(&mut self, ledger: &Ledger, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            while self.instances.len() < INSTANCES_PER_DRIVER {
                self.used += 1;
                let challenge = if self.used.is_multiple_of(2) { "pooled" } else { "plain" };
                let source = format!("{}-{}", self.name, self.used);
                self.instances.push(TrackedInstance { challenge, source, acknowledged: None, is_uncertain: false });
            }
            let at = self.rng.random_range(0..self.instances.len());
            let choice = self.rng.random_range(0..100);
            self.step(ledger, at, choice);
            self.instances.retain(|instance| !instance.is_uncertain);
        }
    }

    fn step(&mut self, ledger: &Ledger, at: usize, choice: u32) {
        let tracked = &mut self.instances[at];
        let path = tracked.path();
        if tracked.acknowledged.is_none() && choice < 60 || choice < 10 {
            let outcome = ledger.classify(&path, self.client.create(tracked.challenge, &tracked.source));
            match (outcome, &tracked.acknowledged) {
                (Outcome::Done(instance), None) => tracked.acknowledged = Some(instance),
                (Outcome::Done(instance), Some(acknowledged)) => {
                    ledger.report(
                        Kind::Duplicated,
                        format_args!("{path}: created {instance}, although {acknowledged} exists"),
                    );
                }
                (Outcome::AlreadyExists, Some(_)) => {}
                (Outcome::AlreadyExists, None) => {
                    ledger.report(Kind::Duplicated, format_args!("{path}: deleted, but a create finds it"));
                }
                (Outcome::NotFound, _) => ledger.report(Kind::Lost, format_args!("{path}: the challenge is missing")),
                (Outcome::Unknown, _) => tracked.is_uncertain = true,
            }
        } else if choice < 40 {
            match ledger.classify(&path, self.client.call("PATCH", &path, &json!({}))) {
                Outcome::Done(instance) if tracked.acknowledged.is_some() => tracked.acknowledged = Some(instance),
                Outcome::NotFound => tracked.verify(ledger, None),
                Outcome::Unknown => tracked.is_uncertain = true,
                Outcome::Done(seen) => tracked.verify(ledger, Some(&seen)),
                Outcome::AlreadyExists => {
                    ledger.report(Kind::Unexpected, format_args!("{path}: a renewal answered 409"));
                }
            }
        } else if choice < 70 {
            match ledger.classify(&path, self.client.call("DELETE", &path, &Value::Null)) {
                Outcome::Done(_) if tracked.acknowledged.is_some() => tracked.acknowledged = None,
                Outcome::NotFound => tracked.verify(ledger, None),
                Outcome::Unknown => tracked.is_uncertain = true,
                Outcome::Done(_) | Outcome::AlreadyExists => {
                    ledger.report(Kind::Duplicated, format_args!("{path}: deleted twice"));
                }
            }
        } else {
            self.read(ledger, at);
        }
    }

    fn read(&mut self, ledger: &Ledger, at: usize) {
        let instance = &self.instances[at];
        match self.client.call("GET", &instance.path(), &Value::Null) {
            Reply::Response(200, seen) => instance.verify(ledger, Some(&seen)),
            Reply::Response(404, _) => instance.verify(ledger, None),
            Reply::Response(503, _) | Reply::NoResponse(_) => drop(ledger.failed_reads.fetch_add(1, Ordering::Relaxed)),
            Reply::Response(status, body) => {
                ledger.report(Kind::Unexpected, format_args!("{}: {status} {body}", instance.path()));
            }
        }
    }

    /// Checks that every manager returns the acknowledged state. The cluster must have settled.
    pub(super) fn verify(&self, ledger: &Ledger, urls: &[String]) {
        let mut client = Client::new(urls, 0);
        for instance in &self.instances {
            for _ in urls {
                match client.call_until_available("GET", &instance.path(), &Value::Null) {
                    Ok((200, seen)) => instance.verify(ledger, Some(&seen)),
                    Ok((404, _)) => instance.verify(ledger, None),
                    Ok((status, body)) => {
                        ledger.report(Kind::Unexpected, format_args!("{}: {status} {body}", instance.path()));
                    }
                    Err(why) => ledger.report(Kind::Lost, format_args!("{}: {why}", instance.path())),
                }
            }
        }
    }

    /// The keys of the instances that must exist: `challenge s source`.
    pub(super) fn expected_keys(&self) -> impl Iterator<Item = String> {
        let existing = self.instances.iter().filter(|instance| instance.acknowledged.is_some());
        existing.map(|instance| format!("{} s {}", instance.challenge, instance.source))
    }
}

/// Calls all managers at once to create the same instance, then to delete it. Each time exactly one call must succeed.
pub(super) fn race(urls: &[String], ledger: &Ledger, stop: &AtomicBool, round: usize) {
    let mut clients: Vec<Client> = (0..urls.len()).map(|first| Client::new(urls, first)).collect();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let source = format!("race-{round}-{number}");
        let path = format!("/api/v1/instance/plain/{source}");
        for verb in ["created", "deleted"] {
            let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
                let call = |client: &mut Client| {
                    let reply = match verb {
                        "created" => client.create("plain", &source),
                        _ => client.call("DELETE", &path, &Value::Null),
                    };
                    ledger.classify(&path, reply)
                };
                let racers: Vec<_> = clients.iter_mut().map(|client| scope.spawn(move || call(client))).collect();
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            let done = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Done(_))).count();
            let unknown = outcomes.iter().any(|outcome| matches!(outcome, Outcome::Unknown));
            if done > 1 {
                ledger.report(Kind::Duplicated, format_args!("{path}: {verb} {done} times"));
            } else if done == 0 && !unknown {
                ledger.report(
                    Kind::Lost,
                    format_args!("{path}: not {verb} by any call, although every outcome is known"),
                );
            }
            if unknown {
                break;
            }
        }
    }
}

/// Creates challenges with instances and deletes them. A deleted challenge must not be found again.
pub(super) fn create_and_delete_challenges(urls: &[String], ledger: &Ledger, stop: &AtomicBool, round: usize) {
    let mut client = Client::new(urls, round);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let id = format!("brief-{round}-{number}");
        let path = format!("/api/v1/challenge/{id}");
        let new = json!({ "id": id, "scenario": quick_scenario() });
        let Outcome::Done(_) = ledger.classify(&path, client.call("POST", "/api/v1/challenge", &new)) else { continue };
        let instances = ["a", "b"].map(|source| ledger.classify(&path, client.create(&id, source)));
        let Outcome::Done(_) = ledger.classify(&path, client.call("DELETE", &path, &Value::Null)) else { continue };
        if instances.iter().any(|outcome| matches!(outcome, Outcome::NotFound | Outcome::AlreadyExists)) {
            ledger.report(Kind::Lost, format_args!("{path}: a new challenge rejected an instance"));
        }
        for _ in urls {
            match client.call("GET", &path, &Value::Null) {
                Reply::Response(200, seen) => {
                    ledger.report(Kind::Duplicated, format_args!("{path}: deleted, but read {seen}"));
                }
                Reply::Response(404 | 503, _) | Reply::NoResponse(_) => {}
                Reply::Response(status, body) => {
                    ledger.report(Kind::Unexpected, format_args!("{path}: {status} {body}"));
                }
            }
        }
    }
}

/// Updates a challenge with two instances, with each update strategy in turn.
pub(super) struct Updater {
    client: Client,
    /// The last acknowledged message, and a later one if its outcome is unknown.
    acknowledged: Vec<String>,
    number: usize,
}

impl Updater {
    pub(super) fn new(urls: &[String]) -> Updater {
        Updater { client: Client::new(urls, 1), acknowledged: vec!["none".to_owned()], number: 0 }
    }

    pub(super) fn drive(&mut self, ledger: &Ledger, stop: &AtomicBool) {
        // An update with an unknown outcome may take effect after a later one, so it is the last of this round.
        while !stop.load(Ordering::Relaxed) && self.acknowledged.len() == 1 {
            self.number += 1;
            let strategy = ["update_in_place", "blue_green", "recreate"][self.number % 3];
            let motd = format!("number {}", self.number);
            let update = json!({
                "additional": { "motd": motd }, "updateMask": "additional", "updateStrategy": strategy
            });
            let path = "/api/v1/challenge/shifting";
            match ledger.classify(path, self.client.call("PATCH", path, &update)) {
                Outcome::Done(_) => self.acknowledged = vec![motd],
                Outcome::Unknown => self.acknowledged.push(motd),
                Outcome::NotFound | Outcome::AlreadyExists => {
                    ledger.report(Kind::Lost, "an update did not find its challenge");
                }
            }
        }
    }

    pub(super) fn verify(&mut self, ledger: &Ledger) {
        match self.client.call_until_available("GET", "/api/v1/challenge/shifting", &Value::Null) {
            Ok((200, challenge)) => {
                let motd = challenge["additional"]["motd"].as_str().unwrap_or_default().to_owned();
                if !self.acknowledged.contains(&motd) {
                    ledger
                        .report(Kind::Lost, format_args!("update: acknowledged {:?}, read {motd}", self.acknowledged));
                }
                if challenge["instances"].as_array().map(Vec::len) != Some(2) {
                    ledger.report(
                        Kind::Lost,
                        format_args!("an updated challenge does not have two instances: {challenge}"),
                    );
                }
                self.acknowledged = vec![motd];
            }
            Ok((status, body)) => ledger.report(Kind::Lost, format_args!("updated challenge: {status} {body}")),
            Err(why) => ledger.report(Kind::Lost, format_args!("updated challenge: {why}")),
        }
    }
}
