//! Clients that know what they were promised: each call's answer is held against what was acknowledged before.

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

use super::scenario::quick;
use crate::harness::POLL;

/// Longer than a manager is paused, and than it waits for others.
const DEADLINE: Duration = Duration::from_secs(40);
/// Who did not answer at all is not asked again at once.
const BREATH: Duration = Duration::from_millis(50);
/// Seats of each client.
const SEATS: usize = 6;

/// What was promised, and what was broken.
#[derive(Default)]
pub(super) struct Ledger {
    acknowledged: AtomicU64,
    unknown: AtomicU64,
    unread: AtomicU64,
    broken: Mutex<Vec<Broken>>,
}

/// A promise that was not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// What was acknowledged is not there, or not as it was acknowledged.
    Lost,
    /// There is more than was asked for, or what was deleted is back.
    Doubled,
    /// Something runs, or has a directory, and is not stored.
    Orphan,
    /// An answer that the contract does not have, or a state that does not come to rest.
    Odd,
}

/// How, and what.
#[derive(Debug)]
pub(super) struct Broken(pub(super) Kind, pub(super) String);

impl Ledger {
    pub(super) fn broken(&self, kind: Kind, what: impl fmt::Display) {
        let what = what.to_string();
        eprintln!("{kind:?}: {what}");
        self.broken.lock().unwrap().push(Broken(kind, what));
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Calls after which nobody knows whether they came to pass.
    pub(super) fn outcomes_unknown(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// Calls that failed, of whatever kind: those above, and reads.
    pub(super) fn failed(&self) -> u64 {
        self.outcomes_unknown() + self.unread.load(Ordering::Relaxed)
    }

    pub(super) fn is_kept(&self) -> bool {
        self.broken.lock().unwrap().is_empty()
    }

    pub(super) fn assert_kept(&self) {
        let broken = self.broken.lock().unwrap();
        let broken: Vec<String> = broken.iter().map(|Broken(kind, what)| format!("{kind:?}: {what}")).collect();
        assert!(broken.is_empty(), "promises were broken:\n{}", broken.join("\n"));
        assert!(self.acknowledged() > 0, "something was promised");
    }

    /// Counts an answer and says what it means.
    fn means(&self, what: &str, answer: Reply) -> Means {
        match answer {
            Reply::Said(200, body) => {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                Means::Done(body)
            }
            Reply::Said(404, _) => Means::Missing,
            Reply::Said(409, _) => Means::Exists,
            Reply::Said(503, _) | Reply::Nothing(_) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                Means::Unknown
            }
            Reply::Said(status, body) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                self.broken(Kind::Odd, format_args!("{what}: {status} {body}"));
                Means::Unknown
            }
        }
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken = self.broken.lock().unwrap();
        let count = |kind| broken.iter().filter(|broken| broken.0 == kind).count();
        write!(
            f,
            "operations: {} acknowledged, {} of unknown outcome, {} reads failed; lost: {}; doubled: {}; orphans: {}; odd: {}",
            self.acknowledged(),
            self.outcomes_unknown(),
            self.unread.load(Ordering::Relaxed),
            count(Kind::Lost),
            count(Kind::Doubled),
            count(Kind::Orphan),
            count(Kind::Odd)
        )
    }
}

/// Tells clients to stop when it is dropped, however the test ends.
pub(super) struct Stopping<'a>(pub(super) &'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What came back.
pub(super) enum Reply {
    Said(u16, Value),
    /// No connection, or no answer in time.
    Nothing(String),
}

enum Means {
    Done(Value),
    Missing,
    Exists,
    /// It may have happened, or may yet.
    Unknown,
}

/// Talks to one manager after the other of those that it knows.
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

    /// The same, for what may take longer.
    pub(super) fn patient(mut self, deadline: Duration) -> Client {
        self.deadline = deadline;
        self
    }

    /// Asks the next manager.
    pub(super) fn ask(&mut self, method: &str, path: &str, body: &Value) -> Reply {
        self.next += 1;
        let reply = self.ask_again(method, path, body);
        if matches!(reply, Reply::Nothing(_)) {
            std::thread::sleep(BREATH);
        }
        reply
    }

    /// Asks the next manager until it answers, and not that it is unavailable: for when all faults are over. An election may still follow
    /// when a member that was cut off is back.
    pub(super) fn insist(&mut self, method: &str, path: &str, body: &Value) -> Result<(u16, Value), String> {
        self.next += 1;
        POLL.try_until_blocking(|| match self.ask_again(method, path, body) {
            Reply::Said(503, body) => Err(body.to_string()),
            Reply::Said(status, body) => Ok((status, body)),
            Reply::Nothing(why) => Err(why),
        })
    }

    /// Asks the manager that was asked last.
    fn ask_again(&self, method: &str, path: &str, body: &Value) -> Reply {
        let url = format!("{}{path}", self.urls[self.next % self.urls.len()]);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder().method(method).uri(url).body(body).unwrap();
        let request = self.agent.configure_request(request).timeout_global(Some(self.deadline)).build();
        let answer = self.agent.run(request).and_then(|mut answer| {
            let text = answer.body_mut().read_to_string()?;
            Ok((answer.status().as_u16(), text))
        });
        match answer {
            Ok((status, text)) => Reply::Said(status, serde_json::from_str(&text).unwrap_or(Value::String(text))),
            Err(error) => Reply::Nothing(error.to_string()),
        }
    }

    pub(super) fn create(&mut self, challenge: &str, source: &str) -> Reply {
        self.ask("POST", "/api/v1/instance", &json!({ "challengeId": challenge, "sourceId": source }))
    }
}

/// A seat that one client has for itself, and what it was promised there.
struct Seat {
    challenge: &'static str,
    source: String,
    /// The instance as it was last acknowledged; `None` if there is none.
    promised: Option<Value>,
    /// The outcome of a call is not known, and it may come to pass at any time: this seat is given up for another.
    unknown: bool,
}

impl Seat {
    fn path(&self) -> String {
        format!("/api/v1/instance/{}/{}", self.challenge, self.source)
    }

    fn holds(&self, ledger: &Ledger, seen: Option<&Value>) {
        match (&self.promised, seen) {
            (None, None) => {}
            (Some(promised), Some(seen)) => {
                for field in ["flags", "connectionInfo", "since", "until", "lastRenew"] {
                    if promised[field] != seen[field] {
                        ledger.broken(
                            Kind::Lost,
                            format_args!("{}: {field}: promised {promised}, seen {seen}", self.path()),
                        );
                    }
                }
            }
            (Some(promised), None) => {
                ledger.broken(Kind::Lost, format_args!("{}: promised {promised}, gone", self.path()));
            }
            (None, Some(seen)) => ledger.broken(Kind::Doubled, format_args!("{}: gone, seen {seen}", self.path())),
        }
    }
}

/// A client with seats of its own, on a challenge with a pool and on one without.
pub(super) struct Driver {
    name: String,
    client: Client,
    rng: SmallRng,
    seats: Vec<Seat>,
    made: usize,
}

impl Driver {
    pub(super) fn new(name: &str, urls: &[String], seed: u64) -> Driver {
        let client = Client::new(urls, seed as usize);
        Driver { name: name.to_owned(), client, rng: SmallRng::seed_from_u64(seed), seats: Vec::new(), made: 0 }
    }

    /// Calls until told to stop.
    pub(super) fn drive(&mut self, ledger: &Ledger, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            while self.seats.len() < SEATS {
                self.made += 1;
                let challenge = if self.made.is_multiple_of(2) { "pooled" } else { "plain" };
                let source = format!("{}-{}", self.name, self.made);
                self.seats.push(Seat { challenge, source, promised: None, unknown: false });
            }
            let at = self.rng.random_range(0..self.seats.len());
            let dice = self.rng.random_range(0..100);
            self.step(ledger, at, dice);
            self.seats.retain(|seat| !seat.unknown);
        }
    }

    fn step(&mut self, ledger: &Ledger, at: usize, dice: u32) {
        let seat = &mut self.seats[at];
        let path = seat.path();
        if seat.promised.is_none() && dice < 60 || dice < 10 {
            let means = ledger.means(&path, self.client.create(seat.challenge, &seat.source));
            match (means, &seat.promised) {
                (Means::Done(instance), None) => seat.promised = Some(instance),
                (Means::Done(instance), Some(promised)) => {
                    ledger.broken(Kind::Doubled, format_args!("{path}: {promised} and {instance}"));
                }
                (Means::Exists, Some(_)) => {}
                (Means::Exists, None) => ledger.broken(Kind::Doubled, format_args!("{path}: gone, and exists")),
                (Means::Missing, _) => ledger.broken(Kind::Lost, format_args!("{path}: its challenge")),
                (Means::Unknown, _) => seat.unknown = true,
            }
        } else if dice < 40 {
            match ledger.means(&path, self.client.ask("PATCH", &path, &json!({}))) {
                Means::Done(instance) if seat.promised.is_some() => seat.promised = Some(instance),
                Means::Missing => seat.holds(ledger, None),
                Means::Unknown => seat.unknown = true,
                Means::Done(seen) => seat.holds(ledger, Some(&seen)),
                Means::Exists => ledger.broken(Kind::Odd, format_args!("{path}: a renewal says that it exists")),
            }
        } else if dice < 70 {
            match ledger.means(&path, self.client.ask("DELETE", &path, &Value::Null)) {
                Means::Done(_) if seat.promised.is_some() => seat.promised = None,
                Means::Missing => seat.holds(ledger, None),
                Means::Unknown => seat.unknown = true,
                Means::Done(_) | Means::Exists => {
                    ledger.broken(Kind::Doubled, format_args!("{path}: gone, and deleted"));
                }
            }
        } else {
            self.look(ledger, at);
        }
    }

    fn look(&mut self, ledger: &Ledger, at: usize) {
        let seat = &self.seats[at];
        match self.client.ask("GET", &seat.path(), &Value::Null) {
            Reply::Said(200, seen) => seat.holds(ledger, Some(&seen)),
            Reply::Said(404, _) => seat.holds(ledger, None),
            Reply::Said(503, _) | Reply::Nothing(_) => drop(ledger.unread.fetch_add(1, Ordering::Relaxed)),
            Reply::Said(status, body) => {
                ledger.broken(Kind::Odd, format_args!("{}: {status} {body}", seat.path()));
            }
        }
    }

    /// When all is at rest every manager must answer, and answer what was promised.
    pub(super) fn hold(&self, ledger: &Ledger, urls: &[String]) {
        let mut client = Client::new(urls, 0);
        for seat in &self.seats {
            for _ in urls {
                match client.insist("GET", &seat.path(), &Value::Null) {
                    Ok((200, seen)) => seat.holds(ledger, Some(&seen)),
                    Ok((404, _)) => seat.holds(ledger, None),
                    Ok((status, body)) => ledger.broken(Kind::Odd, format_args!("{}: {status} {body}", seat.path())),
                    Err(why) => ledger.broken(Kind::Lost, format_args!("{}: {why}", seat.path())),
                }
            }
        }
    }

    /// The seats with an instance: `challenge s source`.
    pub(super) fn promised(&self) -> impl Iterator<Item = String> {
        let there = self.seats.iter().filter(|seat| seat.promised.is_some());
        there.map(|seat| format!("{} s {}", seat.challenge, seat.source))
    }
}

/// All managers at once are asked for the same seat: one of them gives it. Then all are asked to take it back: one of them does.
pub(super) fn race(urls: &[String], ledger: &Ledger, stop: &AtomicBool, round: usize) {
    let mut clients: Vec<Client> = (0..urls.len()).map(|first| Client::new(urls, first)).collect();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let source = format!("race-{round}-{number}");
        let path = format!("/api/v1/instance/plain/{source}");
        for what in ["created", "deleted"] {
            let answers: Vec<Means> = std::thread::scope(|scope| {
                let ask = |client: &mut Client| {
                    let reply = match what {
                        "created" => client.create("plain", &source),
                        _ => client.ask("DELETE", &path, &Value::Null),
                    };
                    ledger.means(&path, reply)
                };
                let racers: Vec<_> = clients.iter_mut().map(|client| scope.spawn(move || ask(client))).collect();
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            let done = answers.iter().filter(|means| matches!(means, Means::Done(_))).count();
            let unknown = answers.iter().any(|means| matches!(means, Means::Unknown));
            if done > 1 {
                ledger.broken(Kind::Doubled, format_args!("{path}: {what} {done} times"));
            } else if done == 0 && !unknown {
                ledger.broken(
                    Kind::Lost,
                    format_args!("{path}: {what} by nobody, though everybody was told that it was"),
                );
            }
            if unknown {
                break;
            }
        }
    }
}

/// Registers challenges, gives them instances and deletes them: what is deleted is gone with all that belongs to it.
pub(super) fn come_and_go(urls: &[String], ledger: &Ledger, stop: &AtomicBool, round: usize) {
    let mut client = Client::new(urls, round);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let id = format!("brief-{round}-{number}");
        let path = format!("/api/v1/challenge/{id}");
        let new = json!({ "id": id, "scenario": quick() });
        let Means::Done(_) = ledger.means(&path, client.ask("POST", "/api/v1/challenge", &new)) else { continue };
        let instances = ["a", "b"].map(|source| ledger.means(&path, client.create(&id, source)));
        let Means::Done(_) = ledger.means(&path, client.ask("DELETE", &path, &Value::Null)) else { continue };
        if instances.iter().any(|means| matches!(means, Means::Missing | Means::Exists)) {
            ledger.broken(Kind::Lost, format_args!("{path}: a new challenge that takes no instance"));
        }
        for _ in urls {
            match client.ask("GET", &path, &Value::Null) {
                Reply::Said(200, seen) => ledger.broken(Kind::Doubled, format_args!("{path}: gone, seen {seen}")),
                Reply::Said(404 | 503, _) | Reply::Nothing(_) => {}
                Reply::Said(status, body) => ledger.broken(Kind::Odd, format_args!("{path}: {status} {body}")),
            }
        }
    }
}

/// Updates one challenge with two instances, each time by another strategy.
pub(super) struct Updater {
    client: Client,
    /// The last that was acknowledged, and later ones whose outcome is not known.
    promised: Vec<String>,
    number: usize,
}

impl Updater {
    pub(super) fn new(urls: &[String]) -> Updater {
        Updater { client: Client::new(urls, 1), promised: vec!["none".to_owned()], number: 0 }
    }

    pub(super) fn drive(&mut self, ledger: &Ledger, stop: &AtomicBool) {
        // One whose outcome is not known may come to pass after the next: there is none in this round.
        while !stop.load(Ordering::Relaxed) && self.promised.len() == 1 {
            self.number += 1;
            let strategy = ["update_in_place", "blue_green", "recreate"][self.number % 3];
            let motd = format!("number {}", self.number);
            let update = json!({
                "additional": { "motd": motd }, "updateMask": "additional", "updateStrategy": strategy
            });
            let path = "/api/v1/challenge/shifting";
            match ledger.means(path, self.client.ask("PATCH", path, &update)) {
                Means::Done(_) => self.promised = vec![motd],
                Means::Unknown => self.promised.push(motd),
                Means::Missing | Means::Exists => ledger.broken(Kind::Lost, "the challenge that is updated"),
            }
        }
    }

    pub(super) fn hold(&mut self, ledger: &Ledger) {
        match self.client.insist("GET", "/api/v1/challenge/shifting", &Value::Null) {
            Ok((200, challenge)) => {
                let motd = challenge["additional"]["motd"].as_str().unwrap_or_default().to_owned();
                if !self.promised.contains(&motd) {
                    ledger.broken(Kind::Lost, format_args!("update: promised {:?}, seen {motd}", self.promised));
                }
                if challenge["instances"].as_array().map(Vec::len) != Some(2) {
                    ledger.broken(Kind::Lost, format_args!("an update lost an instance: {challenge}"));
                }
                self.promised = vec![motd];
            }
            Ok((status, body)) => ledger.broken(Kind::Lost, format_args!("updated challenge: {status} {body}")),
            Err(why) => ledger.broken(Kind::Lost, format_args!("updated challenge: {why}")),
        }
    }
}
