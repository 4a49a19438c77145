//! How each kind of etcd failure affects callers and health checks. Managers recover from all of them without a restart.

use std::{collections::BTreeSet, sync::atomic::AtomicBool, time::Duration};

use gauntlet_coordination::kv::{KeyRange, Kv as _, Op, Txn};
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    cluster::{Cluster, NetworkMode, log_length, log_since, post},
    load::{Client, Driver, Ledger, Reply, race},
    scenario::{Gate, gated_scenario, quick_scenario},
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
        let (reported, status) = (health(cluster, manager), manager.get("/healthcheck").status);
        let expected = if wanted == SERVING { 200 } else { 503 };
        if (reported, status) == (wanted, expected) {
            Ok(())
        } else {
            Err(format!("gRPC health {reported}, HTTP status {status}"))
        }
    });
}

/// Asserts that the call failed with UNAVAILABLE before the client's own timeout.
fn assert_unavailable(answer: &Reply) {
    match answer {
        Reply::Response(503, body) => assert_eq!(body["code"], 14, "{body}"),
        Reply::Response(status, body) => panic!("{status} {body}"),
        Reply::NoResponse(why) => panic!("no answer: {why}"),
    }
}

fn wait_until_created(client: &mut Client, challenge: &str, source: &str) {
    eventually("a create succeeds", || match client.create(challenge, source) {
        // 409 is a success, too: an earlier attempt may have succeeded after it timed out.
        Reply::Response(200 | 409, _) => Ok(()),
        Reply::Response(status, body) => Err(format!("{status} {body}")),
        Reply::NoResponse(why) => Err(why),
    });
}

/// The number of concurrent calls under load: one from the driver, and one for each of three managers from the race.
const CONCURRENT_CALLS: u64 = 4;

/// Runs clients until `faults` returns, then compares the acknowledged operations with the store.
fn under_load(cluster: &Cluster, ledger: &Ledger, faults: impl FnOnce()) {
    let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
    // A ledger may see several runs, so each run needs its own sources.
    let run: u32 = rand::random();
    let mut driver = Driver::new(&format!("driver-{run}"), &urls, run.into());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop_on_drop = super::load::StopOnDrop(&stop);
        scope.spawn(|| driver.drive(ledger, &stop));
        scope.spawn(|| race(&urls, ledger, &stop, run as usize));
        faults();
        drop(stop_on_drop);
    });
    cluster.assert_settled();
    driver.verify(ledger, &urls);
    ledger.assert_no_violations();
}

fn with_challenges(cluster: Cluster) -> Cluster {
    let manager = &cluster.managers[0];
    manager.create_challenge("plain", &quick_scenario(), &json!({ "timeout": "600s" }));
    manager.create_challenge("pooled", &quick_scenario(), &json!({ "timeout": "600s", "min": "2" }));
    manager.create_challenge("gated", &gated_scenario(), &json!({}));
    cluster
}

#[test]
fn calls_fail_in_time_and_health_reports_a_frozen_etcd() {
    let cluster = with_challenges(Cluster::start(1, &NetworkMode::Loopback, &[]).with_managers(1));
    let manager = &cluster.managers[0];
    manager.create_instance("plain", "before").ok();
    wait_for_health(&cluster, manager, SERVING);
    let process = manager.process.id();
    cluster.members[0].process.signal(Signal::STOP);
    let client = || Client::new(std::slice::from_ref(&manager.url), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_unavailable(&client().create("plain", "during")));
        scope.spawn(|| assert_unavailable(&client().call("GET", "/api/v1/instance/plain/before", &Value::Null)));
        scope.spawn(|| assert_unavailable(&client().call("PATCH", "/api/v1/instance/plain/before", &json!({}))));
        scope.spawn(|| assert_unavailable(&client().call("DELETE", "/api/v1/challenge/pooled", &Value::Null)));
    });
    wait_for_health(&cluster, manager, NOT_SERVING);
    cluster.members[0].process.signal(Signal::CONT);
    wait_for_health(&cluster, manager, SERVING);
    manager.get("/api/v1/instance/plain/before").ok();
    wait_until_created(&mut client(), "plain", "after");
    assert_eq!(manager.process.id(), process, "the manager was restarted");
    let census = cluster.assert_settled();
    assert!(census.contains_key("plain s before") && census.contains_key("plain s after"), "{census:?}");
}

#[test]
fn leader_changes_under_load_lose_nothing() {
    let cluster = with_challenges(Cluster::start(3, &NetworkMode::Loopback, &[]).with_managers(2));
    let ledger = Ledger::default();
    under_load(&cluster, &ledger, || {
        for _ in 0..4 {
            let (leader, follower) = (cluster.leader(), cluster.follower());
            eventually("leadership is transferred", || {
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
    println!("4 leader changes, {ledger}");
}

/// Each manager uses a different member. Calls in flight to the killed member may fail.
#[test]
fn losing_one_member_of_three_fails_no_later_call() {
    let cluster = with_challenges(Cluster::start(3, &NetworkMode::Loopback, &[]).with_managers(3));
    let ledger = Ledger::default();
    let wait_for_acknowledged = |count| {
        let before = ledger.acknowledged();
        eventually("more calls are acknowledged", || {
            if ledger.acknowledged() >= before + count { Ok(()) } else { Err(ledger.to_string()) }
        });
    };
    under_load(&cluster, &ledger, || {
        wait_for_acknowledged(30);
        assert_eq!(ledger.failed(), 0, "calls failed although all members are up");
        cluster.members[cluster.follower()].process.signal(Signal::KILL);
        // After these, no call that was in flight during the kill is left.
        wait_for_acknowledged(30);
        let failed = ledger.failed();
        assert!(failed <= CONCURRENT_CALLS, "{failed} calls failed");
        wait_for_acknowledged(100);
        assert_eq!(ledger.failed(), failed, "a later call failed");
    });
    println!("1 member of 3 lost, {ledger}");
}

#[test]
fn compaction_fails_no_call() {
    // Leases and deadlines are long, so only the compaction can make a call fail.
    let environment = [("LEASE_TTL", "60s"), ("ETCD_DEADLINE", "30s")];
    let cluster = Cluster::start(1, &NetworkMode::Loopback, &[]).with_managers_and_env(2, &environment);
    let mut cluster = with_challenges(cluster);
    let compact = |cluster: &Cluster| {
        let url = &cluster.members[0].url;
        let status = post(url, "/v3/maintenance/status", &json!({})).unwrap();
        let revision = &status["header"]["revision"];
        // Fails only if the store is already compacted at this revision.
        let _ = post(url, "/v3/kv/compaction", &json!({ "revision": revision, "physical": true }));
    };
    let ledger = Ledger::default();
    // The racing clients wait for each other's locks, which uses the watch.
    under_load(&cluster, &ledger, || {
        for _ in 0..40 {
            compact(&cluster);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert_eq!(ledger.failed(), 0, "calls failed: {ledger}");
    println!("40 compactions, {ledger}");
    // After a restart the watch cannot resume, because its revision has been compacted.
    cluster.members[0].process.kill().unwrap();
    cluster.members[0].process.start().unwrap();
    cluster.assert_settled();
    compact(&cluster);
    let ledger = Ledger::default();
    under_load(&cluster, &ledger, || std::thread::sleep(Duration::from_secs(1)));
    assert_eq!(ledger.failed(), 0, "calls failed: {ledger}");
}

#[test]
fn managers_recover_from_an_etcd_that_lost_all_leases() {
    let mut cluster = with_challenges(Cluster::start(1, &NetworkMode::Loopback, &[]).with_managers(2));
    let url = cluster.managers[0].url.clone();
    let caller = std::thread::spawn(move || Client::new(&[url], 0).with_deadline(2 * SOON).create("gated", "a"));
    eventually("a manager owns the instance", || {
        cluster.owner("gated", "a")?.ok_or_else(|| "no manager owns it".to_owned())
    });
    cluster.members[0].process.kill().unwrap();
    cluster.members[0].process.start().unwrap();
    let leases = || {
        let listed = post(&cluster.members[0].url, "/v3/lease/leases", &json!({}))?;
        let listed = listed["leases"].as_array().into_iter().flatten();
        Ok::<_, String>(listed.filter_map(|lease| lease["ID"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>())
    };
    let revoked = eventually("leases are listed", leases);
    for lease in &revoked {
        // Fails only if the lease has expired meanwhile.
        let _ = post(&cluster.members[0].url, "/v3/lease/revoke", &json!({ "ID": lease }));
    }
    eventually("each manager has a new lease", || {
        let new = leases()?.difference(&revoked).count();
        if new >= cluster.managers.len() { Ok(()) } else { Err(format!("{new} new leases")) }
    });
    Gate::of(&cluster.world).open();
    // The intent is recorded, so some manager finishes the instance whether or not the call succeeded.
    let answer = caller.join().unwrap();
    assert!(matches!(answer, Reply::Response(200 | 503, _)));
    let census = cluster.assert_settled();
    assert!(census.contains_key("gated s a"), "{census:?}");
    for manager in &cluster.managers {
        wait_until_created(&mut Client::new(std::slice::from_ref(&manager.url), 0), "plain", "after");
    }
    under_load(&cluster, &Ledger::default(), || std::thread::sleep(Duration::from_secs(1)));
}

#[test]
fn full_etcd_serves_reads_and_resumes_writes_when_space_is_freed() {
    let cluster =
        with_challenges(Cluster::start(1, &NetworkMode::Loopback, &["--quota-backend-bytes=4194304"]).with_managers(1));
    let manager = &cluster.managers[0];
    manager.create_instance("plain", "before").ok();
    cluster.assert_settled();
    let length = log_length(manager);
    let put = |number: usize| {
        let success = vec![Op::put(format!("filler {number:04}"), vec![b'x'; 256 * 1024])];
        cluster.world.runtime.block_on(cluster.store.txn(Txn { success, ..Txn::default() }))
    };
    assert!((0..100).any(|number| put(number).is_err()), "etcd did not fill up");
    let mut client = Client::new(std::slice::from_ref(&manager.url), 0);
    let before = "/api/v1/instance/plain/before";
    assert_unavailable(&client.create("plain", "during"));
    assert_unavailable(&client.call("PATCH", before, &json!({})));
    assert_unavailable(&client.call("DELETE", before, &Value::Null));
    manager.get(before).ok();
    assert_eq!(manager.get("/api/v1/instance").lines().len(), 1);
    assert_eq!(manager.get("/api/v1/challenge").lines().len(), 3);
    let log = log_since(manager, length);
    assert!(log.contains("out of space") && log.contains("disarm"), "the log does not say what to do:\n{log}");

    let success = vec![Op::Delete(KeyRange::between("filler ", "filler!"))];
    cluster.world.runtime.block_on(cluster.store.txn(Txn { success, ..Txn::default() })).unwrap();
    let status = post(&cluster.members[0].url, "/v3/maintenance/status", &json!({})).unwrap();
    cluster.etcdctl(&["compaction", status["header"]["revision"].as_str().unwrap(), "--physical"]);
    cluster.etcdctl(&["defrag"]);
    cluster.etcdctl(&["alarm", "disarm"]);
    wait_until_created(&mut client, "plain", "after");
    manager.patch(before, &json!({})).ok();
    let census = cluster.assert_settled();
    assert!(census.contains_key("plain s before") && !census.contains_key("plain s during"), "{census:?}");
}
