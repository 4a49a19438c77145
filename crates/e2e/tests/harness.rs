//! The environment of a test: a directory, an observability stack, a store, managers and a janitor, and clients for them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use gauntlet_api::v1::instance::instance_manager_client::InstanceManagerClient;
use gauntlet_stack::{
    Etcd, Options, Process, Ready, Registry, RegistryOptions, Spec, Stack,
    ports::{Reserved, Row},
};
use gauntlet_testing::{Poll, processes};
use serde_json::{Value, json};
use tonic::transport::Channel;

/// How long any condition that a test waits for may take.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Most attempts are requests to real processes.
pub(crate) const POLL: Poll = Poll::within(SOON).every(Duration::from_millis(100));

/// Variables that keep telemetry inside the process when there is no collector.
const UNEXPORTED: [&str; 3] = ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"];

/// The store that managers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Embedded,
    Etcd,
}

/// Tests run one at a time: each has the machine, and its own stack, to itself.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(crate) struct World {
    pub(crate) stack: Option<Stack>,
    pub(crate) etcd: Option<Etcd>,
    pub(crate) registry: Option<Registry>,
    pub(crate) runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
    /// The ports of instances.
    ports: Row,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    /// Without an observability stack.
    pub(crate) fn bare(backend: Backend) -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let etcd = (backend == Backend::Etcd).then(|| Etcd::start(dir.path().join("etcd")).unwrap());
        scenarios(&dir.path().join("scenarios"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { stack: None, etcd, registry: None, runtime, dir, ports: Row::any().unwrap(), _alone: alone }
    }

    /// With collector, Jaeger, Prometheus and Alertmanager.
    pub(crate) fn observed(backend: Backend) -> Self {
        Self::alerting(backend, None)
    }

    /// The same, with Alertmanager posting to `webhook`.
    pub(crate) fn alerting(backend: Backend, webhook: Option<String>) -> Self {
        let mut world = Self::bare(backend);
        let options = Options { webhook, ..Options::for_tests(world.path("stack")).unwrap() };
        world.stack = Some(Stack::start(options, &mut |line: &str| eprintln!("{line}")).unwrap());
        world
    }

    pub(crate) fn with_registry(mut self) -> Self {
        self.registry = Some(Registry::start(self.path("registry"), &RegistryOptions::default()).unwrap());
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn stack(&mut self) -> &mut Stack {
        self.stack.as_mut().unwrap()
    }

    /// Starts a manager on the store and waits until it is ready.
    pub(crate) fn manager(&self, name: &str) -> Manager {
        self.manager_with(name, &[])
    }

    /// The same with additional environment variables.
    pub(crate) fn manager_with(&self, name: &str, environment: &[(&str, String)]) -> Manager {
        let (api, debug) = (Reserved::any().unwrap(), Reserved::any().unwrap());
        let url = format!("http://127.0.0.1:{}", api.number());
        let mut spec = Spec::new(
            name,
            binary("gauntlet-manager"),
            self.path(&format!("{name}.log")),
            Ready::Http(format!("{url}/healthcheck")),
        );
        for (key, value) in [
            ("BIND", "127.0.0.1".to_owned()),
            ("PORT", api.number().to_string()),
            ("DEBUG_ADDRESS", format!("127.0.0.1:{}", debug.number())),
            ("DIR", self.path("data").display().to_string()),
            ("REPLICA", name.to_owned()),
            ("SCENARIO_ROOT", self.path("scenarios").display().to_string()),
            ("INSTANCE_PORTS", format!("{}-{}", self.ports.numbers().start(), self.ports.numbers().end())),
            ("INSTANCE_PATH", binaries().display().to_string()),
            ("OCI_INSECURE", "true".to_owned()),
            ("RECONCILE_EVERY", "2s".to_owned()),
            ("LEASE_TTL", "3s".to_owned()),
        ] {
            spec = spec.env(key, value);
        }
        if let Some(etcd) = &self.etcd {
            spec = spec.env("ETCD_ENDPOINTS", etcd.url());
        }
        for (key, value) in environment {
            spec = spec.env(key, value.as_str());
        }
        let process = Process::run(self.telemetry(spec)).unwrap();
        Manager { process, url, debug: format!("http://127.0.0.1:{}", debug.number()), _ports: [api, debug] }
    }

    fn telemetry(&self, spec: Spec) -> Spec {
        match &self.stack {
            None => UNEXPORTED.into_iter().fold(spec, |spec, key| spec.env(key, "none")),
            Some(stack) => stack.telemetry_env().into_iter().fold(spec, |spec, (key, value)| spec.env(key, value)),
        }
    }

    /// Runs the janitor once.
    pub(crate) fn janitor(&self, url: &str) -> Output {
        let mut command = Command::new(binary("gauntlet-janitor"));
        command.env("URL", url);
        match &self.stack {
            None => command.env("OTEL_SDK_DISABLED", "true"),
            Some(stack) => command.envs(stack.telemetry_env()),
        };
        command.output().unwrap()
    }

    /// Pushes an example's scenario to the registry and returns the reference.
    pub(crate) fn push(&self, example: &str) -> String {
        let reference = format!("{}/examples/{example}:v1", self.registry.as_ref().unwrap().address());
        let scenario = self.path("scenarios").join(example);
        let pushed = Command::new(binary("gauntlet"))
            .args(["scenario", "push", "--insecure"])
            .arg(scenario)
            .arg(&reference)
            .env("OTEL_SDK_DISABLED", "true")
            .output()
            .unwrap();
        assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
        reference
    }
}

/// Writes the scenarios of the examples, and one that fails to start, below one directory.
fn scenarios(root: &Path) {
    for example in ["web", "vault"] {
        let (from, to) =
            (gauntlet_stack::workspace_root().join("examples").join(example).join("scenario"), root.join(example));
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    std::fs::create_dir_all(root.join("broken")).unwrap();
    std::fs::write(
        root.join("broken/scenario.yaml"),
        "version: 1\nprovisioner: process\nprocess:\n  command: [\"/bin/sh\", \"-c\", \"echo no good; exit 3\"]\n\
         ports:\n  main: tcp\nready:\n  tcp: { port: main }\nconnection_info: \"nowhere\"\n",
    )
    .unwrap();
}

/// Returns the reference of a local scenario.
pub(crate) fn local(name: &str) -> String {
    format!("file://{name}")
}

pub(crate) struct Manager {
    pub(crate) process: Process,
    pub(crate) url: String,
    pub(crate) debug: String,
    _ports: [Reserved; 2],
}

/// A response of the REST API.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
    pub(crate) trace_parent: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {:?}", self.text))
    }

    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// Returns the results of a streamed response.
    pub(crate) fn lines(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        self.text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["result"].clone()).collect()
    }
}

impl Manager {
    pub(crate) fn call(&self, method: &str, path: &str, body: Option<&[u8]>) -> Answer {
        rest(&self.url, method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None)
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.call("DELETE", path, None)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.call("POST", path, Some(body.to_string().as_bytes()))
    }

    pub(crate) fn patch(&self, path: &str, body: &Value) -> Answer {
        self.call("PATCH", path, Some(body.to_string().as_bytes()))
    }

    pub(crate) fn create_challenge(&self, id: &str, scenario: &str, more: &Value) -> Value {
        let mut body = json!({ "id": id, "scenario": scenario });
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        self.post("/api/v1/challenge", &body).ok()
    }

    pub(crate) fn create_instance(&self, challenge: &str, source: &str) -> Answer {
        self.post("/api/v1/instance", &json!({ "challengeId": challenge, "sourceId": source }))
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(self.url.clone()).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn instances(&self) -> InstanceManagerClient<Channel> {
        InstanceManagerClient::new(self.channel().await)
    }
}

/// Calls the REST API at `url`.
///
/// # Errors
/// When there is no response.
pub(crate) fn rest(url: &str, method: &str, path: &str, body: Option<&[u8]>) -> Result<Answer, String> {
    rest_with(url, method, path, body, &[])
}

/// The same with additional headers.
pub(crate) fn rest_with(
    url: &str,
    method: &str,
    path: &str,
    body: Option<&[u8]>,
    headers: &[(&str, String)],
) -> Result<Answer, String> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(SOON))
        .http_status_as_error(false)
        .allow_non_standard_methods(true)
        .proxy(None)
        .build()
        .new_agent();
    let trace_parent = trace_parent();
    let mut request = ureq::http::Request::builder()
        .method(method)
        .uri(format!("{url}{path}"))
        .header("traceparent", &trace_parent)
        .header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request.body(body.unwrap_or_default().to_vec()).unwrap();
    let mut response = agent.run(request).map_err(|error| error.to_string())?;
    let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
    Ok(Answer { status: response.status().as_u16(), text, trace_parent })
}

/// Returns the web address in a connection info.
pub(crate) fn address(connection_info: &str) -> &str {
    let at = connection_info.find("http://").unwrap_or_else(|| panic!("no address in {connection_info:?}"));
    connection_info[at..].split([' ', ')']).next().unwrap()
}

/// Returns the traceparent of a new sampled trace, by whose id the caller finds it in Jaeger.
fn trace_parent() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let random = || RandomState::new().hash_one(Instant::now());
    format!("00-{:016x}{:016x}-{:016x}-01", random(), random(), random() | 1)
}

/// Returns the directory of the binaries built with this test.
pub(crate) fn binaries() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().to_path_buf()
}

pub(crate) fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.exists(), "{} is not built: cargo build --workspace --bins, or cargo xtask test", path.display());
    path
}

/// Polls until the attempt succeeds; panics with the last error when it does not within [`SOON`].
#[track_caller]
pub(crate) fn eventually<T>(what: &str, attempt: impl FnMut() -> Result<T, String>) -> T {
    POLL.until_blocking(what, attempt)
}

/// Returns the page that a player sees at an address.
pub(crate) fn fetch(url: &str) -> Result<String, String> {
    let agent =
        ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).proxy(None).build().new_agent();
    let mut response = agent.get(url).call().map_err(|error| error.to_string())?;
    response.body_mut().read_to_string().map_err(|error| error.to_string())
}

impl World {
    /// Counts the instances that have a working directory. The labels of deleted instances are kept for a while.
    pub(crate) fn instances(&self) -> usize {
        let homes = std::fs::read_dir(self.path("data/process/instances")).into_iter().flatten();
        homes.filter(|home| home.as_ref().is_ok_and(|home| home.path().join("work").exists())).count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Instances outlive their manager. Some tests leave them running on purpose, and failed tests leave them, too.
        for pid in processes::below(self.dir.path()) {
            processes::kill(pid);
        }
        // The killed supervisors cannot remove their control groups. A group can be removed once its processes have exited.
        let homes = std::fs::read_dir(self.path("data/process/instances")).into_iter().flatten().flatten();
        for group in homes.filter_map(|home| control_group(&home.path())) {
            let _ = POLL.try_until_blocking(|| match std::fs::remove_dir(&group) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            });
        }
    }
}

/// Returns the control group of the instance in that directory.
fn control_group(home: &Path) -> Option<PathBuf> {
    let state: Value = serde_json::from_slice(&std::fs::read(home.join("state.json")).ok()?).ok()?;
    Some(state["group"]["unified"].as_str()?.into())
}
