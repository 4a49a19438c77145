//! What is held in memory, counted at the allocator: so much for each who waits, and a page of what is listed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

#[path = "../benches/coordination/nothing.rs"]
mod nothing;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use dhat::{HeapStats, Profiler};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use gauntlet_coordination::{Coordination, Etcd, EtcdConfig, kv::Kv};
use gauntlet_domain::{ChallengeId, LockKind, LockOptions, NewChallenge, SourceId, Store as _};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{Instruments, db::Database};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// There is one allocator: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn id(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

async fn etcd(server: &Server) -> Coordination<Etcd> {
    let database = Database::etcd(&Instruments::noop());
    // However slow the machine is, no lease runs out and no call is given up.
    let long = Duration::from_secs(60);
    let config = EtcdConfig { lease_ttl: long, deadline: long, ..EtcdConfig::new([server.url()]) };
    Coordination::etcd(config, "a".to_owned(), database).await.unwrap()
}

/// The bytes that each of so many waiters takes.
async fn each_of<K: Kv>(store: &Coordination<K>, count: usize) -> usize {
    let (web, by) = (id(&format!("web-{count}")), LockOptions { traceparent: None, timeout: Duration::from_secs(600) });
    let acquire = || store.lock(LockKind::Challenge, &web, &by);
    let held = acquire().await.unwrap();
    // What the first one sets up for all.
    let mut first = acquire();
    waiting(store, 1, std::slice::from_mut(&mut first)).await;
    let before = HeapStats::get().curr_bytes;
    let mut waiters: Vec<_> = (0..count).map(|_| acquire()).collect();
    waiting(store, count + 1, &mut waiters).await;
    let taken = HeapStats::get().curr_bytes - before;
    drop((first, waiters));
    held.release().await.unwrap();
    taken / count
}

/// Polls the waiters until all are in the queue, and the watch has seen them.
async fn waiting<K: Kv, F: Future + Unpin>(store: &Coordination<K>, count: usize, waiters: &mut [F]) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        assert!(waiters.iter_mut().all(|waiter| waiter.now_or_never().is_none()));
        let (all, waits) = store.waits(usize::MAX);
        if all == count && waits.iter().map(|wait| wait.position).max() == Some(count) {
            return;
        }
        assert!(Instant::now() < deadline, "{all} of {count} wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn waiters_are_flat<K: Kv>(store: &Coordination<K>) {
    let _profiler = Profiler::builder().testing().build();
    let (few, many) = (each_of(store, 100).await, each_of(store, 500).await);
    println!("{}: {few} bytes for each of 100 who wait, {many} for each of 500", store.backend());
    assert!(many < few * 5 / 4, "{few} bytes for each of 100 who wait, {many} for each of 500");
}

#[test]
fn what_a_waiter_takes_is_the_same_beside_many() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        waiters_are_flat(&Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap()).await;
        waiters_are_flat(&etcd(&Server::start(dir.path()).unwrap()).await).await;
    });
}

/// The bytes taken at most while all there is is listed, above what was taken before.
async fn listing_takes<K: Kv>(store: &Arc<Coordination<K>>, challenges: usize) -> usize {
    const EACH: usize = 2;
    let gauntlet = nothing::gauntlet(store.clone());
    let made: Vec<_> = (0..challenges)
        .map(|at| {
            let gauntlet = gauntlet.clone();
            async move {
                let challenge = id(&format!("{challenges:05}-{at:05}"));
                let new = NewChallenge {
                    id: challenge.clone(),
                    scenario: "registry.test/web:1".to_owned(),
                    timeout: Some(Duration::from_secs(3600)),
                    until: None,
                    additional: BTreeMap::new(),
                    min: 0,
                    max: 0,
                };
                gauntlet.create_challenge(&nothing::call(), new).await.unwrap();
                for team in 0..EACH {
                    let source = SourceId::new(format!("team-{team}")).unwrap();
                    gauntlet.create_instance(&nothing::call(), &challenge, &source, BTreeMap::new()).await.unwrap();
                }
            }
        })
        .collect();
    futures::stream::iter(made).for_each_concurrent(64, |one| one).await;
    let profiler = Profiler::builder().testing().build();
    let mut listed = (0, 0);
    let mut all = gauntlet.query_challenges();
    while let Some((_, instances)) = all.try_next().await.unwrap() {
        listed = (listed.0 + 1, listed.1 + instances.len());
    }
    assert!(listed.0 >= challenges && listed.1 == listed.0 * EACH);
    let mut all = gauntlet.query_instances(None);
    let mut instances = 0;
    while all.try_next().await.unwrap().is_some() {
        instances += 1;
    }
    assert_eq!(instances, listed.1);
    let most = HeapStats::get().max_bytes;
    drop(profiler);
    most
}

async fn listings_are_bounded<K: Kv>(store: Coordination<K>) {
    let store = Arc::new(store);
    // Both are longer than a page.
    let (few, many) = (listing_takes(&store, 300).await, listing_takes(&store, 600).await);
    println!("{}: listing 300 challenges takes {few} bytes, 900 {many}", store.backend());
    assert!(many < few * 3 / 2, "{few} bytes for 300 challenges, {many} for 900");
}

#[test]
fn what_a_list_takes_does_not_grow_with_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        listings_are_bounded(Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap()).await;
        listings_are_bounded(etcd(&Server::start(dir.path()).unwrap()).await).await;
    });
}
