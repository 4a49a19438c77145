//! Concurrent calls for one instance are linearizable, with real managers on an etcd cluster of three members.
//!
//! Records and checks histories as `linear` does within one process. Half of the histories run while managers and members are killed and
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
    cluster::{Cluster, LEASE_TTL, NetworkMode},
    load::{Client, Reply, StopOnDrop},
    scenario::quick_scenario,
};
use crate::linear::model::{History, Step};

/// The minimum number of histories, without and with faults each.
const HISTORIES: usize = 40;
const CONCURRENT_HISTORIES: usize = 4;
const CLIENTS: usize = 4;
const CALLS: usize = 7;
const REPLICAS: usize = 3;

/// Numbers the calls. A create stores its number as a setting of the instance, so that readers know which call created it.
static NEXT: AtomicU64 = AtomicU64::new(1);

fn next() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns the call that created the instance, and the time of its last renewal.
fn seen(instance: &Value) -> (u64, u64) {
    let created = instance["additional"]["call"].as_str().unwrap_or_else(|| panic!("{instance}"));
    let renewed: Timestamp = instance["lastRenew"].as_str().unwrap_or_else(|| panic!("{instance}")).parse().unwrap();
    (created.parse().unwrap(), u64::try_from(renewed.as_nanosecond()).unwrap())
}

fn saw(instance: &Value) -> Step {
    let (created, renewed) = seen(instance);
    Step::Saw { created, renewed }
}

/// Makes one call and returns the steps that its answer implies.
fn act(client: &mut Client, challenge: &str, source: &str, choice: u64, number: u64) -> Vec<Step> {
    let path = format!("/api/v1/instance/{challenge}/{source}");
    let unknown = |reply: Reply, steps: &[Step]| match reply {
        // The call gave up before it wrote anything.
        Reply::Response(503, body) if ["CONFLICT", "BUSY"].iter().any(|code| body.to_string().contains(code)) => {
            Vec::new()
        }
        Reply::Response(503, _) | Reply::NoResponse(_) => {
            steps.iter().map(|step| Step::Maybe(Box::new(step.clone()))).collect()
        }
        Reply::Response(status, body) => panic!("{path}: {status} {body}"),
    };
    match choice {
        0..=29 => {
            let create = json!({
                "challengeId": challenge, "sourceId": source, "additional": { "call": number.to_string() }
            });
            match client.call("POST", "/api/v1/instance", &create) {
                Reply::Response(200, instance) => {
                    let (created, renewed) = seen(&instance);
                    assert_eq!(created, number, "{instance}");
                    vec![Step::Take(number), Step::Show(number, Some(renewed))]
                }
                Reply::Response(409, _) => vec![Step::Taken],
                reply => unknown(reply, &[Step::Take(number), Step::Show(number, None), Step::GiveBack(number)]),
            }
        }
        30..=49 => match client.call("DELETE", &path, &Value::Null) {
            Reply::Response(200, _) => vec![Step::Remove],
            Reply::Response(404, _) => vec![Step::Free],
            reply => unknown(reply, &[Step::Remove]),
        },
        50..=69 => match client.call("PATCH", &path, &json!({})) {
            Reply::Response(200, instance) => {
                let (created, renewed) = seen(&instance);
                vec![Step::Renewed { created, renewed }]
            }
            Reply::Response(404, _) => vec![Step::NotShown],
            reply => unknown(reply, &[Step::RenewedUnseen]),
        },
        _ => match client.call("GET", &path, &Value::Null) {
            Reply::Response(200, instance) => vec![saw(&instance)],
            Reply::Response(404, _) => vec![Step::NotShown],
            reply => unknown(reply, &[]),
        },
    }
}

/// Records a history: several clients call for one instance, each using the managers in turn.
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
                    let (choice, number) = (rng.random_range(0..100), next());
                    history.lock().unwrap().called(number);
                    let steps = act(&mut client, challenge, source, choice, number);
                    history.lock().unwrap().answered(number, steps);
                }
            });
        }
    });
    // The last read fixes the final state; then the instance is removed.
    let (mut history, mut client, number) = (history.into_inner().unwrap(), Client::new(urls, 0), next());
    let path = format!("/api/v1/instance/{challenge}/{source}");
    history.called(number);
    let last = match client.call_until_available("GET", &path, &Value::Null).unwrap() {
        (200, instance) => saw(&instance),
        (404, _) => Step::NotShown,
        (status, body) => panic!("{path}: {status} {body}"),
    };
    history.answered(number, vec![last]);
    let (status, body) = client.call_until_available("DELETE", &path, &Value::Null).unwrap();
    assert!(matches!(status, 200 | 404), "{path}: {status} {body}");
    history
}

/// Totals of the recorded histories.
#[derive(Default)]
struct Recorded {
    histories: AtomicUsize,
    unknown: AtomicUsize,
    overlaps: AtomicUsize,
}

/// Records and checks [`HISTORIES`] histories, and more until `stop` is set.
fn check(urls: &[String], recorded: &Recorded, stop: &AtomicBool) {
    let started = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENT_HISTORIES {
            scope.spawn(|| {
                while started.fetch_add(1, Ordering::Relaxed) < HISTORIES || !stop.load(Ordering::Relaxed) {
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
    let mut cluster = Cluster::start(3, &NetworkMode::Loopback, &[]).with_managers_and_env(REPLICAS, &environment);
    let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
    cluster.managers[0].create_challenge("plain", &quick_scenario(), &json!({ "timeout": "600s" }));
    cluster.managers[0].create_challenge("pooled", &quick_scenario(), &json!({ "timeout": "600s", "min": "2" }));
    let (calm, faults, stop) = (Recorded::default(), Recorded::default(), AtomicBool::new(true));
    check(&urls, &calm, &stop);
    assert_eq!(calm.unknown.load(Ordering::Relaxed), 0, "outcomes are unknown although there was no fault");
    stop.store(false, Ordering::Relaxed);
    std::thread::scope(|scope| {
        // Stops the clients even if a fault panics.
        let stop_on_drop = StopOnDrop(&stop);
        scope.spawn(|| check(&urls, &faults, &stop));
        let pause = LEASE_TTL + LEASE_TTL / 2;
        for at in 0..REPLICAS {
            let manager = &mut cluster.managers[at].process;
            manager.kill().unwrap();
            manager.start().unwrap();
            let member = if at == 0 { cluster.leader() } else { cluster.follower() };
            cluster.members[member].process.kill().unwrap();
            cluster.members[member].process.start().unwrap();
            let paused = &cluster.managers[(at + 1) % REPLICAS].process;
            paused.signal(Signal::STOP);
            std::thread::sleep(pause);
            paused.signal(Signal::CONT);
        }
        drop(stop_on_drop);
    });
    cluster.assert_settled();
    for (name, recorded) in [("without faults", &calm), ("with faults", &faults)] {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let histories = count(&recorded.histories);
        println!(
            "{name}: {histories} histories of {} calls each are linearizable; {} calls overlapped another call for the same instance; \
             {} outcomes were unknown",
            CLIENTS * CALLS,
            count(&recorded.overlaps),
            count(&recorded.unknown),
        );
        assert!(histories >= HISTORIES && count(&recorded.overlaps) > histories * CALLS, "too few calls overlapped");
    }
    assert!(faults.unknown.load(Ordering::Relaxed) > 0, "no fault affected a call");
}
