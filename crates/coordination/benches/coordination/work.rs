//! What is measured.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, TryStreamExt as _};
use gauntlet_coordination::{Coordination, kv::Kv};
use gauntlet_domain::{Additional, ChallengeId, Gauntlet, LockKind, LockOptions, NewChallenge, SourceId, Store as _};
use jiff::Timestamp;

use crate::{
    measure::{Row, Work, beside, run},
    nothing::{call, gauntlet},
    store::{self, Backend, Measured},
};

/// As long as it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// All rows whose name begins so, each of its two sides measured for about `each`.
pub(crate) async fn all(backend: Backend, each: Duration, only: &str) -> Vec<Row> {
    match backend {
        Backend::Etcd => rows(&store::etcd().await, each, only).await,
        // The targets are for etcd.
        Backend::Embedded => {
            let rows = rows(&store::embedded().await, each, only).await;
            rows.into_iter().map(|row| Row { target: None, ..row }).collect()
        }
    }
}

async fn rows<K: Kv>(measured: &Measured<K>, each: Duration, only: &str) -> Vec<Row> {
    let store = &measured.store;
    let gauntlet = gauntlet(store.clone());
    for at in 0..CHALLENGES {
        new_challenge(&gauntlet, &challenge(at), 0).await;
    }
    let measures = [
        ("lock cycle", 1, Some(0.28), lock(store, Of::Own)),
        ("lock cycle", 64, Some(0.45), lock(store, Of::Own)),
        ("create", 1, Some(0.40), create(&gauntlet)),
        ("create", 64, Some(0.30), create(&gauntlet)),
        ("hand-over", 64, Some(0.20), lock(store, Of::One)),
        ("renew", 64, None, renew(&gauntlet)),
        ("create and delete", 64, None, create_and_delete(&gauntlet)),
    ];
    let mut rows = Vec::new();
    for (name, clients, target, ours) in measures {
        if name.starts_with(only) {
            rows.push(beside(name, clients, target, each, ours, measured.raw.clone()).await);
        }
    }
    rows
}

/// Which lock each client takes.
#[derive(Clone, Copy)]
enum Of {
    Own,
    One,
}

/// A lock taken and released.
fn lock<K: Kv>(store: &Arc<Coordination<K>>, of: Of) -> Work {
    let store = store.clone();
    Arc::new(move |client, _| {
        let store = store.clone();
        async move {
            let id = match of {
                Of::Own => id(&format!("lock-{client}")),
                Of::One => id("lock"),
            };
            let by = LockOptions { traceparent: None, timeout: PATIENCE };
            let held = store.lock(LockKind::Challenge, &id, &by).await.expect("a lock");
            held.release().await.expect("a release");
        }
        .boxed()
    })
}

/// Challenges that creates spread over.
const CHALLENGES: u64 = 16;

fn challenge(at: u64) -> ChallengeId {
    id(&format!("challenge-{at}"))
}

/// An instance for a source that has none, by the use case, on a provisioner that has nothing to do.
fn create(gauntlet: &Gauntlet) -> Work {
    let gauntlet = gauntlet.clone();
    Arc::new(move |_, number| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(number % CHALLENGES), source(&format!("team-{number}")));
            gauntlet.create_instance(&call(), &challenge, &source, Additional::new()).await.expect("an instance");
        }
        .boxed()
    })
}

/// An instance created and deleted.
fn create_and_delete(gauntlet: &Gauntlet) -> Work {
    let gauntlet = gauntlet.clone();
    Arc::new(move |_, number| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(number % CHALLENGES), source(&format!("passing-{number}")));
            gauntlet.create_instance(&call(), &challenge, &source, Additional::new()).await.expect("an instance");
            gauntlet.delete_instance(&call(), &challenge, &source).await.expect("gone");
        }
        .boxed()
    })
}

/// Each client's instance, given its timeout again.
fn renew(gauntlet: &Gauntlet) -> Work {
    let gauntlet = gauntlet.clone();
    Arc::new(move |client, _| {
        let gauntlet = gauntlet.clone();
        async move {
            let (challenge, source) = (challenge(0), source(&format!("client-{client}")));
            if let Err(error) = gauntlet.renew_instance(&call(), &challenge, &source).await {
                assert_eq!(error.code(), "INSTANCE_NOT_FOUND");
                gauntlet.create_instance(&call(), &challenge, &source, Additional::new()).await.expect("an instance");
            }
        }
        .boxed()
    })
}

/// Makes so many challenges of ten instances each, lists them all and counts them; prints how long each takes.
pub(crate) async fn listing(backend: Backend, challenges: usize) {
    match backend {
        Backend::Etcd => list(&store::etcd().await, challenges).await,
        Backend::Embedded => list(&store::embedded().await, challenges).await,
    }
}

async fn list<K: Kv>(measured: &Measured<K>, challenges: usize) {
    const EACH: usize = 10;
    let gauntlet = gauntlet(measured.store.clone());
    let started = Instant::now();
    let said = |what: &str, started: Instant| println!("{what:<44} {:>10.1} ms", started.elapsed().as_secs_f64() * 1e3);
    let fill: Vec<_> = (0..64)
        .map(|worker| {
            let gauntlet = gauntlet.clone();
            tokio::spawn(async move {
                for at in (worker..challenges).step_by(64) {
                    let challenge = id(&format!("challenge-{at:06}"));
                    new_challenge(&gauntlet, &challenge, 0).await;
                    for team in 0..EACH {
                        let source = source(&format!("team-{team}"));
                        gauntlet.create_instance(&call(), &challenge, &source, Additional::new()).await.expect("one");
                    }
                }
            })
        })
        .collect();
    for worker in fill {
        worker.await.expect("filled");
    }
    said(&format!("{challenges} challenges, {} instances made", challenges * EACH), started);
    let started = Instant::now();
    let mut listed = (0, 0);
    let mut all = gauntlet.query_challenges();
    while let Some((_, instances)) = all.try_next().await.expect("a list") {
        listed = (listed.0 + 1, listed.1 + instances.len());
    }
    assert_eq!(listed, (challenges, challenges * EACH));
    said("all challenges with their instances listed", started);
    let started = Instant::now();
    let mut all = gauntlet.query_instances(None);
    let mut count = 0;
    while all.try_next().await.expect("a list").is_some() {
        count += 1;
    }
    assert_eq!(count, challenges * EACH);
    said("all instances listed", started);
    let started = Instant::now();
    let own: Vec<_> = gauntlet.query_instances(Some(&source("team-3"))).try_collect().await.expect("a list");
    assert_eq!(own.len(), challenges);
    said(&format!("the {challenges} of one source"), started);
    let started = Instant::now();
    let expired: Vec<_> = measured.store.expired(Timestamp::now()).try_collect().await.expect("a list");
    assert_eq!(expired.len(), 0);
    said("the expired (none)", started);
    for _ in 0..3 {
        let started = Instant::now();
        let census = measured.store.census(Timestamp::now()).await.expect("a census");
        assert_eq!(census.instances.values().sum::<u64>(), (challenges * EACH) as u64);
        said("a census", started);
    }
}

/// The short form: everything once, for as long as it takes to see that it works. Asserts nothing of time.
#[allow(dead_code, reason = "of the test that includes this")]
pub(crate) async fn smoke(backend: Backend) {
    let rows = all(backend, Duration::from_millis(64), "").await;
    assert_eq!(rows.len(), 7);
    assert!(rows.iter().all(|row| row.ours_per_s > 0.0 && row.raw_per_s > 0.0));
    Row::print(&rows);
    listing(backend, 20).await;
    let idle: Work = Arc::new(|_, _| tokio::task::yield_now().boxed());
    assert!(run(2, Duration::from_millis(1), &idle).await.0 > 0);
}

fn id(text: &str) -> ChallengeId {
    ChallengeId::new(text).expect("an id")
}

fn source(text: &str) -> SourceId {
    SourceId::new(text).expect("an id")
}

async fn new_challenge(gauntlet: &Gauntlet, id: &ChallengeId, min: i64) {
    let new = NewChallenge {
        id: id.clone(),
        scenario: "registry.test/web:1".to_owned(),
        timeout: Some(Duration::from_secs(3600)),
        until: None,
        additional: BTreeMap::new(),
        min,
        max: 0,
    };
    gauntlet.create_challenge(&call(), new).await.expect("a challenge");
}
