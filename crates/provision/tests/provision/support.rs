//! Scripts to launch, and a data directory of the process backend whose instances stop with the test.

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeId, Error, Identity, Isolation, LaunchPlan, LaunchRequest, Limits, Outputs, Placement, PortSpec, Probe,
    Protocol, Provisioner, Readiness, Result,
};
use gauntlet_provision::process::{Config, Level, Process};
use gauntlet_stack::ports::Row;
use gauntlet_testing::{eventually_blocking, processes::is_running};
use rustix::process::{Pid, Signal};

/// A scenario. `LISTEN`, `PORT` and `GREETING` are in its environment.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) files: PathBuf,
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) probe: Probe,
    pub(crate) timeout: Duration,
    pub(crate) limits: Limits,
    pub(crate) isolation: Option<Isolation>,
    pub(crate) ports: Vec<PortSpec>,
    pub(crate) greeting: String,
}

impl Script {
    /// Creates a shell script; `$GREETER` is the name of the greeter.
    pub(crate) fn shell(files: &Path, script: &str) -> Self {
        Self {
            files: files.to_owned(),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: BTreeMap::from([("GREETER".to_owned(), "greeter".to_owned())]),
            probe: Probe::Tcp { port: "main".to_owned() },
            timeout: Duration::from_secs(20),
            limits: Limits::default(),
            isolation: None,
            ports: vec![PortSpec { name: "main".to_owned(), protocol: Protocol::Tcp }],
            greeting: "hello".to_owned(),
        }
    }

    pub(crate) fn greeting(mut self, greeting: &str) -> Self {
        self.greeting = greeting.to_owned();
        self
    }

    pub(crate) fn probe(mut self, probe: Probe) -> Self {
        self.probe = probe;
        self
    }

    fn render(&self, placement: &Placement) -> LaunchPlan {
        let mut env = self.env.clone();
        let port = placement.ports.get("main").copied().unwrap_or(0);
        env.insert("LISTEN".to_owned(), format!("127.0.0.1:{port}"));
        env.insert("PORT".to_owned(), port.to_string());
        env.insert("GREETING".to_owned(), self.greeting.clone());
        LaunchPlan {
            ports: self.ports.clone(),
            files: self.files.clone(),
            command: self.command.clone(),
            env,
            readiness: Readiness {
                probe: self.probe.clone(),
                interval: Duration::from_millis(50),
                timeout: self.timeout,
            },
            limits: self.limits.clone(),
            isolation: self.isolation,
            connection_info: format!("{}:{port}", placement.host),
            flags: vec![format!("FLAG{{{}}}", self.greeting)],
        }
    }
}

/// A script to launch for an instance.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) challenge: ChallengeId,
    pub(crate) identity: Identity,
    pub(crate) generation: u64,
    pub(crate) script: Script,
}

impl Launch {
    pub(crate) async fn reserve(&self, provisioner: &(impl Provisioner + ?Sized)) -> Result<Placement> {
        provisioner.reserve(&self.challenge, &self.identity, self.generation, &self.script.ports).await
    }

    pub(crate) fn request(&self, placement: Placement) -> LaunchRequest {
        LaunchRequest {
            challenge: self.challenge.clone(),
            identity: self.identity.clone(),
            generation: self.generation,
            digest: format!("sha256:{:064x}", 1),
            plan: self.script.render(&placement),
            placement,
        }
    }
}

/// Reserves and launches in one call, as the use cases do.
#[async_trait]
pub(crate) trait LaunchExt: Provisioner {
    async fn launch(&self, launch: &Launch) -> Result<Outputs> {
        for _ in 0..2 {
            match self.up(&launch.request(launch.reserve(self).await?)).await {
                Err(Error::PortTaken { .. }) => {}
                launched => return launched,
            }
        }
        self.up(&launch.request(launch.reserve(self).await?)).await
    }

    async fn relaunch(&self, launch: &Launch) -> Result<Outputs> {
        self.update(&launch.request(launch.reserve(self).await?)).await
    }
}

impl<P: Provisioner + ?Sized> LaunchExt for P {}

pub(crate) fn greeter() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_gauntlet-shim")).parent().unwrap().join("examples/greeter")
}

pub(crate) fn challenge(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

pub(crate) fn launch(identity: u64, generation: u64, script: &Script) -> Launch {
    Launch {
        challenge: challenge("a challenge"),
        identity: Identity::from_bits(identity),
        generation,
        script: script.clone(),
    }
}

/// Connects and returns what the program sends; `None` if nothing listens.
pub(crate) fn greeting_at(connection_info: &str) -> Option<String> {
    let mut text = String::new();
    TcpStream::connect(connection_info).ok()?.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Removes the instance, regardless of its generation.
pub(crate) async fn remove(manager: &Process, identity: u64) {
    manager.down(&challenge("a challenge"), &Identity::from_bits(identity), u64::MAX).await.unwrap();
}

/// The step and the detail of an [`Error::Provision`].
pub(crate) fn provision_error(error: Error) -> String {
    match error {
        Error::Provision { step, detail } => format!("{step}: {detail}"),
        other => panic!("{other}"),
    }
}

pub(crate) fn send_signal(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A data directory of the process backend. Dropping it stops its instances.
pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: Config,
    _ports: Row,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let ports = Row::any().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("data"));
        config.supervisor = Some(env!("CARGO_BIN_EXE_gauntlet-shim").into());
        config.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        config.ports = ports.numbers();
        config.grace = Duration::from_millis(300);
        config.path.insert(0, greeter().parent().unwrap().to_owned());
        std::fs::create_dir(dir.path().join("files")).unwrap();
        Self { dir, config, _ports: ports }
    }

    /// Without isolation: for tests that look at the instance's files and processes as the machine sees them.
    pub(crate) fn on_host() -> Self {
        let mut fixture = Self::new();
        fixture.config.isolation = Some(Level::None);
        fixture
    }

    /// Without control groups, as on a machine where none can be created.
    pub(crate) fn without_cgroups() -> Self {
        let mut fixture = Self::new();
        fixture.config.cgroups = false;
        fixture
    }

    /// As [`Fixture::with_and_without_cgroups`], without isolation.
    pub(crate) fn on_host_with_and_without_cgroups() -> [Self; 2] {
        Self::with_and_without_cgroups().map(|mut fixture| {
            fixture.config.isolation = Some(Level::None);
            fixture
        })
    }

    /// One with control groups (where they can be created) and one without.
    pub(crate) fn with_and_without_cgroups() -> [Self; 2] {
        [Self::new(), Self::without_cgroups()]
    }

    /// Returns the v2 directory of an instance's control group.
    pub(crate) fn cgroup(&self, dir: &Path) -> Option<PathBuf> {
        Some(state(dir)?["group"]["unified"].as_str()?.into())
    }

    /// Creates a manager of this directory.
    pub(crate) fn manager(&self) -> Process {
        Process::new(self.config.clone()).unwrap()
    }

    pub(crate) fn script(&self, script: &str) -> Script {
        Script::shell(&self.dir.path().join("files"), script)
    }

    /// Adds a shell script to the scenario's files.
    pub(crate) fn program(&self, name: &str, script: &str) -> PathBuf {
        let path = self.dir.path().join("files").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    pub(crate) fn greeter(&self) -> Script {
        self.script("exec $GREETER")
    }

    pub(crate) fn instance_dirs(&self) -> Vec<PathBuf> {
        let instances = std::fs::read_dir(self.config.dir.join("instances"));
        let mut dirs: Vec<_> = instances.into_iter().flatten().map(|e| e.unwrap().path()).collect();
        dirs.sort();
        dirs
    }

    /// The directory of the only instance.
    pub(crate) fn instance_dir(&self) -> PathBuf {
        let mut dirs = self.instance_dirs();
        assert_eq!(dirs.len(), 1);
        dirs.remove(0)
    }

    /// Returns the reserved ports.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let entries = std::fs::read_dir(self.config.dir.join("ports")).unwrap();
        entries.map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
    }

    /// Returns the process ids of supervisor and program. Waits until they are recorded, which may be after the program is ready.
    pub(crate) fn pids(&self, dir: &Path) -> Option<(i32, i32)> {
        eventually_blocking("the supervisor has recorded the process ids", || recorded(dir).is_some());
        recorded(dir)
    }

    /// Returns the content of a file in the instance's working directory; empty if it doesn't exist.
    pub(crate) fn file(&self, dir: &Path, name: &str) -> String {
        std::fs::read_to_string(work(dir).join(name)).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for dir in self.instance_dirs() {
            if let Some((supervisor, _)) = recorded(&dir).filter(|(supervisor, _)| is_running(*supervisor)) {
                // SIGCONT for a supervisor that a test has stopped.
                for signal in [Signal::TERM, Signal::CONT] {
                    let _ = rustix::process::kill_process(Pid::from_raw(supervisor).unwrap(), signal);
                }
                let deadline = Instant::now() + Duration::from_secs(5);
                while is_running(supervisor) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// Returns the process ids of supervisor and program, once they are recorded.
fn recorded(dir: &Path) -> Option<(i32, i32)> {
    let state = state(dir)?;
    let pid = |name: &str| state[name]["pid"].as_i64().map(|pid| pid as i32);
    Some((pid("shim")?, pid("child")?))
}

/// The working directory of an instance: if it has a root of its own, through that of its first process.
pub(crate) fn work(dir: &Path) -> PathBuf {
    match state(dir) {
        Some(state) if ["uid", "userns"].iter().any(|level| state["isolation"] == *level) => {
            format!("/proc/{}/root/work", state["child"]["pid"]).into()
        }
        _ => dir.join("work"),
    }
}

/// What the supervisor has recorded about the run.
pub(crate) fn state(dir: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(dir.join("state.json")).ok()?).ok()
}
