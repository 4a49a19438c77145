//! What the tests share: scripts to launch, and a directory whose instances end with the test.

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
    ChallengeId, Error, Identity, LaunchPlan, LaunchRequest, Limits, Outputs, Placement, PortSpec, Probe, Protocol,
    Provisioner, Readiness, Result,
};
use gauntlet_provision::process::{Config, Process};
use gauntlet_stack::ports::Row;
use rustix::process::{Pid, Signal};

/// A scenario written down in a test. `LISTEN`, `PORT` and `GREETING` are in its environment.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) files: PathBuf,
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) probe: Probe,
    pub(crate) timeout: Duration,
    pub(crate) limits: Limits,
    pub(crate) ports: Vec<PortSpec>,
    pub(crate) greeting: String,
}

impl Script {
    /// Runs a shell script; `$GREETER` is the greeter.
    pub(crate) fn shell(files: &Path, script: &str) -> Self {
        Self {
            files: files.to_owned(),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: BTreeMap::from([("GREETER".to_owned(), greeter().display().to_string())]),
            probe: Probe::Tcp { port: "main".to_owned() },
            timeout: Duration::from_secs(20),
            limits: Limits::default(),
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

/// Whole launches, as the use cases do them.
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

/// What is said on a port, or nothing if nobody listens.
pub(crate) fn said(connection_info: &str) -> Option<String> {
    let mut text = String::new();
    TcpStream::connect(connection_info).ok()?.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Looks until it is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process of that number runs.
pub(crate) fn runs(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

pub(crate) fn kill(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A directory of the process backend. Its instances end with it.
pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: Config,
    _ports: Row,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let ports = Row::any().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("data"));
        config.shim = Some(env!("CARGO_BIN_EXE_gauntlet-shim").into());
        config.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        config.ports = ports.numbers();
        config.grace = Duration::from_millis(300);
        std::fs::create_dir(dir.path().join("files")).unwrap();
        Self { dir, config, _ports: ports }
    }

    /// Without control groups, as where none can be made.
    pub(crate) fn without_cgroups() -> Self {
        let mut rig = Self::new();
        rig.config.cgroups = false;
        rig
    }

    /// With control groups (where they can be made) and without.
    pub(crate) fn each() -> [Self; 2] {
        [Self::new(), Self::without_cgroups()]
    }

    /// The control group of an instance, once all that runs is in it.
    pub(crate) fn cgroup(&self, home: &Path) -> Option<PathBuf> {
        let state = || state(home).filter(|state| !state["cgroup"].is_null());
        if self.config.cgroups {
            until("it is in its control group", || state().is_some_and(|state| state["gathered"] == true));
        }
        Some(state()?["cgroup"].as_str()?.into())
    }

    /// Another manager on the same directory.
    pub(crate) fn manager(&self) -> Process {
        Process::new(self.config.clone()).unwrap()
    }

    pub(crate) fn script(&self, script: &str) -> Script {
        Script::shell(&self.dir.path().join("files"), script)
    }

    /// Puts a shell script among the scenario's files.
    pub(crate) fn program(&self, name: &str, script: &str) -> PathBuf {
        let path = self.dir.path().join("files").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// The greeter.
    pub(crate) fn greeter(&self) -> Script {
        self.script("exec $GREETER")
    }

    pub(crate) fn homes(&self) -> Vec<PathBuf> {
        let instances = std::fs::read_dir(self.config.dir.join("instances"));
        let mut homes: Vec<_> = instances.into_iter().flatten().map(|e| e.unwrap().path()).collect();
        homes.sort();
        homes
    }

    /// The only instance's directory.
    pub(crate) fn home(&self) -> PathBuf {
        let mut homes = self.homes();
        assert_eq!(homes.len(), 1);
        homes.remove(0)
    }

    /// The reserved ports.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let entries = std::fs::read_dir(self.config.dir.join("ports")).unwrap();
        entries.map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
    }

    /// The process ids of supervisor and first process. The supervisor may record them after the program answers: waits until it has.
    pub(crate) fn pids(&self, home: &Path) -> Option<(i32, i32)> {
        until("its supervisor has recorded what runs", || recorded(home).is_some());
        recorded(home)
    }

    /// What a script wrote to a file of its own.
    pub(crate) fn wrote(&self, home: &Path, name: &str) -> String {
        std::fs::read_to_string(home.join("work").join(name)).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for home in self.homes() {
            if let Some((shim, _)) = recorded(&home).filter(|(shim, _)| runs(*shim)) {
                // Also one that was stopped.
                for signal in [Signal::TERM, Signal::CONT] {
                    let _ = rustix::process::kill_process(Pid::from_raw(shim).unwrap(), signal);
                }
                let deadline = Instant::now() + Duration::from_secs(5);
                while runs(shim) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// The process ids of supervisor and first process, once they are recorded.
fn recorded(home: &Path) -> Option<(i32, i32)> {
    let state = state(home)?;
    let pid = |who: &str| state[who]["pid"].as_i64().map(|pid| pid as i32);
    Some((pid("shim")?, pid("child")?))
}

fn state(home: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(home.join("state.json")).ok()?).ok()
}
