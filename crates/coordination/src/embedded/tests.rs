//! The file: restarts, other processes, damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod disk;
mod power;

use gauntlet_domain::{Begin, By, Commit, LockKind, Store as _, Stranded};

use super::*;
use crate::{
    Coordination,
    contract::{at, challenge, id, instance, instance_key},
};

fn put(key: &str, lease: Option<LeaseId>) -> Txn {
    let op = Op::Put { key: key.to_owned(), value: b"value".to_vec(), lease };
    Txn { success: vec![op], ..Txn::default() }
}

async fn keys(kv: &Embedded) -> Vec<String> {
    let all = Get { range: KeyRange::between("a", "z"), limit: 0, keys_only: true };
    kv.page(all, None).await.unwrap().kvs.into_iter().map(|kv| kv.key).collect()
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart_and_what_was_leased_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er/store");
    let mut last = 0;
    for start in 1..4u64 {
        let kv = Embedded::open(&path).unwrap();
        let (lease, _) = kv.grant(Duration::from_secs(60)).await.unwrap();
        assert!(u64::try_from(lease).unwrap() > last, "no lease is ever granted twice");
        kv.txn(put("leased", Some(lease))).await.unwrap();
        let revision = kv.txn(put(&format!("kept-{start}"), None)).await.unwrap().revision;
        assert!(revision > last && revision >> COUNTER_BITS == start);
        last = revision;
        assert_eq!(keys(&kv).await.len() as u64, start + 1);
        kv.close().await;
        assert!(matches!(kv.txn(put("late", None)).await, Err(KvError::Unavailable(_))));
    }
    let kv = Embedded::open(&path).unwrap();
    assert_eq!(keys(&kv).await, ["kept-1", "kept-2", "kept-3"]);
    let gone = put("b", Some(1));
    assert_eq!(kv.txn(gone).await, Err(KvError::LeaseNotFound));
}

#[tokio::test]
async fn leases_run_out_by_the_clock_that_the_store_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let now = Arc::new(Mutex::new(began));
    let clock = {
        let now = now.clone();
        Box::new(move || *now.lock().unwrap())
    };
    let after = |seconds| *now.lock().unwrap() = began + Duration::from_secs(seconds);
    let kv = Embedded::open_with(&dir.path().join("store"), clock, DEADLINE).unwrap();
    let (lease, ttl) = kv.grant(Duration::from_secs(60)).await.unwrap();
    let (other, _) = kv.grant(Duration::from_secs(600)).await.unwrap();
    assert_eq!(ttl, Duration::from_secs(60));
    kv.txn(put("kept", Some(other))).await.unwrap();
    kv.txn(put("leased", Some(lease))).await.unwrap();
    after(59);
    kv.keep_alive(lease).await.unwrap();
    after(118);
    assert_eq!(keys(&kv).await, ["kept", "leased"]);
    kv.txn(put("leased", Some(lease))).await.unwrap();
    // What is put does not keep it alive.
    after(119);
    assert_eq!(kv.txn(put("leased", Some(lease))).await, Err(KvError::LeaseNotFound));
    assert_eq!(kv.keep_alive(lease).await, Err(KvError::LeaseNotFound));
    assert_eq!(keys(&kv).await, ["kept"]);
    kv.revoke(lease).await.unwrap();
}

/// The disk that does not answer is a clock that stands still here: the writer asks it before each group of writes.
#[test]
fn every_call_ends_within_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let stuck = Arc::new(Mutex::new(()));
    let clock = {
        let stuck = stuck.clone();
        Box::new(move || {
            drop(stuck.lock());
            Instant::now()
        })
    };
    let kv = Embedded::open_with(&dir.path().join("store"), clock, Duration::from_millis(50)).unwrap();
    // One thread for all that blocks, and that one is busy.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let writing = stuck.lock().unwrap();
    let (go_on, busy) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || busy.recv());
    runtime.block_on(async {
        let ends = Duration::from_secs(30);
        let get = Get { range: KeyRange::between("a", "z"), limit: 0, keys_only: true };
        let read = timeout(ends, kv.page(get, None)).await.expect("it ends");
        assert!(matches!(read, Err(KvError::Unavailable(_))), "a read has done nothing");
        let writes = (0..QUEUE + 64).map(|n| kv.txn(put(&format!("key-{n}"), None)));
        let writes = timeout(ends, futures::future::join_all(writes)).await.expect("they end");
        let unknown = writes.iter().filter(|write| matches!(write, Err(KvError::Ambiguous(_)))).count();
        let refused = writes.iter().filter(|write| matches!(write, Err(KvError::Unavailable(_)))).count();
        assert!(unknown >= QUEUE && unknown + refused == QUEUE + 64, "{unknown} unknown, {refused} refused");
    });
    drop(writing);
    go_on.send(()).unwrap();
    runtime.block_on(kv.close());
}

/// Runs itself again, as the other process.
#[tokio::test]
async fn a_file_has_one_process() {
    const STORE: &str = "GAUNTLET_TEST_OPEN_STORE";
    let refused = |path: &Path| Embedded::open(path).unwrap_err().to_string();
    if let Some(path) = std::env::var_os(STORE) {
        println!("RESULT {}", refused(Path::new(&path)));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let _first = Embedded::open(&path).unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "embedded::tests::a_file_has_one_process", "--nocapture"])
        .env(STORE, &path)
        .output()
        .unwrap();
    for text in [refused(&path), String::from_utf8_lossy(&output.stdout).into_owned()] {
        assert!(text.contains("another process has it open") && text.contains(path.to_str().unwrap()), "{text}");
    }
}

#[tokio::test]
async fn only_its_owner_reads_the_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let _kv = Embedded::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_is_no_store_is_told_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::write(&path, "not a store at all".repeat(1000)).unwrap();
    let text = Embedded::open(&path).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    let text = Embedded::open(&path.join("below/a/file")).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains("cannot make its directory"), "{text}");
}

/// What a build of record version 1 left: a challenge, an instance that is ready and one whose creation a crash cut short. Written once,
/// and again if it is removed, by whatever build then is.
#[tokio::test]
async fn a_file_of_version_1_opens_and_goes_on() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/embedded/tests/version-1.redb");
    let open = |path: PathBuf| async move { Coordination::embedded(&path, "a".to_owned()).await.unwrap() };
    let (by, alice, bob) = (By::default(), instance_key("web", "alice"), instance_key("web", "bob"));
    let ready = instance(alice.clone(), gauntlet_domain::Phase::Ready);
    let begun = instance(bob.clone(), gauntlet_domain::Phase::Provisioning);
    if !kept.exists() {
        let store = open(kept.clone()).await;
        store.insert_challenge(&challenge("web")).await.unwrap();
        let web = store.challenge(&id("web")).await.unwrap().unwrap();
        let creating = instance(alice.clone(), gauntlet_domain::Phase::Provisioning);
        let held = store.begin_create(&web, &creating, None, &by).await.unwrap();
        store.commit(held, &alice, Commit::Put(Box::new(ready.clone()))).await.unwrap();
        let _cut_short = store.begin_create(&web, &begun, None, &by).await.unwrap();
        store.core.kv.close().await;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::copy(&kept, &path).unwrap();
    for _ in 0..2 {
        let store = open(path.clone()).await;
        assert_eq!(store.challenge(&id("web")).await.unwrap().unwrap().value, challenge("web"));
        let stored = store.instance(&alice).await.unwrap().unwrap();
        assert_eq!(stored.value, ready);
        store.rewrite(&stored, &ready, &by).await.unwrap();
        if store.stranded(at(0)).await.unwrap() == [Stranded::Instance(bob.clone())] {
            let (held, left) = store.begin(&bob, Begin::Recover, &by).await.unwrap();
            assert_eq!(left, begun);
            store.commit(held, &bob, Commit::Remove).await.unwrap();
        }
        assert_eq!(store.instance(&bob).await.unwrap(), None);
        store.shutdown().await;
    }
}

/// A closed store of many entries.
async fn filled(path: &Path) {
    let kv = Embedded::open(path).unwrap();
    for n in 0..300 {
        let op = Op::put(format!("key-{n:04}"), vec![b'x'; 1000]);
        kv.txn(Txn { success: vec![op], ..Txn::default() }).await.unwrap();
    }
    kv.close().await;
}

#[tokio::test]
async fn a_damaged_file_is_told_and_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    filled(&path).await;
    let whole = std::fs::read(&path).unwrap();
    let page = whole.windows(900).position(|window| window.iter().all(|byte| *byte == b'x')).unwrap();
    let mut corrupt = whole.clone();
    corrupt[page..page + 900].fill(b'y');
    for bad in [corrupt, whole[..whole.len() / 2].to_vec(), whole[..page].to_vec(), whole[..300].to_vec()] {
        std::fs::write(&path, &bad).unwrap();
        let text = Embedded::open(&path).unwrap_err().to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("damaged"), "{} bytes: {text}", bad.len());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bad.len() as u64, "left as it was found");
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(keys(&Embedded::open(&path).unwrap()).await.len(), 300);
}

/// Runs itself again, as a process that may write no file of more than some megabytes.
#[test]
fn a_full_disk_is_told_and_loses_nothing_acknowledged() {
    const STORE: &str = "GAUNTLET_TEST_FULL_STORE";
    let write = |kv: &Embedded, n: usize| {
        let txn = Txn { success: vec![Op::put(format!("key-{n:04}"), vec![b'x'; 100_000])], ..Txn::default() };
        tokio::runtime::Handle::current().block_on(kv.txn(txn))
    };
    if let Ok(path) = std::env::var(STORE) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let kv = Embedded::open(Path::new(&path)).unwrap();
        let failed = (0..1000).find_map(|n| write(&kv, n).err().map(|error| (n, error.to_string())));
        let again = write(&kv, 9000).unwrap_err().to_string();
        println!("RESULT {}", serde_json::json!([failed, again, runtime.block_on(keys(&kv)).len()]));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let output = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16384; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "embedded::tests::a_full_disk_is_told_and_loses_nothing_acknowledged", "--nocapture"])
        .env(STORE, &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text.lines().find_map(|line| Some(line.split_once("RESULT ")?.1));
    let result = result.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    type Told = (Option<(usize, String)>, String, usize);
    let (failed, again, read): Told = serde_json::from_str(result).unwrap();
    let (written, error) = failed.unwrap();
    assert!(written > 10 && read == written, "what is there is read all the same: {written} {read}");
    assert!(error.contains("the disk is full; free some space") && error.contains(path.to_str().unwrap()), "{error}");
    assert!(again.contains("restart once the disk is well") || again.contains("the disk is full"), "{again}");
    // With room again, nothing that was acknowledged is missing. The one that failed may be there.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let kv = Embedded::open(&path).unwrap();
    assert!(runtime.block_on(keys(&kv)).len() >= written);
    write(&kv, 9000).unwrap();
}

#[tokio::test]
async fn who_falls_behind_lists_again() {
    let dir = tempfile::tempdir().unwrap();
    let kv = Embedded::open(&dir.path().join("store")).unwrap();
    let mut followed = kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap();
    let (lease, _) = kv.grant(Duration::from_secs(60)).await.unwrap();
    for _ in 0..BEHIND + 10 {
        kv.txn(put("key", Some(lease))).await.unwrap();
    }
    assert!(followed.events.next().await.is_err());
    assert_eq!(kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap().keys.len(), 1);
}

#[tokio::test]
async fn a_failed_compare_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let kv = Embedded::open(&dir.path().join("store")).unwrap();
    let before = kv.txn(put("key", None)).await.unwrap().revision;
    for compare in [
        Compare::absent(KeyRange::between("a", "z")),
        Compare::exists("other"),
        Compare::create_revision("key", before + 1),
        Compare::mod_revision("other", 0),
        Compare::value("key", "another"),
        Compare { range: KeyRange::between("a", "z"), condition: Condition::ModRevisionAtMost(before - 1) },
    ] {
        let txn = Txn {
            compare: vec![compare.clone()],
            success: vec![Op::put("late", "")],
            failure: vec![Op::get(KeyRange::key("key"))],
        };
        let result = kv.txn(txn).await.unwrap();
        assert!(!result.succeeded && result.revision == before && result.reads.concat().len() == 1, "{compare:?}");
    }
    assert_eq!(keys(&kv).await, ["key"]);
}

#[tokio::test]
async fn a_restart_keeps_records_and_finds_what_was_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let open = || async { Coordination::embedded(&path, "a".to_owned()).await.unwrap() };
    let (by, key) = (By::default(), instance_key("web", "alice"));
    let store = open().await;
    store.insert_challenge(&challenge("web")).await.unwrap();
    let web = store.challenge(&id("web")).await.unwrap().unwrap();
    let intent = instance(key.clone(), gauntlet_domain::Phase::Provisioning);
    let owner = store.begin_create(&web, &intent, None, &by).await.unwrap();
    let lock = store.lock(LockKind::Rollout, &id("web"), &by).await.unwrap();
    // As a crash would: nothing is given up in order.
    store.core.kv.close().await;
    drop(store);
    let store = open().await;
    assert_eq!(store.challenge(&id("web")).await.unwrap().unwrap(), web);
    assert_eq!(store.stranded(at(0)).await.unwrap(), vec![Stranded::Instance(key.clone())]);
    let again = store.lock(LockKind::Rollout, &id("web"), &by).await.unwrap();
    assert!(again.fence > lock.fence && again.fence > owner.fence);
    let (held, left) = store.begin(&key, Begin::Recover, &by).await.unwrap();
    assert_eq!(left, intent);
    store.commit(held, &key, Commit::Remove).await.unwrap();
    store.shutdown().await;
    assert!(store.ping().await.is_err());
    assert!(store.insert_challenge(&challenge("late")).await.is_err());
    let store = open().await;
    assert_eq!(store.instance(&key).await.unwrap(), None);
    store.shutdown().await;
}

/// Who waits is woken by a removal that its watch has missed. The watch is followed by the test's own thread, which is kept busy while
/// another one makes more commits than a watch may fall behind.
#[tokio::test]
async fn a_watch_that_broke_is_listed_again_and_wakes_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let store = Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap();
    let kv = store.core.kv.clone();
    let by = By { patience: Duration::from_secs(30), ..By::default() };
    let web = id("web");
    let first = store.lock(LockKind::Rollout, &web, &by).await.unwrap();
    // Handed on, so the watch is there.
    let (held, released) = tokio::join!(store.lock(LockKind::Rollout, &web, &by), store.release(first));
    released.unwrap();
    let held = held.unwrap();
    let mut waiting = Box::pin(store.lock(LockKind::Rollout, &web, &by));
    let queue = Get { range: store.core.layout.queue(LockKind::Rollout, &web), limit: 0, keys_only: true };
    let queued = async {
        while kv.page(queue.clone(), None).await.unwrap().kvs.len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! { biased; taken = &mut waiting => panic!("{taken:?}"), () = queued => {} }
    let (removal, commits) = (crate::ending::ticket(&held).unwrap().live.removal(), kv.clone());
    let elsewhere = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            assert!(commits.txn(removal).await.unwrap().succeeded);
            let (lease, _) = commits.grant(Duration::from_secs(60)).await.unwrap();
            for _ in 0..BEHIND + 10 {
                commits.txn(put("key", Some(lease))).await.unwrap();
            }
        });
    });
    elsewhere.join().unwrap();
    let next = waiting.await.unwrap();
    assert!(next.fence > held.fence);
    store.release(next).await.unwrap();
}
