//! Two things measured by turns, so that whatever else the machine does meets both.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use serde::Serialize;

/// How often the two take turns.
const TURNS: u32 = 8;

/// What is measured; it is given the number of the client, and one that no other call is given.
pub(crate) type Work = Arc<dyn Fn(usize, u64) -> BoxFuture<'static, ()> + Send + Sync>;

/// One thing beside the raw transaction.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) name: &'static str,
    /// How many did it at once.
    pub(crate) clients: usize,
    /// How often it was done in a second.
    pub(crate) ours_per_s: f64,
    /// How often the raw transaction was, by as many.
    pub(crate) raw_per_s: f64,
    /// The first over the second.
    pub(crate) ratio: f64,
    /// What the ratio should be at least, where there is a target.
    pub(crate) target: Option<f64>,
}

/// Measures `ours` beside `raw`, each for about `each` in all.
pub(crate) async fn beside(
    name: &'static str,
    clients: usize,
    target: Option<f64>,
    each: Duration,
    ours: Work,
    raw: Work,
) -> Row {
    let turn = each / TURNS;
    // Connections and caches.
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

/// Has so many clients do it over and over, each a task of its own and at least once; answers how often it was done, in what time.
pub(crate) async fn run(clients: usize, time: Duration, work: &Work) -> (u64, Duration) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let clients = (0..clients).map(|client| {
        let (work, stop) = (work.clone(), stop.clone());
        tokio::spawn(async move {
            let mut done = 0;
            loop {
                work(client, NUMBER.fetch_add(1, Ordering::Relaxed)).await;
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
