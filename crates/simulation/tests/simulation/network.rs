//! The network between one manager and etcd. It delays, reorders and loses messages, and can be partitioned.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_coordination::kv::{
    Event as Change, EventStream, Get, KeyRange, Kv, KvError, KvResult, LeaseId, Op, Page, Txn, TxnResponse, Watch,
};
use rand::RngExt as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{
    PREFIX,
    coverage::{Event, Fault, Step},
    process::Process,
    world::State,
};
use crate::etcd::Snapshot;

const DEADLINE: Duration = Duration::from_secs(5);
/// The longest time from sending a request until it arrives.
const MAX_DELIVERY_DELAY: Duration = Duration::from_secs(10);

/// The etcd client of one manager.
pub struct Client(pub Arc<Process>);

impl Client {
    async fn call<T: Send + 'static>(
        &self,
        step: Step,
        what: String,
        apply: impl FnOnce(&mut State, Duration) -> KvResult<T> + Send + 'static,
    ) -> KvResult<T> {
        let (process, world) = (&self.0, &self.0.world);
        process.wait_until_running().await;
        let fault = {
            let mut state = world.lock();
            let fault = state.fault(step);
            if let Some(fault) = fault {
                state.log(world.now(), &process.name, format_args!("{fault:?} at {what}"));
            }
            fault
        };
        match fault {
            Some(Fault::ErrorBefore) => return Err(KvError::Unavailable("injected: refused".to_owned())),
            Some(Fault::AbortBefore) => process.kill("before a call to etcd"),
            Some(Fault::HangBefore) => {
                let length = world.between(500, 25_000);
                process.freeze(Duration::from_millis(length), "before a call to etcd");
            }
            _ => {}
        }
        let (answer, answered) = oneshot::channel();
        let done = Arc::new(AtomicBool::new(false));
        tokio::spawn(deliver(process.clone(), fault, what, apply, (answer, done.clone())));
        let answered = timeout(DEADLINE, answered).await;
        process.wait_until_running().await;
        match answered {
            Ok(Ok(answer)) => answer,
            _ if step.may_be_repeated() => Err(KvError::Unavailable("no answer in time".to_owned())),
            _ => {
                let done = done.load(Ordering::Relaxed);
                world.lock().count(if done { Event::AmbiguousDone } else { Event::AmbiguousNotDone });
                Err(KvError::Ambiguous("no answer in time".to_owned()))
            }
        }
    }
}

/// Delivers one request to etcd and the response back, whether or not the caller still waits.
async fn deliver<T: Send + 'static>(
    process: Arc<Process>,
    fault: Option<Fault>,
    what: String,
    apply: impl FnOnce(&mut State, Duration) -> KvResult<T> + Send + 'static,
    (answer, done): (oneshot::Sender<KvResult<T>>, Arc<AtomicBool>),
) {
    let world = process.world.clone();
    if fault == Some(Fault::HangBefore) {
        process.wait_until_running().await;
    }
    if process.is_dead() {
        return;
    }
    let delay = match fault {
        Some(Fault::LostRequest) => return lose_response(answer).await,
        Some(Fault::Late) => Duration::from_millis(world.between(5000, MAX_DELIVERY_DELAY.as_millis() as u64)),
        _ => world.lock().latency(),
    };
    sleep(delay).await;
    let sent = world.now();
    // A request delayed by a partition still arrives if the partition ends soon enough.
    while process.is_partitioned() || world.lock().etcd_down {
        if world.now() - sent + delay > MAX_DELIVERY_DELAY || world.chance(20) {
            return lose_response(answer).await;
        }
        sleep(Duration::from_millis(250)).await;
    }
    let result = {
        let now = world.now();
        let mut state = world.lock();
        let result = apply(&mut state, now);
        let outcome = match &result {
            Ok(_) => "",
            Err(_) => " refused",
        };
        state.log(now, &process.name, format_args!("{what}{outcome}"));
        if answer.is_closed() && result.is_ok() {
            state.count(Event::DoneLate);
        }
        done.store(true, Ordering::Relaxed);
        result
    };
    if world.lock().violation.is_some() {
        world.violation_found.notify_one();
    }
    match fault {
        Some(Fault::LostAnswer) => return lose_response(answer).await,
        Some(Fault::AbortAfter) => process.kill("after a call to etcd"),
        Some(Fault::HangAfter) => {
            let length = world.between(500, 25_000);
            process.freeze(Duration::from_millis(length), "after a call to etcd");
        }
        _ => {}
    }
    let delay = world.lock().latency();
    sleep(delay).await;
    if process.is_partitioned() {
        return lose_response(answer).await;
    }
    let _ = answer.send(result);
}

/// Loses a response: the caller gives up at its deadline.
async fn lose_response<T>(answer: oneshot::Sender<T>) {
    sleep(DEADLINE).await;
    drop(answer);
}

/// Summarizes a transaction, without anything that differs between two runs of a seed.
fn describe(txn: &Txn) -> String {
    let short = |key: &str| key.strip_prefix(PREFIX).unwrap_or(key).to_owned();
    let ops = txn.success.iter().map(|op| match op {
        Op::Put { key, .. } => format!("+{}", short(key)),
        Op::Delete(range) => format!("-{}", short(&range.start)),
        Op::Get(get) => format!("?{}", short(&get.range.start)),
        Op::Oldest { range, .. } => format!("?{}", short(&range.start)),
    });
    ops.collect::<Vec<_>>().join(", ")
}

impl Kv for Client {
    type Snapshot = Snapshot;

    fn name(&self) -> &'static str {
        "etcd"
    }

    fn deadline(&self) -> Duration {
        DEADLINE
    }

    async fn txn(&self, txn: Txn) -> KvResult<TxnResponse> {
        let what = describe(&txn);
        self.call(Step::of(&txn), what, move |state, now| {
            let owned = super::checks::stale(&state.etcd, &txn);
            let (result, changes) = state.etcd.txn(&txn)?;
            if !result.succeeded && owned {
                state.count(Event::StaleToken);
            }
            if !changes.is_empty() {
                state.log(now, "etcd", format_args!("revision {}", result.revision));
            }
            let State { checks, directories, .. } = state;
            if let Err(what) = checks.check_transaction(now, directories, &txn, &result, &changes) {
                state.log(now, "VIOLATED", &what);
                state.violation.get_or_insert(what);
            }
            Ok(result)
        })
        .await
    }

    async fn page(&self, get: Get, at: Option<Snapshot>) -> KvResult<Page<Snapshot>> {
        let what = format!("page {}", get.range.start.strip_prefix(PREFIX).unwrap_or_default());
        self.call(Step::Read, what, move |state, _| state.etcd.page(&get, at.as_ref())).await
    }

    async fn count(&self, keys: KeyRange, at: Option<Snapshot>) -> KvResult<u64> {
        self.call(Step::Read, "count".to_owned(), move |state, _| state.etcd.count(&keys, at.as_ref())).await
    }

    async fn list_and_watch(&self, range: KeyRange) -> KvResult<Watch> {
        let (send, receive) = mpsc::unbounded_channel();
        let followed =
            self.call(Step::Watch, "watch".to_owned(), move |state, _| Ok(state.etcd.list_and_watch(&range, send)));
        let (revision, keys) = followed.await?;
        Ok(Watch { revision, keys, events: Box::new(Watching { process: self.0.clone(), receive, ready: None }) })
    }

    async fn grant(&self, ttl: Duration) -> KvResult<(LeaseId, Duration)> {
        let ttl = Duration::from_secs(ttl.as_secs());
        self.call(Step::Lease, "grant".to_owned(), move |state, now| Ok((state.etcd.grant(now, ttl), ttl))).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> KvResult<()> {
        self.call(Step::Lease, format!("keep alive {lease}"), move |state, now| state.etcd.keep_alive(now, lease)).await
    }

    async fn revoke(&self, lease: LeaseId) -> KvResult<()> {
        self.call(Step::Lease, format!("revoke {lease}"), move |state, _| {
            state.etcd.revoke(lease);
            Ok(())
        })
        .await
    }

    async fn close(&self) {}
}

struct Watching {
    process: Arc<Process>,
    receive: mpsc::UnboundedReceiver<KvResult<Vec<Change>>>,
    /// Taken from `receive`, but not yet returned by `next`.
    ready: Option<KvResult<Vec<Change>>>,
}

impl EventStream for Watching {
    fn next(&mut self) -> BoxFuture<'_, KvResult<Vec<Change>>> {
        async {
            if self.ready.is_none() {
                self.ready = self.receive.recv().await;
            }
            let delay = {
                let mut state = self.process.world.lock();
                if state.faulty && state.rng.random_ratio(1, 20) { state.latency() * 10 } else { state.latency() }
            };
            sleep(delay.min(DEADLINE)).await;
            self.process.wait_until_running().await;
            // A stalled watch is noticed when its ping is not answered.
            if delay > DEADLINE {
                self.process.world.lock().count(Event::WatchStalled);
                return Err(KvError::Unavailable("the watch stalled".to_owned()));
            }
            if self.process.is_partitioned() {
                sleep(DEADLINE).await;
                return Err(KvError::Unavailable("the watch is partitioned".to_owned()));
            }
            self.ready.take().unwrap_or_else(|| Err(KvError::Unavailable("the watch ended".to_owned())))
        }
        .boxed()
    }
}
