//! What concurrent clients of one seat see is linearizable: of real managers, as processes, on an etcd cluster of three members.
//!
//! As `linear` does it within one process: histories are recorded and checked. Half of them run while managers and members are killed and
//! paused.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use jiff::Timestamp;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    cluster::{Between, Cluster, LEASE_TTL},
    load::{Client, Reply, Stopping},
    scenario::quick,
};
use crate::linear::model::{History, Step};

/// Of each half.
const HISTORIES: usize = 40;
const AT_ONCE: usize = 4;
const CLIENTS: usize = 4;
const CALLS: usize = 7;
const REPLICAS: usize = 3;

/// Numbers calls. A create passes its number on as a setting of the instance: so it is known by whom it was created.
static NEXT: AtomicU64 = AtomicU64::new(1);

fn next() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The call that created it, and when it was last renewed.
fn seen(instance: &Value) -> (u64, u64) {
    let created = instance["additional"]["call"].as_str().unwrap_or_else(|| panic!("{instance}"));
    let renewed: Timestamp = instance["lastRenew"].as_str().unwrap_or_else(|| panic!("{instance}")).parse().unwrap();
    (created.parse().unwrap(), u64::try_from(renewed.as_nanosecond()).unwrap())
}

fn saw(instance: &Value) -> Step {
    let (created, renewed) = seen(instance);
    Step::Saw { created, renewed }
}

/// One call, and what its answer says.
fn act(client: &mut Client, challenge: &str, source: &str, dice: u64, number: u64) -> Vec<Step> {
    let path = format!("/api/v1/instance/{challenge}/{source}");
    let unknown = |reply: Reply, steps: &[Step]| match reply {
        // Given up before anything was recorded.
        Reply::Said(503, body) if ["CONFLICT", "BUSY"].iter().any(|code| body.to_string().contains(code)) => Vec::new(),
        Reply::Said(503, _) | Reply::Nothing(_) => {
            steps.iter().map(|step| Step::Maybe(Box::new(step.clone()))).collect()
        }
        Reply::Said(status, body) => panic!("{path}: {status} {body}"),
    };
    match dice {
        0..=29 => {
            let create = json!({
                "challengeId": challenge, "sourceId": source, "additional": { "call": number.to_string() }
            });
            match client.ask("POST", "/api/v1/instance", &create) {
                Reply::Said(200, instance) => {
                    let (created, renewed) = seen(&instance);
                    assert_eq!(created, number, "{instance}");
                    vec![Step::Take(number), Step::Show(number, Some(renewed))]
                }
                Reply::Said(409, _) => vec![Step::Taken],
                reply => unknown(reply, &[Step::Take(number), Step::Show(number, None), Step::GiveBack(number)]),
            }
        }
        30..=49 => match client.ask("DELETE", &path, &Value::Null) {
            Reply::Said(200, _) => vec![Step::Remove],
            Reply::Said(404, _) => vec![Step::Free],
            reply => unknown(reply, &[Step::Remove]),
        },
        50..=69 => match client.ask("PATCH", &path, &json!({})) {
            Reply::Said(200, instance) => {
                let (created, renewed) = seen(&instance);
                vec![Step::Renewed { created, renewed }]
            }
            Reply::Said(404, _) => vec![Step::NotShown],
            reply => unknown(reply, &[Step::RenewedUnseen]),
        },
        _ => match client.ask("GET", &path, &Value::Null) {
            Reply::Said(200, instance) => vec![saw(&instance)],
            Reply::Said(404, _) => vec![Step::NotShown],
            reply => unknown(reply, &[]),
        },
    }
}

/// Records what four clients see of one seat, each over the managers in turn.
fn record(urls: &[String], run: u64) -> History {
    let (challenge, source) = (["plain", "pooled"][run as usize % 2], format!("source-{run}"));
    let history = Mutex::new(History::default());
    std::thread::scope(|scope| {
        for at in 0..CLIENTS {
            let (source, history) = (&source, &history);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(run * CLIENTS as u64 + at as u64);
                let mut client = Client::new(urls, at);
                for _ in 0..CALLS {
                    let (dice, number) = (rng.random_range(0..100), next());
                    history.lock().unwrap().called(number);
                    let steps = act(&mut client, challenge, source, dice, number);
                    history.lock().unwrap().answered(number, steps);
                }
            });
        }
    });
    // At last somebody sees what is left, and removes it.
    let (mut history, mut client, number) = (history.into_inner().unwrap(), Client::new(urls, 0), next());
    let path = format!("/api/v1/instance/{challenge}/{source}");
    history.called(number);
    let last = match client.insist("GET", &path, &Value::Null).unwrap() {
        (200, instance) => saw(&instance),
        (404, _) => Step::NotShown,
        (status, body) => panic!("{path}: {status} {body}"),
    };
    history.answered(number, vec![last]);
    let (status, body) = client.insist("DELETE", &path, &Value::Null).unwrap();
    assert!(matches!(status, 200 | 404), "{path}: {status} {body}");
    history
}

/// What was recorded.
#[derive(Default)]
struct Recorded {
    histories: AtomicUsize,
    unknown: AtomicUsize,
    overlaps: AtomicUsize,
}

/// Records and checks so many histories, and more until `over`.
fn check(urls: &[String], recorded: &Recorded, over: &AtomicBool) {
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while begun.fetch_add(1, Ordering::Relaxed) < HISTORIES || !over.load(Ordering::Relaxed) {
                    let run = next();
                    let history = record(urls, run);
                    assert!(history.is_linearizable(), "history {run} has no order that explains it:\n{history}");
                    recorded.histories.fetch_add(1, Ordering::Relaxed);
                    recorded.unknown.fetch_add(history.unknown(), Ordering::Relaxed);
                    recorded.overlaps.fetch_add(history.overlaps(), Ordering::Relaxed);
                }
            });
        }
    });
}

#[test]
fn histories_of_managers_are_linearizable() {
    let environment = [("ETCD_DEADLINE", "1500ms")];
    let mut cluster = Cluster::start(3, &Between::Loopback, &[]).with_managers_of(REPLICAS, &environment);
    let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
    cluster.managers[0].create_challenge("plain", &quick(), &json!({ "timeout": "600s" }));
    cluster.managers[0].create_challenge("pooled", &quick(), &json!({ "timeout": "600s", "min": "2" }));
    let (calm, faults, over) = (Recorded::default(), Recorded::default(), AtomicBool::new(true));
    check(&urls, &calm, &over);
    assert_eq!(calm.unknown.load(Ordering::Relaxed), 0, "without a fault every outcome is known");
    over.store(false, Ordering::Relaxed);
    std::thread::scope(|scope| {
        // However this ends, the clients do too.
        let stopping = Stopping(&over);
        scope.spawn(|| check(&urls, &faults, &over));
        let lasting = LEASE_TTL + LEASE_TTL / 2;
        for at in 0..REPLICAS {
            let manager = &mut cluster.managers[at].process;
            manager.kill().unwrap();
            manager.start().unwrap();
            let member = if at == 0 { cluster.leader() } else { cluster.follower() };
            cluster.members[member].process.kill().unwrap();
            cluster.members[member].process.start().unwrap();
            let paused = &cluster.managers[(at + 1) % REPLICAS].process;
            paused.signal(Signal::STOP);
            std::thread::sleep(lasting);
            paused.signal(Signal::CONT);
        }
        drop(stopping);
    });
    cluster.at_rest();
    for (name, recorded) in [("calm", &calm), ("under faults", &faults)] {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let histories = count(&recorded.histories);
        println!(
            "{name}: {histories} histories of {} calls each are linearizable; {} calls began while another of the same seat was under \
             way; {} outcomes were unknown",
            CLIENTS * CALLS,
            count(&recorded.overlaps),
            count(&recorded.unknown),
        );
        assert!(histories >= HISTORIES && count(&recorded.overlaps) > histories * CALLS, "clients met");
    }
    assert!(faults.unknown.load(Ordering::Relaxed) > 0, "faults were felt");
}
