//! Memory use, measured at the allocator: per waiter of a lock, and of a listing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

#[path = "../benches/coordination/noop.rs"]
mod noop;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use dhat::{HeapStats, Profiler};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use gauntlet_coordination::{Coordination, Etcd, EtcdConfig, kv::Kv};
use gauntlet_domain::{LockKind, LockOptions, Store as _};
use gauntlet_stack::Etcd as Server;
use gauntlet_telemetry::{Instruments, db::Database};
use gauntlet_testing::fixtures::{challenge_id, new_challenge, source_id};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// The profiler is global, so the tests run one at a time.
static PROFILING: Mutex<()> = Mutex::new(());

async fn etcd(server: &Server) -> Coordination<Etcd> {
    let database = Database::etcd(&Instruments::noop());
    // Long enough that no lease expires and no call times out on a slow machine.
    let long = Duration::from_secs(60);
    let config = EtcdConfig { lease_ttl: long, deadline: long, ..EtcdConfig::new([server.url()]) };
    Coordination::etcd(config, "a".to_owned(), database).await.unwrap()
}

/// Returns the bytes per waiter among `count` waiters of one lock.
async fn bytes_per_waiter<K: Kv>(store: &Coordination<K>, count: usize) -> usize {
    let (web, options) =
        (challenge_id(&format!("web-{count}")), LockOptions { traceparent: None, timeout: Duration::from_secs(600) });
    let acquire = || store.lock(LockKind::Challenge, &web, &options);
    let guard = acquire().await.unwrap();
    // The first waiter sets up the watch, which the others share.
    let mut first = acquire();
    wait_until_queued(store, 1, std::slice::from_mut(&mut first)).await;
    let before = HeapStats::get().curr_bytes;
    let mut waiters: Vec<_> = (0..count).map(|_| acquire()).collect();
    wait_until_queued(store, count + 1, &mut waiters).await;
    let taken = HeapStats::get().curr_bytes - before;
    drop((first, waiters));
    guard.release().await.unwrap();
    taken / count
}

/// Polls the waiters until all of them are in the queue and the watch has seen them.
async fn wait_until_queued<K: Kv, F: Future + Unpin>(store: &Coordination<K>, count: usize, waiters: &mut [F]) {
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

async fn assert_flat_waiters<K: Kv>(store: &Coordination<K>) {
    let _profiler = Profiler::builder().testing().build();
    let (few, many) = (bytes_per_waiter(store, 100).await, bytes_per_waiter(store, 500).await);
    println!("{}: {few} bytes per waiter among 100, {many} among 500", store.backend());
    assert!(many < few * 5 / 4, "{few} bytes per waiter among 100, {many} among 500");
}

#[test]
fn memory_per_waiter_does_not_grow_with_their_number() {
    let _profiling = PROFILING.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        assert_flat_waiters(&Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap()).await;
        assert_flat_waiters(&etcd(&Server::start(dir.path()).unwrap()).await).await;
    });
}

/// Adds challenges, lists everything, and returns the peak of bytes allocated by the listing.
async fn peak_bytes_of_listing<K: Kv>(store: &Arc<Coordination<K>>, challenges: usize) -> usize {
    const EACH: usize = 2;
    let gauntlet = noop::gauntlet(store.clone());
    let creates: Vec<_> = (0..challenges)
        .map(|at| {
            let gauntlet = gauntlet.clone();
            async move {
                let challenge = challenge_id(&format!("{challenges:05}-{at:05}"));
                gauntlet.create_challenge(&noop::call_now(), new_challenge(challenge.as_str(), 0)).await.unwrap();
                for team in 0..EACH {
                    let source = source_id(&format!("team-{team}"));
                    gauntlet.create_instance(&noop::call_now(), &challenge, &source, BTreeMap::new()).await.unwrap();
                }
            }
        })
        .collect();
    futures::stream::iter(creates).for_each_concurrent(64, |one| one).await;
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
    let peak = HeapStats::get().max_bytes;
    drop(profiler);
    peak
}

async fn assert_bounded_listings<K: Kv>(store: Coordination<K>) {
    let store = Arc::new(store);
    // Both listings are longer than a page.
    let (few, many) = (peak_bytes_of_listing(&store, 300).await, peak_bytes_of_listing(&store, 600).await);
    println!("{}: listing 300 challenges takes {few} bytes, 900 {many}", store.backend());
    assert!(many < few * 3 / 2, "{few} bytes for 300 challenges, {many} for 900");
}

#[test]
fn memory_of_a_listing_does_not_grow_with_its_length() {
    let _profiling = PROFILING.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        assert_bounded_listings(Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap()).await;
        assert_bounded_listings(etcd(&Server::start(dir.path()).unwrap()).await).await;
    });
}
