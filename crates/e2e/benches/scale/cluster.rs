//! One manager on one etcd, and its instances.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use gauntlet_api::v1::challenge::challenge_store_client::ChallengeStoreClient;
use gauntlet_api::v1::challenge::{CreateChallengeRequest, DeleteChallengeRequest};
use gauntlet_api::v1::instance::CreateInstanceRequest;
use gauntlet_api::v1::instance::instance_manager_client::InstanceManagerClient;
use gauntlet_stack::ports::Reserved;
use gauntlet_stack::{Etcd, Process, Ready, Spec, http};
use tonic::transport::Channel;

/// The challenge whose instances run in the background of the measurements.
const BACKGROUND: &str = "background";
/// The number of background instances created concurrently.
const FILL_CONCURRENCY: usize = 16;
/// The limit for each wait.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);

/// A scenario whose instances do nothing.
const IDLE: &str = r#"version: 1
provisioner: process
process:
  command: ["/bin/sh", "-c", "echo up; exec sleep infinity"]
ready:
  output: { contains: up }
connection_info: idle
"#;
/// A scenario whose instances listen on a port, as most do.
const WEB: &str = r#"version: 1
provisioner: process
process:
  command: ["example-web", "--listen", "127.0.0.1:{{ ports.http }}"]
  env: { FLAG: none }
ports: { http: tcp }
ready:
  tcp: { port: http }
connection_info: "{{ ports.http }}"
"#;

pub(crate) struct Cluster {
    pub(crate) challenges: ChallengeStoreClient<Channel>,
    pub(crate) instances: InstanceManagerClient<Channel>,
    manager: Process,
    debug: String,
    running: usize,
    dir: tempfile::TempDir,
    _etcd: Etcd,
    _ports: [Reserved; 2],
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, scenario) in [("idle", IDLE), ("web", WEB)] {
            let scenarios = dir.path().join("scenarios").join(name);
            fs::create_dir_all(&scenarios).expect("a directory for the scenario");
            fs::write(scenarios.join("scenario.yaml"), scenario).expect("write the scenario");
        }
        let etcd = Etcd::start(dir.path().join("etcd")).expect("start etcd");
        let ports = [Reserved::any().expect("a free port"), Reserved::any().expect("a free port")];
        let (url, debug) =
            (format!("http://127.0.0.1:{}", ports[0].number()), format!("127.0.0.1:{}", ports[1].number()));
        let mut spec = Spec::new(
            "gauntlet-manager",
            program("gauntlet-manager"),
            dir.path().join("manager.log"),
            Ready::Http(format!("{url}/healthcheck")),
        );
        for (name, value) in [
            ("BIND", "127.0.0.1".to_owned()),
            ("PORT", ports[0].number().to_string()),
            ("DEBUG_ADDRESS", debug.clone()),
            ("DIR", dir.path().join("data").display().to_string()),
            ("ETCD_ENDPOINTS", etcd.url()),
            ("SCENARIO_ROOT", dir.path().join("scenarios").display().to_string()),
            ("INSTANCE_PATH", programs().display().to_string()),
            ("RECONCILE_EVERY", "5s".to_owned()),
            ("OTEL_TRACES_EXPORTER", "none".to_owned()),
            ("OTEL_METRICS_EXPORTER", "none".to_owned()),
            ("OTEL_LOGS_EXPORTER", "none".to_owned()),
        ] {
            spec = spec.env(name, value);
        }
        spec.ready_within = DEADLINE;
        spec.stop_within = DEADLINE;
        let manager = Process::run(spec).expect("start the manager");
        let channel = Channel::from_shared(url).expect("an address").connect_lazy();
        let cluster = Self {
            challenges: ChallengeStoreClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            instances: InstanceManagerClient::new(channel),
            manager,
            debug: format!("http://{debug}"),
            running: 0,
            dir,
            _etcd: etcd,
            _ports: ports,
        };
        cluster.create_challenge(BACKGROUND, "idle", 0).await;
        cluster
    }

    /// Creates a challenge and waits until its pool has `pool` instances. Claims do not refill the pool.
    pub(crate) async fn create_challenge(&self, id: &str, scenario: &str, pool: usize) {
        let bound = i64::try_from(pool).expect("a small number");
        let request = CreateChallengeRequest {
            id: id.to_owned(),
            scenario: format!("file://{scenario}"),
            timeout: Some(prost_types::Duration { seconds: 86_400, nanos: 0 }),
            min: bound,
            max: bound,
            ..CreateChallengeRequest::default()
        };
        self.challenges.clone().create_challenge(request).await.expect("create a challenge");
        self.wait("the pool to be full", || self.directories() >= self.running + pool).await;
    }

    pub(crate) async fn delete_challenge(&self, id: &str) {
        let request = DeleteChallengeRequest { id: id.to_owned() };
        self.challenges.clone().delete_challenge(request).await.expect("delete a challenge");
    }

    pub(crate) async fn create(&self, challenge: &str, source: usize) {
        let request = CreateInstanceRequest {
            challenge_id: challenge.to_owned(),
            source_id: source.to_string(),
            ..CreateInstanceRequest::default()
        };
        self.instances.clone().create_instance(request).await.expect("create an instance");
    }

    /// Creates background instances until `running` of them run.
    pub(crate) async fn fill(&mut self, running: usize) {
        let this = &*self;
        let mut created = futures::stream::iter(this.running..running)
            .map(|source| this.create(BACKGROUND, source))
            .buffer_unordered(FILL_CONCURRENCY);
        let mut count = this.running;
        while created.next().await.is_some() {
            count += 1;
            if count.is_multiple_of(500) {
                eprintln!("{count} instances run");
            }
        }
        drop(created);
        self.running = running.max(self.running);
    }

    /// Restarts the manager while its instances keep running. Returns the time from its start until it serves.
    pub(crate) async fn restart(&mut self) -> Duration {
        tokio::task::block_in_place(|| {
            self.manager.stop().expect("stop the manager");
            let started = Instant::now();
            self.manager.start().expect("start the manager");
            started.elapsed()
        })
    }

    /// Returns the median duration of a reconcile pass, over at least three passes since the last restart.
    pub(crate) async fn reconcile_pass(&self) -> Duration {
        let read = || {
            let state = http::get_json(&format!("{}/debug/state.json", self.debug)).expect("the debug page's state");
            let operations = state["operations"].as_array().cloned().unwrap_or_default();
            operations.into_iter().find(|operation| operation["name"] == "reconcile")
        };
        let passes = |operation: Option<serde_json::Value>| operation.and_then(|found| found["count"].as_u64());
        self.wait("three reconcile passes", || passes(read()).is_some_and(|count| count >= 3)).await;
        let median = read().and_then(|operation| operation["latency"]["p50"].as_f64());
        Duration::from_secs_f64(median.expect("a pass within the last minute") / 1000.0)
    }

    /// Counts the directories of running instances, including pooled ones.
    fn directories(&self) -> usize {
        let entries = fs::read_dir(self.dir.path().join("data/process/instances")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().join("ready").exists() || entry.path().join("state.json").exists()).count()
    }

    async fn wait(&self, what: &str, mut met: impl FnMut() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !met() {
            assert!(Instant::now() < deadline, "timed out after {DEADLINE:?} waiting for {what}");
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Instances outlive their manager, so delete them first.
        let mut challenges = self.challenges.clone();
        let request = DeleteChallengeRequest { id: BACKGROUND.to_owned() };
        let deleted = tokio::task::block_in_place(|| {
            let deletion = tokio::time::timeout(DEADLINE, challenges.delete_challenge(request));
            tokio::runtime::Handle::current().block_on(deletion)
        });
        if !matches!(deleted, Ok(Ok(_))) {
            eprintln!("cannot delete the challenge {BACKGROUND}: its instances are still running");
        }
    }
}

/// Returns the directory of the programs built with this bench.
fn programs() -> PathBuf {
    let bench = std::env::current_exe().expect("the path of this program");
    bench.ancestors().nth(2).expect("a directory two levels up").to_path_buf()
}

/// Returns the path of a program built with this bench.
pub(crate) fn program(name: &str) -> PathBuf {
    let path = programs().join(name);
    assert!(path.exists(), "{} is missing: run `cargo xtask bench scale`, which builds it", path.display());
    path
}
