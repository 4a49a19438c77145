//! Measures two workloads in turns, so that other load on the machine affects both.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use serde::Serialize;

/// The number of turns of each workload.
const TURNS: u32 = 8;

/// A workload; called with the client's number and a number that is unique to the call.
pub(crate) type Workload = Arc<dyn Fn(usize, u64) -> BoxFuture<'static, ()> + Send + Sync>;

/// A workload's rate compared with the raw transaction's.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// The workload.
    pub(crate) name: &'static str,
    /// The number of concurrent clients.
    pub(crate) clients: usize,
    /// Calls of the workload per second.
    pub(crate) ours_per_s: f64,
    /// Raw transactions per second with the same number of clients.
    pub(crate) raw_per_s: f64,
    /// `ours_per_s` divided by `raw_per_s`.
    pub(crate) ratio: f64,
    /// The lowest acceptable ratio, if there is a target.
    pub(crate) target: Option<f64>,
}

/// Compares `ours` with `raw`; measures each for about `time` in total.
pub(crate) async fn compare(
    name: &'static str,
    clients: usize,
    target: Option<f64>,
    time: Duration,
    ours: Workload,
    raw: Workload,
) -> Row {
    let turn = time / TURNS;
    // Warm-up: connections and caches.
    run(clients, turn / 4, &raw).await;
    run(clients, turn / 4, &ours).await;
    let (mut done_ours, mut done_raw) = ((0, Duration::ZERO), (0, Duration::ZERO));
    for _ in 0..TURNS {
        let (done, took) = run(clients, turn, &raw).await;
        done_raw = (done_raw.0 + done, done_raw.1 + took);
        let (done, took) = run(clients, turn, &ours).await;
        done_ours = (done_ours.0 + done, done_ours.1 + took);
    }
    let rate = |(done, took): (u64, Duration)| done as f64 / took.as_secs_f64();
    let (ours_per_s, raw_per_s) = (rate(done_ours), rate(done_raw));
    Row { name, clients, ours_per_s, raw_per_s, ratio: ours_per_s / raw_per_s, target }
}

/// Runs a workload in a loop on concurrent clients for `time`, at least once each. Returns the number of calls and the elapsed time.
pub(crate) async fn run(clients: usize, time: Duration, workload: &Workload) -> (u64, Duration) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let clients = (0..clients).map(|client| {
        let (workload, stop) = (workload.clone(), stop.clone());
        tokio::spawn(async move {
            let mut done = 0;
            loop {
                workload(client, NUMBER.fetch_add(1, Ordering::Relaxed)).await;
                done += 1;
                if stop.load(Ordering::Relaxed) {
                    return done;
                }
            }
        })
    });
    let clients: Vec<_> = clients.collect();
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    let mut done = 0;
    for client in clients {
        done += client.await.expect("a client panicked");
    }
    (done, started.elapsed())
}

impl Row {
    /// Prints a table.
    pub(crate) fn print(rows: &[Self]) {
        println!("{:<28} {:>7} {:>10} {:>10} {:>7} {:>7}", "", "clients", "ours/s", "raw/s", "ratio", "target");
        for Row { name, clients, ours_per_s, raw_per_s, ratio, target } in rows {
            let target = target.map_or(String::new(), |target| format!("{target:.2}"));
            println!("{name:<28} {clients:>7} {ours_per_s:>10.0} {raw_per_s:>10.0} {ratio:>7.2} {target:>7}");
        }
    }
}
