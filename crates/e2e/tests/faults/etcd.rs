//! The effects of each kind of etcd failure on callers and on health, and the recovery, always without restarting a manager.

use std::{collections::BTreeSet, sync::atomic::AtomicBool, time::Duration};

use gauntlet_coordination::kv::{KeyRange, Kv as _, Op, Txn};
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    cluster::{Between, Cluster, length_of_log, post, said_since},
    load::{Client, Driver, Ledger, Reply, race},
    scenario::{Gate, gated, quick},
};
use crate::harness::{Manager, SOON, eventually};

/// `grpc.health.v1`'s SERVING and NOT_SERVING.
const SERVING: i32 = 1;
const NOT_SERVING: i32 = 2;

fn health(cluster: &Cluster, manager: &Manager) -> i32 {
    cluster.world.runtime.block_on(async {
        let mut client = HealthClient::new(manager.channel().await);
        client.check(HealthCheckRequest::default()).await.unwrap().into_inner().status
    })
}

fn wait_for_health(cluster: &Cluster, manager: &Manager, wanted: i32) {
    eventually("the expected health is reported", || {
        let (told, status) = (health(cluster, manager), manager.get("/healthcheck").status);
        let expected = if wanted == SERVING { 200 } else { 503 };
        if (told, status) == (wanted, expected) { Ok(()) } else { Err(format!("{told}, {status}")) }
    });
}

/// Asserts that the call failed with UNAVAILABLE, and not by the caller's own timeout.
fn assert_unavailable(answer: &Reply) {
    match answer {
        Reply::Said(503, body) => assert_eq!(body["code"], 14, "{body}"),
        Reply::Said(status, body) => panic!("{status} {body}"),
        Reply::Nothing(why) => panic!("no answer: {why}"),
    }
}

fn wait_until_created(client: &mut Client, challenge: &str, source: &str) {
    eventually("a create succeeds", || match client.create(challenge, source) {
        // 409 is a success, too: an earlier attempt may have taken effect after it timed out.
        Reply::Said(200 | 409, _) => Ok(()),
        Reply::Said(status, body) => Err(format!("{status} {body}")),
        Reply::Nothing(why) => Err(why),
    });
}

/// The number of calls under way at once under load: one of the driver, and one of a racer for each of three managers.
const AT_ONCE: u64 = 4;

/// Runs clients until `faults` returns, then compares the results with the store.
fn under_load(cluster: &Cluster, ledger: &Ledger, faults: impl FnOnce()) {
    let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
    // The ids of this run are unique, and so are its sources.
    let run: u32 = rand::random();
    let mut driver = Driver::new(&format!("driver-{run}"), &urls, run.into());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stopping = super::load::Stopping(&stop);
        scope.spawn(|| driver.drive(ledger, &stop));
        scope.spawn(|| race(&urls, ledger, &stop, run as usize));
        faults();
        drop(stopping);
    });
    cluster.at_rest();
    driver.hold(ledger, &urls);
    ledger.assert_kept();
}

fn with_challenges(cluster: Cluster) -> Cluster {
    let manager = &cluster.managers[0];
    manager.create_challenge("plain", &quick(), &json!({ "timeout": "600s" }));
    manager.create_challenge("pooled", &quick(), &json!({ "timeout": "600s", "min": "2" }));
    manager.create_challenge("gated", &gated(), &json!({}));
    cluster
}

#[test]
fn calls_fail_in_time_and_health_reports_a_frozen_etcd() {
    let cluster = with_challenges(Cluster::start(1, &Between::Loopback, &[]).with_managers(1));
    let manager = &cluster.managers[0];
    manager.create_instance("plain", "before").ok();
    wait_for_health(&cluster, manager, SERVING);
    let process = manager.process.id();
    cluster.members[0].process.signal(Signal::STOP);
    let client = || Client::new(std::slice::from_ref(&manager.url), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_unavailable(&client().create("plain", "during")));
        scope.spawn(|| assert_unavailable(&client().ask("GET", "/api/v1/instance/plain/before", &Value::Null)));
        scope.spawn(|| assert_unavailable(&client().ask("PATCH", "/api/v1/instance/plain/before", &json!({}))));
        scope.spawn(|| assert_unavailable(&client().ask("DELETE", "/api/v1/challenge/pooled", &Value::Null)));
    });
    wait_for_health(&cluster, manager, NOT_SERVING);
    cluster.members[0].process.signal(Signal::CONT);
    wait_for_health(&cluster, manager, SERVING);
    manager.get("/api/v1/instance/plain/before").ok();
    wait_until_created(&mut client(), "plain", "after");
    assert_eq!(manager.process.id(), process, "without a restart");
    let census = cluster.at_rest();
    assert!(census.contains_key("plain s before") && census.contains_key("plain s after"), "{census:?}");
}

#[test]
fn leader_changes_under_load_lose_nothing() {
    let cluster = with_challenges(Cluster::start(3, &Between::Loopback, &[]).with_managers(2));
    let ledger = Ledger::default();
    under_load(&cluster, &ledger, || {
        for _ in 0..4 {
            let (leader, follower) = (cluster.leader(), cluster.follower());
            eventually("leadership is handed over", || {
                if cluster.leader() != leader {
                    return Ok(());
                }
                let status = post(&cluster.members[follower].url, "/v3/maintenance/status", &json!({}))?;
                let target = json!({ "targetID": status["header"]["member_id"] });
                post(&cluster.members[leader].url, "/v3/maintenance/transfer-leadership", &target).map(|_| ())
            });
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    println!("4 changes of leader, {ledger}");
}

/// Each manager talks to another member: one of them to the one that is lost. What was asked of that one just then may fail.
#[test]
fn losing_one_member_of_three_fails_no_later_call() {
    let cluster = with_challenges(Cluster::start(3, &Between::Loopback, &[]).with_managers(3));
    let ledger = Ledger::default();
    let acknowledged_more = |more| {
        let before = ledger.acknowledged();
        eventually("calls are answered", || {
            if ledger.acknowledged() >= before + more { Ok(()) } else { Err(ledger.to_string()) }
        });
    };
    under_load(&cluster, &ledger, || {
        acknowledged_more(30);
        assert_eq!(ledger.failed(), 0, "all members are there");
        cluster.members[cluster.follower()].process.signal(Signal::KILL);
        // By then the calls that were under way are answered, at each manager.
        acknowledged_more(30);
        let failed = ledger.failed();
        assert!(failed <= AT_ONCE, "{failed} calls failed");
        acknowledged_more(100);
        assert_eq!(ledger.failed(), failed, "a later call has failed");
    });
    println!("1 member of 3 lost, {ledger}");
}

#[test]
fn compaction_fails_no_call() {
    // No lease runs out here, and no patience: what fails would fail by the compaction.
    let environment = [("LEASE_TTL", "60s"), ("ETCD_DEADLINE", "30s")];
    let cluster = Cluster::start(1, &Between::Loopback, &[]).with_managers_of(2, &environment);
    let mut cluster = with_challenges(cluster);
    let compact = |cluster: &Cluster| {
        let url = &cluster.members[0].url;
        let status = post(url, "/v3/maintenance/status", &json!({})).unwrap();
        let revision = &status["header"]["revision"];
        // One at which it is compacted already is refused, and as good.
        let _ = post(url, "/v3/kv/compaction", &json!({ "revision": revision, "physical": true }));
    };
    let ledger = Ledger::default();
    // The racers wait for each other by the watch.
    under_load(&cluster, &ledger, || {
        for _ in 0..40 {
            compact(&cluster);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert_eq!(ledger.failed(), 0, "no call fails: {ledger}");
    println!("40 compactions, {ledger}");
    // And where the watch cannot go on from where it was.
    cluster.members[0].process.kill().unwrap();
    cluster.members[0].process.start().unwrap();
    cluster.at_rest();
    compact(&cluster);
    let ledger = Ledger::default();
    under_load(&cluster, &ledger, || std::thread::sleep(Duration::from_secs(1)));
    assert_eq!(ledger.failed(), 0, "no call fails: {ledger}");
}

#[test]
fn managers_recover_from_an_etcd_that_lost_all_leases() {
    let mut cluster = with_challenges(Cluster::start(1, &Between::Loopback, &[]).with_managers(2));
    let url = cluster.managers[0].url.clone();
    let caller = std::thread::spawn(move || Client::new(&[url], 0).patient(2 * SOON).create("gated", "a"));
    eventually("it is being brought up", || cluster.owner("gated", "a")?.ok_or_else(|| "nobody owns it".to_owned()));
    cluster.members[0].process.kill().unwrap();
    cluster.members[0].process.start().unwrap();
    let leases = || {
        let listed = post(&cluster.members[0].url, "/v3/lease/leases", &json!({}))?;
        let listed = listed["leases"].as_array().into_iter().flatten();
        Ok::<_, String>(listed.filter_map(|lease| lease["ID"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>())
    };
    let revoked = eventually("leases are listed", leases);
    for lease in &revoked {
        // One that has run out meanwhile is as good as revoked.
        let _ = post(&cluster.members[0].url, "/v3/lease/revoke", &json!({ "ID": lease }));
    }
    eventually("each manager has noticed, and has another", || {
        let others = leases()?.difference(&revoked).count();
        if others >= cluster.managers.len() { Ok(()) } else { Err(format!("{others} have")) }
    });
    Gate::of(&cluster.world).open();
    // Whatever its caller was told, the instance is recorded: some manager has finished it.
    let answer = caller.join().unwrap();
    assert!(matches!(answer, Reply::Said(200 | 503, _)));
    let census = cluster.at_rest();
    assert!(census.contains_key("gated s a"), "{census:?}");
    for manager in &cluster.managers {
        wait_until_created(&mut Client::new(std::slice::from_ref(&manager.url), 0), "plain", "after");
    }
    under_load(&cluster, &Ledger::default(), || std::thread::sleep(Duration::from_secs(1)));
}

#[test]
fn full_etcd_serves_reads_and_resumes_writes_when_space_is_freed() {
    let cluster =
        with_challenges(Cluster::start(1, &Between::Loopback, &["--quota-backend-bytes=4194304"]).with_managers(1));
    let manager = &cluster.managers[0];
    manager.create_instance("plain", "before").ok();
    cluster.at_rest();
    let length = length_of_log(manager);
    let put = |number: usize| {
        let success = vec![Op::put(format!("filler {number:04}"), vec![b'x'; 256 * 1024])];
        cluster.world.runtime.block_on(cluster.store.txn(Txn { success, ..Txn::default() }))
    };
    assert!((0..100).any(|number| put(number).is_err()), "etcd fills up");
    let mut client = Client::new(std::slice::from_ref(&manager.url), 0);
    let before = "/api/v1/instance/plain/before";
    assert_unavailable(&client.create("plain", "during"));
    assert_unavailable(&client.ask("PATCH", before, &json!({})));
    assert_unavailable(&client.ask("DELETE", before, &Value::Null));
    manager.get(before).ok();
    assert_eq!(manager.get("/api/v1/instance").lines().len(), 1);
    assert_eq!(manager.get("/api/v1/challenge").lines().len(), 3);
    let said = said_since(manager, length);
    assert!(said.contains("out of space") && said.contains("disarm"), "the operator is told what to do:\n{said}");

    let success = vec![Op::Delete(KeyRange::between("filler ", "filler!"))];
    cluster.world.runtime.block_on(cluster.store.txn(Txn { success, ..Txn::default() })).unwrap();
    let status = post(&cluster.members[0].url, "/v3/maintenance/status", &json!({})).unwrap();
    cluster.etcdctl(&["compaction", status["header"]["revision"].as_str().unwrap(), "--physical"]);
    cluster.etcdctl(&["defrag"]);
    cluster.etcdctl(&["alarm", "disarm"]);
    wait_until_created(&mut client, "plain", "after");
    manager.patch(before, &json!({})).ok();
    let census = cluster.at_rest();
    assert!(census.contains_key("plain s before") && !census.contains_key("plain s during"), "{census:?}");
}
