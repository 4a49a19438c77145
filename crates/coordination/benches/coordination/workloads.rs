//! The measured workloads: locks, creates, renewals and listings.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, TryStreamExt as _};
use gauntlet_coordination::{Coordination, kv::Kv};
use gauntlet_domain::{Additional, ChallengeId, Gauntlet, LockKind, LockOptions, Store as _};
use gauntlet_testing::fixtures::{challenge_id, new_challenge, source_id};
use jiff::Timestamp;

use crate::{
    measure::{Row, Workload, compare, run},
    noop::{call_now, gauntlet},
    store::{self, Backend, MeasuredStore},
};

/// Longer than any lock takes here.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Measures the rows whose name starts with `only`; `time` per row for each of the two workloads.
pub(crate) async fn all(backend: Backend, time: Duration, only: &str) -> Vec<Row> {
    match backend {
        Backend::Etcd => rows(&store::etcd().await, time, only).await,
        // The targets apply to etcd only.
        Backend::Embedded => {
            let rows = rows(&store::embedded().await, time, only).await;
            rows.into_iter().map(|row| Row { target: None, ..row }).collect()
        }
    }
}

async fn rows<K: Kv>(measured: &MeasuredStore<K>, time: Duration, only: &str) -> Vec<Row> {
    let store = &measured.store;
    let gauntlet = gauntlet(store.clone());
    for at in 0..CHALLENGES {
        gauntlet.create_challenge(&call_now(), new_challenge(challenge(at).as_str(), 0)).await.expect("a challenge");
    }
    let measures = [
        ("lock cycle", 1, Some(0.28), lock(store, Contention::None)),
        ("lock cycle", 64, Some(0.45), lock(store, Contention::None)),
        ("create", 1, Some(0.40), create(&gauntlet)),
        ("create", 64, Some(0.30), create(&gauntlet)),
        ("hand-over", 64, Some(0.20), lock(store, Contention::Shared)),
        ("renew", 64, None, renew(&gauntlet)),
        ("create and delete", 64, None, create_and_delete(&gauntlet)),
    ];
    let mut rows = Vec::new();
    for (name, clients, target, ours) in measures {
        if name.starts_with(only) {
            rows.push(compare(name, clients, target, time, ours, measured.raw.clone()).await);
        }
    }
    rows
}

/// Whether clients contend for a lock.
#[derive(Clone, Copy)]
enum Contention {
    /// Each client has its own lock.
    None,
    /// All clients share one lock.
    Shared,
}

/// Acquires and releases a lock.
fn lock<K: Kv>(store: &Arc<Coordination<K>>, contention: Contention) -> Workload {
    let store = store.clone();
    Arc::new(move |client, _| {
        let store = store.clone();
        async move {
            let id = match contention {
                Contention::None => challenge_id(&format!("lock-{client}")),
                Contention::Shared => challenge_id("lock"),
            };
            let options = LockOptions { traceparent: None, timeout: LOCK_TIMEOUT };
            let guard = store.lock(LockKind::Challenge, &id, &options).await.expect("a lock");
            guard.release().await.expect("a release");
        }
        .boxed()
    })
}

/// The number of challenges that the instances are spread over.
const CHALLENGES: u64 = 16;

fn challenge(number: u64) -> ChallengeId {
    challenge_id(&format!("challenge-{number}"))
}

/// Creates an instance for a new source, through the use case.
fn create(gauntlet: &Gauntlet) -> Workload {
    let gauntlet = gauntlet.clone();
    Arc::new(move |_, number| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(number % CHALLENGES), source_id(&format!("team-{number}")));
            gauntlet.create_instance(&call_now(), &challenge, &source, Additional::new()).await.expect("an instance");
        }
        .boxed()
    })
}

/// Creates and deletes an instance.
fn create_and_delete(gauntlet: &Gauntlet) -> Workload {
    let gauntlet = gauntlet.clone();
    Arc::new(move |_, number| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(number % CHALLENGES), source_id(&format!("passing-{number}")));
            gauntlet.create_instance(&call_now(), &challenge, &source, Additional::new()).await.expect("an instance");
            gauntlet.delete_instance(&call_now(), &challenge, &source).await.expect("a deletion");
        }
        .boxed()
    })
}

/// Renews the client's instance.
fn renew(gauntlet: &Gauntlet) -> Workload {
    let gauntlet = gauntlet.clone();
    Arc::new(move |client, _| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(0), source_id(&format!("client-{client}")));
            if let Err(error) = gauntlet.renew_instance(&call_now(), &challenge, &source).await {
                assert_eq!(error.code(), "INSTANCE_NOT_FOUND");
                gauntlet
                    .create_instance(&call_now(), &challenge, &source, Additional::new())
                    .await
                    .expect("an instance");
            }
        }
        .boxed()
    })
}

/// Creates challenges with ten instances each, lists and counts them, and prints the time that each step takes.
pub(crate) async fn listing(backend: Backend, challenges: usize) {
    match backend {
        Backend::Etcd => list(&store::etcd().await, challenges).await,
        Backend::Embedded => list(&store::embedded().await, challenges).await,
    }
}

async fn list<K: Kv>(measured: &MeasuredStore<K>, challenges: usize) {
    const EACH: usize = 10;
    let gauntlet = gauntlet(measured.store.clone());
    let started = Instant::now();
    let report =
        |what: &str, started: Instant| println!("{what:<44} {:>10.1} ms", started.elapsed().as_secs_f64() * 1e3);
    let fill: Vec<_> = (0..64)
        .map(|worker| {
            let gauntlet = gauntlet.clone();
            tokio::spawn(async move {
                for at in (worker..challenges).step_by(64) {
                    let challenge = challenge_id(&format!("challenge-{at:06}"));
                    gauntlet
                        .create_challenge(&call_now(), new_challenge(challenge.as_str(), 0))
                        .await
                        .expect("a challenge");
                    for team in 0..EACH {
                        let source = source_id(&format!("team-{team}"));
                        gauntlet
                            .create_instance(&call_now(), &challenge, &source, Additional::new())
                            .await
                            .expect("an instance");
                    }
                }
            })
        })
        .collect();
    for worker in fill {
        worker.await.expect("a worker panicked");
    }
    report(&format!("{challenges} challenges, {} instances created", challenges * EACH), started);
    let started = Instant::now();
    let mut listed = (0, 0);
    let mut all = gauntlet.query_challenges();
    while let Some((_, instances)) = all.try_next().await.expect("a list") {
        listed = (listed.0 + 1, listed.1 + instances.len());
    }
    assert_eq!(listed, (challenges, challenges * EACH));
    report("list all challenges with their instances", started);
    let started = Instant::now();
    let mut all = gauntlet.query_instances(None);
    let mut count = 0;
    while all.try_next().await.expect("a list").is_some() {
        count += 1;
    }
    assert_eq!(count, challenges * EACH);
    report("list all instances", started);
    let started = Instant::now();
    let own: Vec<_> = gauntlet.query_instances(Some(&source_id("team-3"))).try_collect().await.expect("a list");
    assert_eq!(own.len(), challenges);
    report(&format!("list the {challenges} instances of one source"), started);
    let started = Instant::now();
    let expired: Vec<_> = measured.store.expired(Timestamp::now()).try_collect().await.expect("a list");
    assert_eq!(expired.len(), 0);
    report("list expired instances (none)", started);
    for _ in 0..3 {
        let started = Instant::now();
        let census = measured.store.census(Timestamp::now()).await.expect("a census");
        assert_eq!(census.instances.values().sum::<u64>(), (challenges * EACH) as u64);
        report("census", started);
    }
}

/// Runs every workload briefly to check that it works. Asserts no times.
#[allow(dead_code, reason = "only the smoke test calls it")]
pub(crate) async fn smoke(backend: Backend) {
    let rows = all(backend, Duration::from_millis(64), "").await;
    assert_eq!(rows.len(), 7);
    assert!(rows.iter().all(|row| row.ours_per_s > 0.0 && row.raw_per_s > 0.0));
    Row::print(&rows);
    listing(backend, 20).await;
    let idle: Workload = Arc::new(|_, _| tokio::task::yield_now().boxed());
    assert!(run(2, Duration::from_millis(1), &idle).await.0 > 0);
}
