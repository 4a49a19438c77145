//! Restarts, a second process, damaged files, full disks and lagging watches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod disk;
mod power;

use gauntlet_domain::{
    Challenge, Instance, InstanceKey, Intent, LockKind, LockOptions, Outcome, Pinned, Store as _, Unfinished,
};
use gauntlet_testing::fixtures::{REFERENCE, challenge, challenge_id, instance, source_key, timestamp};

use super::*;
use crate::{
    Coordination,
    kv::{Compare, Condition},
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
async fn restart_keeps_committed_keys_and_drops_leased_ones() {
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
async fn leases_expire_by_the_injected_clock() {
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
    // A put does not renew its lease.
    after(119);
    assert_eq!(kv.txn(put("leased", Some(lease))).await, Err(KvError::LeaseNotFound));
    assert_eq!(kv.keep_alive(lease).await, Err(KvError::LeaseNotFound));
    assert_eq!(keys(&kv).await, ["kept"]);
    kv.revoke(lease).await.unwrap();
}

/// A clock that blocks stands in for a disk that hangs: the writer reads the clock before each group of jobs.
#[test]
fn calls_return_within_the_deadline() {
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
    // The only blocking thread is kept busy, so reads hang too.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let writing = stuck.lock().unwrap();
    let (go_on, busy) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || busy.recv());
    runtime.block_on(async {
        let ends = Duration::from_secs(30);
        let get = Get { range: KeyRange::between("a", "z"), limit: 0, keys_only: true };
        let read = timeout(ends, kv.page(get, None)).await.expect("the read returns");
        assert!(matches!(read, Err(KvError::Unavailable(_))), "a read changes nothing");
        let writes = (0..WRITE_QUEUE + 64).map(|n| kv.txn(put(&format!("key-{n}"), None)));
        let writes = timeout(ends, futures::future::join_all(writes)).await.expect("the writes return");
        let unknown = writes.iter().filter(|write| matches!(write, Err(KvError::Ambiguous(_)))).count();
        let refused = writes.iter().filter(|write| matches!(write, Err(KvError::Unavailable(_)))).count();
        assert!(
            unknown >= WRITE_QUEUE && unknown + refused == WRITE_QUEUE + 64,
            "{unknown} unknown, {refused} refused"
        );
    });
    drop(writing);
    go_on.send(()).unwrap();
    runtime.block_on(kv.close());
}

/// Runs this test binary again as the second process.
#[tokio::test]
async fn second_process_is_rejected() {
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
        .args(["--exact", "embedded::tests::second_process_is_rejected", "--nocapture"])
        .env(STORE, &path)
        .output()
        .unwrap();
    for text in [refused(&path), String::from_utf8_lossy(&output.stdout).into_owned()] {
        assert!(text.contains("another process has it open") && text.contains(path.to_str().unwrap()), "{text}");
    }
}

#[tokio::test]
async fn file_is_readable_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let _kv = Embedded::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn open_error_names_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::write(&path, "not a store at all".repeat(1000)).unwrap();
    let text = Embedded::open(&path).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    let text = Embedded::open(&path.join("below/a/file")).unwrap_err().to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains("cannot create its directory"), "{text}");
}

/// Opens a file that a build with record version 1 wrote: a challenge, a ready instance and one whose creation was interrupted by a crash.
/// If the file is deleted, the current build writes it again.
#[tokio::test]
async fn version_1_file_opens_and_stays_usable() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/embedded/tests/version-1.redb");
    let open = |path: PathBuf| async move { Coordination::embedded(&path, "a".to_owned()).await.unwrap() };
    let (options, alice, bob) = (LockOptions::default(), source_key("web", "alice"), source_key("web", "bob"));
    // The file's own digest, which the shared fixtures don't use.
    let scenario = Pinned { reference: REFERENCE.to_owned(), digest: format!("sha256:{}", "ab".repeat(32)) };
    let challenge = Challenge { scenario: scenario.clone(), ..challenge("web") };
    let with_phase = |key: &InstanceKey, phase| Instance { scenario: scenario.clone(), ..instance(key.clone(), phase) };
    let ready = with_phase(&alice, gauntlet_domain::Phase::Ready);
    let begun = with_phase(&bob, gauntlet_domain::Phase::Provisioning);
    if !fixture.exists() {
        let store = open(fixture.clone()).await;
        store.insert_challenge(&challenge).await.unwrap();
        let web = store.challenge(&challenge.id).await.unwrap().unwrap();
        let creating = with_phase(&alice, gauntlet_domain::Phase::Provisioning);
        let guard = store.begin_create(&web, &creating, None, &options).await.unwrap();
        guard.commit(Outcome::Put(Box::new(ready.clone()))).await.unwrap();
        let _interrupted = store.begin_create(&web, &begun, None, &options).await.unwrap();
        store.core.kv.close().await;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::copy(&fixture, &path).unwrap();
    for _ in 0..2 {
        let store = open(path.clone()).await;
        assert_eq!(store.challenge(&challenge.id).await.unwrap().unwrap().value, challenge);
        let stored = store.instance(&alice).await.unwrap().unwrap();
        assert_eq!(stored.value, ready);
        store.rewrite(&stored, &ready, &options).await.unwrap();
        if store.unfinished(timestamp(0)).await.unwrap() == [Unfinished::Instance(bob.clone())] {
            let (guard, left) = store.begin(&bob, Intent::Recover, &options).await.unwrap();
            assert_eq!(left, begun);
            guard.commit(Outcome::Remove).await.unwrap();
        }
        assert_eq!(store.instance(&bob).await.unwrap(), None);
        store.shutdown().await;
    }
}

/// Writes a store with 300 entries and closes it.
async fn fill(path: &Path) {
    let kv = Embedded::open(path).unwrap();
    for n in 0..300 {
        let op = Op::put(format!("key-{n:04}"), vec![b'x'; 1000]);
        kv.txn(Txn { success: vec![op], ..Txn::default() }).await.unwrap();
    }
    kv.close().await;
}

#[tokio::test]
async fn damaged_file_is_rejected_and_left_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    fill(&path).await;
    let whole = std::fs::read(&path).unwrap();
    let page = whole.windows(900).position(|window| window.iter().all(|byte| *byte == b'x')).unwrap();
    let mut corrupt = whole.clone();
    corrupt[page..page + 900].fill(b'y');
    for bad in [corrupt, whole[..whole.len() / 2].to_vec(), whole[..page].to_vec(), whole[..300].to_vec()] {
        std::fs::write(&path, &bad).unwrap();
        let text = Embedded::open(&path).unwrap_err().to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("damaged"), "{} bytes: {text}", bad.len());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bad.len() as u64, "the damaged file was changed");
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(keys(&Embedded::open(&path).unwrap()).await.len(), 300);
}

/// Runs this test binary again with a file size limit of some megabytes.
#[test]
fn full_disk_is_reported_and_loses_no_acknowledged_write() {
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
        .args(["--exact", "embedded::tests::full_disk_is_reported_and_loses_no_acknowledged_write", "--nocapture"])
        .env(STORE, &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text.lines().find_map(|line| Some(line.split_once("RESULT ")?.1));
    let result = result.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    type Report = (Option<(usize, String)>, String, usize);
    let (failed, again, read): Report = serde_json::from_str(result).unwrap();
    let (written, error) = failed.unwrap();
    assert!(written > 10 && read == written, "reads continue on a full disk: {written} {read}");
    assert!(error.contains("the disk is full; free some space") && error.contains(path.to_str().unwrap()), "{error}");
    assert!(again.contains("restart once the disk works again") || again.contains("the disk is full"), "{again}");
    // With free space again, no acknowledged write is missing. The failed write may be present.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let kv = Embedded::open(&path).unwrap();
    assert!(runtime.block_on(keys(&kv)).len() >= written);
    write(&kv, 9000).unwrap();
}

#[tokio::test]
async fn lagging_watch_ends_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let kv = Embedded::open(&dir.path().join("store")).unwrap();
    let mut watch = kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap();
    let (lease, _) = kv.grant(Duration::from_secs(60)).await.unwrap();
    for _ in 0..WATCH_BUFFER + 10 {
        kv.txn(put("key", Some(lease))).await.unwrap();
    }
    assert!(watch.events.next().await.is_err());
    assert_eq!(kv.list_and_watch(KeyRange::between("a", "z")).await.unwrap().keys.len(), 1);
}

#[tokio::test]
async fn failed_compare_changes_nothing() {
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
async fn restart_keeps_records_and_finds_unfinished_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let open = || async { Coordination::embedded(&path, "a".to_owned()).await.unwrap() };
    let (options, key) = (LockOptions::default(), source_key("web", "alice"));
    let store = open().await;
    store.insert_challenge(&challenge("web")).await.unwrap();
    let web = store.challenge(&challenge_id("web")).await.unwrap().unwrap();
    let intent = instance(key.clone(), gauntlet_domain::Phase::Provisioning);
    let owner = store.begin_create(&web, &intent, None, &options).await.unwrap();
    let lock = store.lock(LockKind::Rollout, &challenge_id("web"), &options).await.unwrap();
    // Like a crash: nothing is released.
    store.core.kv.close().await;
    drop(store);
    let store = open().await;
    assert_eq!(store.challenge(&challenge_id("web")).await.unwrap().unwrap(), web);
    assert_eq!(store.unfinished(timestamp(0)).await.unwrap(), vec![Unfinished::Instance(key.clone())]);
    let again = store.lock(LockKind::Rollout, &challenge_id("web"), &options).await.unwrap();
    assert!(again.token > lock.token && again.token > owner.token);
    let (guard, left) = store.begin(&key, Intent::Recover, &options).await.unwrap();
    assert_eq!(left, intent);
    guard.commit(Outcome::Remove).await.unwrap();
    store.shutdown().await;
    assert!(store.ping().await.is_err());
    assert!(store.insert_challenge(&challenge("late")).await.is_err());
    let store = open().await;
    assert_eq!(store.instance(&key).await.unwrap(), None);
    store.shutdown().await;
}

/// A waiter wakes up although its watch missed the removal. The test's own thread runs the watch; it is blocked while another thread makes
/// more commits than the watch buffers.
#[tokio::test]
async fn broken_watch_is_listed_again_and_wakes_waiters() {
    let dir = tempfile::tempdir().unwrap();
    let store = Coordination::embedded(&dir.path().join("store"), "a".to_owned()).await.unwrap();
    let kv = store.core.kv.clone();
    let options = LockOptions { timeout: Duration::from_secs(30), ..LockOptions::default() };
    let web = challenge_id("web");
    let first = store.lock(LockKind::Rollout, &web, &options).await.unwrap();
    // The lock was handed over, so the watch is running.
    let (guard, released) = tokio::join!(store.lock(LockKind::Rollout, &web, &options), first.release());
    released.unwrap();
    let guard = guard.unwrap();
    let mut waiting = Box::pin(store.lock(LockKind::Rollout, &web, &options));
    let queue = Get { range: store.core.layout.queue(LockKind::Rollout, &web), limit: 0, keys_only: true };
    let queued = async {
        while kv.page(queue.clone(), None).await.unwrap().kvs.len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! { biased; taken = &mut waiting => panic!("{taken:?}"), () = queued => {} }
    let holder =
        kv.page(queue.clone(), None).await.unwrap().kvs.into_iter().find(|kv| kv.create_revision == guard.token);
    let compare = vec![Compare::create_revision(&holder.as_ref().unwrap().key, guard.token)];
    let success = vec![Op::delete(&holder.unwrap().key)];
    let (deletion, commits) = (Txn { compare, success, failure: Vec::new() }, kv.clone());
    let other_thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            assert!(commits.txn(deletion).await.unwrap().succeeded);
            let (lease, _) = commits.grant(Duration::from_secs(60)).await.unwrap();
            for _ in 0..WATCH_BUFFER + 10 {
                commits.txn(put("key", Some(lease))).await.unwrap();
            }
        });
    });
    other_thread.join().unwrap();
    let next = waiting.await.unwrap();
    assert!(next.token > guard.token);
    next.release().await.unwrap();
}
