//! Measures each operation while a number of instances run.

use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use gauntlet_api::v1::instance::{DeleteInstanceRequest, RenewInstanceRequest};
use gauntlet_stack::ports::Reserved;
use serde::Serialize;

use crate::cluster::{Cluster, program};

/// The challenge whose instances are created and deleted.
const MEASURED: &str = "measured";
/// The challenge whose pooled instances are claimed.
const POOLED: &str = "pooled";
/// The number of concurrent clients in the `together` measurements.
const CLIENTS: usize = 64;

/// How often each operation is measured.
pub(crate) struct Effort {
    alone: usize,
    together: usize,
}

impl Effort {
    /// One client makes `operations` calls; [`CLIENTS`] clients make four times as many in total.
    pub(crate) fn of(operations: usize) -> Self {
        Self { alone: operations, together: operations * 4 }
    }
}

/// The figures of one level: operations per second, and times in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Level {
    pub(crate) create_alone: f64,
    pub(crate) create_together: f64,
    pub(crate) claim_alone: f64,
    pub(crate) renew_alone: f64,
    pub(crate) renew_together: f64,
    pub(crate) delete_alone: f64,
    pub(crate) delete_together: f64,
    /// The median of a create without a pool, by one client.
    pub(crate) create_ms: f64,
    /// The median time from starting the same program directly until it listens. Measured alternately with the creates.
    pub(crate) raw_start_ms: f64,
    pub(crate) restart_ms: f64,
    pub(crate) reconcile_ms: f64,
    pub(crate) list_ms: f64,
}

/// The next unused source; each source is used once per run.
static NEXT_SOURCE: AtomicUsize = AtomicUsize::new(1_000_000);

fn sources(count: usize) -> std::ops::Range<usize> {
    let first = NEXT_SOURCE.fetch_add(count, Ordering::Relaxed);
    first..first + count
}

impl Level {
    pub(crate) async fn measure(cluster: &mut Cluster, effort: &Effort) -> Self {
        cluster.create_challenge(MEASURED, "web", 0).await;
        let alone = sources(effort.alone);
        let (mut creates, mut raw) = (Vec::new(), Vec::new());
        for source in alone.clone() {
            raw.push(raw_start());
            let started = Instant::now();
            cluster.create(MEASURED, source).await;
            creates.push(started.elapsed());
        }
        let create_alone = creates.len() as f64 / creates.iter().sum::<Duration>().as_secs_f64();
        let renew_alone = rate(1, alone.clone(), |source| renew(cluster, source)).await;
        let delete_alone = rate(1, alone, |source| delete(cluster, source)).await;

        let together = sources(effort.together);
        let create_together = rate(CLIENTS, together.clone(), |source| cluster.create(MEASURED, source)).await;
        let renew_together = rate(CLIENTS, together.clone(), |source| renew(cluster, source)).await;
        let delete_together = rate(CLIENTS, together, |source| delete(cluster, source)).await;
        cluster.delete_challenge(MEASURED).await;

        cluster.create_challenge(POOLED, "idle", effort.alone).await;
        let claim_alone = rate(1, sources(effort.alone), |source| cluster.create(POOLED, source)).await;
        cluster.delete_challenge(POOLED).await;

        let restart = cluster.restart().await;
        let reconcile = cluster.reconcile_pass().await;
        let started = Instant::now();
        list(cluster).await;
        Self {
            create_alone,
            create_together,
            claim_alone,
            renew_alone,
            renew_together,
            delete_alone,
            delete_together,
            create_ms: median(creates),
            raw_start_ms: median(raw),
            restart_ms: milliseconds(restart),
            reconcile_ms: milliseconds(reconcile),
            list_ms: milliseconds(started.elapsed()),
        }
    }
}

/// Returns the operations per second with that many concurrent clients.
async fn rate<F: Future<Output = ()>>(
    clients: usize,
    sources: std::ops::Range<usize>,
    operation: impl Fn(usize) -> F,
) -> f64 {
    let (count, started) = (sources.len(), Instant::now());
    futures::stream::iter(sources).map(operation).buffer_unordered(clients).for_each(async |()| {}).await;
    count as f64 / started.elapsed().as_secs_f64()
}

async fn renew(cluster: &Cluster, source: usize) {
    let request = RenewInstanceRequest { challenge_id: MEASURED.to_owned(), source_id: source.to_string() };
    cluster.instances.clone().renew_instance(request).await.expect("renew an instance");
}

async fn delete(cluster: &Cluster, source: usize) {
    let request = DeleteInstanceRequest { challenge_id: MEASURED.to_owned(), source_id: source.to_string() };
    cluster.instances.clone().delete_instance(request).await.expect("delete an instance");
}

/// Lists every challenge with all its instances.
async fn list(cluster: &Cluster) {
    let mut stream = cluster.challenges.clone().query_challenge(()).await.expect("list").into_inner();
    while stream.message().await.expect("a challenge").is_some() {}
}

/// Starts the program that instances run, without a manager, and waits until it accepts a connection.
fn raw_start() -> Duration {
    let port = Reserved::any().expect("a free port").number();
    let started = Instant::now();
    let mut child = Command::new(program("example-web"))
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .env("FLAG", "none")
        .stdout(Stdio::null())
        .spawn()
        .expect("start the program");
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        assert!(started.elapsed() < Duration::from_secs(10), "example-web does not listen on port {port}");
        std::thread::sleep(Duration::from_micros(100));
    }
    let elapsed = started.elapsed();
    child.kill().and_then(|()| child.wait()).expect("stop the program");
    elapsed
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    milliseconds(times[times.len() / 2])
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
