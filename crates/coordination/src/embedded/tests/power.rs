//! What is on the disk when a caller is answered, and how many syncs that takes.

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
/// More by each than there is power for.
const WRITES: usize = 100;
/// How often the power fails.
const FAILURES: u8 = 60;

/// The power fails at any write or sync, while the store is opened or while some write to it. Of what was written since the last sync all is
/// lost, or a random part. What was acknowledged is there when the power is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_power_failure() {
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
        disk = disk.power_back(if failure.is_multiple_of(2) { Lost::All } else { Lost::Some }, &mut rng);
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
        "{FAILURES} failures, {opened} after it was open; {acknowledged} acknowledged; {unsynced} writes not synced"
    );
    assert!(unsynced > 0 && opened > 0 && opened < FAILURES, "{unsynced} {opened}");
    assert!(acknowledged > usize::from(FAILURES), "{acknowledged} were acknowledged");
}

/// The first write is on its way to the disk while the others are queued. Nobody is answered before the disk has what they wrote.
#[tokio::test]
async fn many_writers_share_commits_and_none_is_lost() {
    const QUEUED: usize = 300;
    let disk = Disk::default();
    let kv = disk.open().unwrap();
    let mut followed = kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap();
    disk.hold();
    let before = disk.syncs();
    let mut puts: Vec<_> = (0..QUEUED).map(|n| kv.txn(put(&format!("key-{n:03}"), None)).boxed()).collect();
    for put in &mut puts {
        assert!(put.now_or_never().is_none(), "nobody is answered before the disk");
    }
    let held = async {
        while !disk.holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(30), held).await.expect("the first commit is synced");
    for put in &mut puts {
        assert!(put.now_or_never().is_none(), "nobody is answered before the disk");
    }
    disk.release();
    let revisions: BTreeSet<u64> = join_all(puts).await.into_iter().map(|put| put.unwrap().revision).collect();
    assert_eq!(revisions.len(), QUEUED, "each has a revision of its own");
    let syncs = disk.syncs() - before;
    assert!(syncs <= QUEUED / 10, "{QUEUED} writes took {syncs} syncs");
    let mut seen = Vec::new();
    while seen.len() < QUEUED {
        seen.extend(followed.events.next().await.unwrap().into_iter().map(|event| event.revision));
    }
    assert!(seen.is_sorted() && seen.into_iter().eq(revisions), "and is followed in that order");
    kv.close().await;
}
