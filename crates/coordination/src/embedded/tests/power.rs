//! Durability of acknowledged writes, and the number of syncs they take.

use std::collections::BTreeSet;

use futures::{FutureExt as _, future::join_all};
use proptest::{
    prelude::RngExt as _,
    test_runner::{RngAlgorithm, TestRng},
};

use super::{
    disk::{Disk, Lost},
    *,
};

const WRITERS: usize = 8;
/// Writes per writer; more than the power lasts for.
const WRITES: usize = 100;
/// The number of power failures.
const FAILURES: u8 = 60;

/// The power fails at a random write or sync, while the store is opened or written to. All unsynced writes are lost, or a random part of
/// them. Every acknowledged write must still be in the store afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_power_failure() {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let (mut disk, acknowledged) = (Disk::default(), Arc::new(Mutex::new(BTreeSet::new())));
    disk.open().unwrap().close().await;
    let (mut unsynced, mut opened) = (0, 0);
    for failure in 0..FAILURES {
        disk.fails_after(rng.random_range(1..100));
        if let Ok(kv) = disk.open() {
            opened += 1;
            let kv = Arc::new(kv);
            let writers = (0..WRITERS).map(|writer| {
                let (kv, acknowledged) = (kv.clone(), acknowledged.clone());
                tokio::spawn(async move {
                    for n in 0..WRITES {
                        let key = format!("key-{failure}-{writer}-{n}");
                        let op = Op::put(key.clone(), vec![b'x'; 1 + (n * 37) % 3000]);
                        match kv.txn(Txn { success: vec![op], ..Txn::default() }).await {
                            Ok(_) => drop(acknowledged.lock().unwrap().insert(key)),
                            Err(_) => break,
                        }
                    }
                })
            });
            join_all(writers.collect::<Vec<_>>()).await.into_iter().for_each(|writer| writer.unwrap());
            disk.fails_after(0);
            kv.close().await;
        }
        unsynced += disk.unsynced();
        disk = disk.restore_power(if failure.is_multiple_of(2) { Lost::All } else { Lost::Some }, &mut rng);
        let found: BTreeSet<String> = {
            let kv = disk.copy().open().unwrap_or_else(|error| panic!("failure {failure}: {error}"));
            keys(&kv).await.into_iter().collect()
        };
        let acknowledged = acknowledged.lock().unwrap();
        let lost: Vec<_> = acknowledged.difference(&found).collect();
        assert!(lost.is_empty(), "failure {failure}: acknowledged and lost: {lost:?}");
    }
    let acknowledged = acknowledged.lock().unwrap().len();
    println!(
        "{FAILURES} failures, {opened} after the store was open; {acknowledged} writes acknowledged; {unsynced} not synced"
    );
    assert!(unsynced > 0 && opened > 0 && opened < FAILURES, "{unsynced} {opened}");
    assert!(acknowledged > usize::from(FAILURES), "only {acknowledged} writes were acknowledged");
}

/// The first write blocks in its sync while the others queue. No write may be acknowledged before its sync.
#[tokio::test]
async fn concurrent_writers_share_commits_in_revision_order() {
    const QUEUED: usize = 300;
    let disk = Disk::default();
    let kv = disk.open().unwrap();
    let mut watch = kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap();
    disk.block_syncs();
    let before = disk.syncs();
    let mut puts: Vec<_> = (0..QUEUED).map(|n| kv.txn(put(&format!("key-{n:03}"), None)).boxed()).collect();
    for put in &mut puts {
        assert!(put.now_or_never().is_none(), "a write was acknowledged before its sync");
    }
    let blocked = async {
        while !disk.has_blocked_sync() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(30), blocked).await.expect("the first sync starts");
    for put in &mut puts {
        assert!(put.now_or_never().is_none(), "a write was acknowledged before its sync");
    }
    disk.release_syncs();
    let revisions: BTreeSet<u64> = join_all(puts).await.into_iter().map(|put| put.unwrap().revision).collect();
    assert_eq!(revisions.len(), QUEUED, "each write has its own revision");
    let syncs = disk.syncs() - before;
    assert!(syncs <= QUEUED / 10, "{QUEUED} writes took {syncs} syncs");
    let mut seen = Vec::new();
    while seen.len() < QUEUED {
        seen.extend(watch.events.next().await.unwrap().into_iter().map(|event| event.revision));
    }
    assert!(seen.is_sorted() && seen.into_iter().eq(revisions), "the watch sees them in revision order");
    kv.close().await;
}
