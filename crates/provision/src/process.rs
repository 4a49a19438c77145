//! Instances as groups of processes on this machine.
//!
//! Each instance has a supervisor of its own ([`shim`]) that outlives the manager, and a directory:
//!
//! ```text
//! <dir>/instances/<hash of the challenge>-<identity>/
//!     label.json      challenge, identity, generation; locked while somebody works on the instance; stays for an hour after it is gone
//!     instance.json   ports and what to run; holds secrets
//!     run.lock        locked for as long as the supervisor lives: how a manager finds it again, and why it is never doubled
//!     state.json      supervisor, first process, how it ended
//!     ready           its probe has answered
//!     output.log      what it last wrote, and output.old.log before that
//!     work/           where it runs; its own
//! <dir>/ports/<port>  a link to the owner
//! <dir>/store.json    the store that all of it belongs to
//! ```
//!
//! Several managers of one machine (and one pid namespace) share the directory.
//!
//! It keeps instances apart from each other's ways, not from each other's reach: they run as the manager's user, with limits and without
//! new privileges, on its file system and network. It is for scenarios that are trusted with that. Where the manager runs under a service
//! manager that ends all processes of a service with it (systemd's default), tell it to end the main process only (`KillMode=process`),
//! or instances end with the manager and are brought up again when they are next asked for.

mod home;
mod launch;
mod mark;
mod output;
mod ports;
mod probe;
mod procfs;
mod record;
pub mod shim;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use async_trait::async_trait;
use gauntlet_domain::{ChallengeId, Error, Found, Identity, Limits, Order, Outputs, Place, Provisioner, Result};
use rustix::process::Signal;
use tokio::{
    process::{Child, Command},
    time::Instant,
};
use tracing::{Instrument as _, Span, field::Empty};

use self::{
    home::{Home, blocking, failed},
    ports::Ports,
    record::{READY, RECORD, Record, STATE, State, WORK},
};

/// The first pause between two probes; it grows to the scenario's interval.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// How much longer than an instance's grace its supervisor may take to end it, before it is killed itself; and how long what is killed
/// may take to be gone.
const STOP_PATIENCE: Duration = Duration::from_secs(6);
/// How long a supervisor may take to say that it is there.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// One probe may take this long.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);

/// Where and how instances run on this machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything that is kept; made if it is not there. What it holds is readable by its owner only.
    pub dir: PathBuf,
    /// What players call this machine.
    pub host: String,
    /// The address that instances listen on: ports are tried there. Probes ask there too, or on loopback if it is unspecified.
    pub bind: IpAddr,
    /// The ports to give out. Nothing else should listen there: what is in use is passed over, but what takes a port in the moment before
    /// its instance does may be mistaken for it.
    pub ports: RangeInclusive<u16>,
    /// The program to supervise with: one whose `main` begins with [`shim::run_if_requested`]. `None` is `gauntlet-shim` beside the running
    /// program, or else the running program itself.
    pub shim: Option<PathBuf>,
    /// Where programs are looked for that the scenario does not bring; also the `PATH` of instances.
    pub path: Vec<PathBuf>,
    /// What an instance may use whose scenario does not say.
    pub defaults: Limits,
    /// The most a scenario may ask for; `None` is no bound.
    pub maximums: Limits,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// How long to wait for another manager that works on the same instance.
    pub patience: Duration,
}

impl Config {
    /// Instances on all addresses, ports 20000 to 29999, called `127.0.0.1`; 1024 open files, 1 MiB of output, two seconds of grace.
    /// Programs are looked for beside the running one, then in the system's usual places.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
        let system = ["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from);
        Self {
            dir: dir.into(),
            host: Ipv4Addr::LOCALHOST.to_string(),
            bind: Ipv4Addr::UNSPECIFIED.into(),
            ports: 20_000..=29_999,
            shim: None,
            path: beside.into_iter().chain(system).collect(),
            defaults: Limits { open_files: Some(1024), output: Some(1 << 20), ..Limits::default() },
            maximums: Limits::default(),
            grace: Duration::from_secs(2),
            patience: Duration::from_secs(10),
        }
    }
}

/// The `process` backend of [`Provisioner`].
///
/// An order waits at most [`Config::patience`] for another manager, then as long as the plan's readiness timeout; taking down takes at
/// most the grace and a few seconds. Dropping a call's future leaves what it had done so far, on record: repeating the call goes on from
/// there.
#[derive(Debug, Clone)]
pub struct Process {
    config: Config,
    dir: PathBuf,
    shim: PathBuf,
    instances: PathBuf,
    ports: Ports,
    probed: IpAddr,
}

/// A span of one step, below the one of the call.
macro_rules! step {
    ($name:literal, $home:expr) => {
        tracing::info_span!(
            $name,
            otel.kind = "internal",
            provisioner = "process",
            instance.identity = $home.identity(),
            otel.status_code = Empty,
            "error.type" = Empty,
        )
    };
}

/// Does the work of a step in its span.
async fn step<T>(span: Span, work: impl Future<Output = Result<T>>) -> Result<T> {
    let result = work.instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", error.code());
    }
    result
}

/// What to do with what runs already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Running {
    Keep,
    Replace,
}

impl Process {
    /// Checks the configuration and makes the directory. Blocks, briefly.
    pub fn new(mut config: Config) -> Result<Self> {
        let refused = |detail: String| Error::Provision { step: "configure", detail };
        if config.ports.is_empty() || *config.ports.start() == 0 {
            return Err(refused(format!("ports {:?}: give a range such as 20000 to 29999", config.ports)));
        }
        // By one name for all managers, whatever links lead there.
        let dir = std::fs::create_dir_all(&config.dir)
            .and_then(|()| config.dir.canonicalize())
            .map_err(failed("configure", format!("directory {}", config.dir.display())))?;
        let (instances, ports) = (dir.join("instances"), dir.join("ports"));
        home::make(&instances)
            .and_then(|()| home::make(&ports))
            .map_err(failed("configure", format!("directory {}", dir.display())))?;
        // Instances run in directories of their own.
        for dir in &mut config.path {
            *dir = std::path::absolute(&*dir).map_err(failed("configure", format!("path {}", dir.display())))?;
        }
        let shim = match config.shim.clone() {
            Some(shim) => std::path::absolute(shim),
            None => std::env::current_exe().map(|exe| {
                let small = exe.with_file_name("gauntlet-shim");
                if small.is_file() { small } else { exe }
            }),
        };
        let shim = shim.map_err(failed("configure", "the supervisor's program"))?;
        if !shim.is_file() {
            return Err(refused(format!("the supervisor's program {} is not there", shim.display())));
        }
        let ports = Ports { dir: ports, instances: instances.clone(), range: config.ports.clone(), bind: config.bind };
        let probed = match config.bind {
            IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(address) if address.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
            address => address,
        };
        Ok(Self { config, dir, shim, instances, ports, probed })
    }

    /// Takes the directory for the store of that name, for good. To be called before any order of that store: an order's generation means
    /// something beside others of the same store only. One that belongs to no store yet is taken over as it is.
    ///
    /// # Errors
    /// [`Error::Provision`], saying what to do, if it belongs to another store.
    pub async fn claim(&self, store: &str) -> Result<()> {
        let (dir, store) = (self.dir.clone(), store.to_owned());
        blocking(move || mark::claim(&dir, &store)).await
    }

    /// Ends every instance and keeps what is recorded of it, as a machine that is shut down does: an `up` or `update` brings it back on its
    /// ports. Answers how many were running.
    pub async fn halt(&self) -> Result<usize> {
        let running: Vec<_> = self.list().await?.into_iter().filter(|found| found.alive).collect();
        let halts = running.iter().map(|found| async {
            let home = self.enter(&found.challenge, &found.identity, found.generation).await?;
            step(step!("provision.stop", home), self.stop(&home)).await.map(drop)
        });
        // One that does not end must not keep the others from it.
        let halted = futures::future::join_all(halts).await;
        halted.into_iter().collect::<Result<()>>().map(|()| running.len())
    }

    async fn bring(&self, order: &Order, running: Running) -> Result<Outputs> {
        let home = self.enter(&order.challenge, &order.identity, order.generation).await?;
        let alive = {
            let home = home.clone();
            blocking(move || Ok(free(&home)?.is_none())).await?
        };
        if alive
            && running == Running::Keep
            && let Some(record) = read::<Record>(&home, RECORD).await?
        {
            return self.settle(&home, &record, None).await;
        }
        // What a killed supervisor left goes before ports are given out: it may still hold them.
        let stopped = if alive { None } else { Some(self.stop(&home).await?) };
        // One that cannot be read is as good as none: it is written anew.
        let before = read::<Record>(&home, RECORD).await.unwrap_or(None);
        let ports = before.as_ref().map(|before| before.ports.clone()).unwrap_or_default();
        let allocate = self.allocate(home.clone(), order, ports, alive);
        let record = step(step!("provision.allocate", home), allocate).await?;
        let lock = match stopped {
            Some(lock) => lock,
            None if before.as_ref() == Some(&record) => return self.settle(&home, &record, None).await,
            None => step(step!("provision.stop", home), self.stop(&home)).await?,
        };
        let shim = step(step!("provision.start", home), self.start(home.clone(), record.clone(), lock)).await?;
        self.settle(&home, &record, Some(shim)).await
    }

    async fn enter(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<Home> {
        Home::enter(&self.instances, challenge, identity, generation, self.config.patience).await
    }

    /// Reserves ports and renders the plan with them.
    async fn allocate(
        &self,
        mut home: Home,
        order: &Order,
        before: BTreeMap<String, u16>,
        running: bool,
    ) -> Result<Record> {
        let (ports, config, plan) = (self.ports.clone(), self.config.clone(), order.plan.clone());
        blocking(move || {
            home.mark(false).map_err(failed("allocate", "recording the instance"))?;
            let work = home.dir.join(WORK);
            home::make(&work).map_err(failed("allocate", "making its directory"))?;
            let ports = ports.assign(&home.key, plan.ports(), &before, running)?;
            let place = Place { host: config.host.clone(), ports: ports.clone(), dir: work };
            let launch = launch::decide(&config, &place, plan.render(&place)?)?;
            Ok(Record { version: record::VERSION, ports, launch })
        })
        .await
    }

    /// Writes the record and starts a supervisor on it. The lock proves that there is none.
    async fn start(&self, home: Home, record: Record, lock: File) -> Result<Child> {
        let (dir, ports) = (home.dir.clone(), self.ports.clone());
        blocking(move || {
            let prepare = || -> io::Result<()> {
                record::remove(&home.dir.join(READY))?;
                record::remove(&home.dir.join(STATE))?;
                output::remove(&home.dir)?;
                record::write(&home.dir, RECORD, &record, true)
            };
            prepare().map_err(failed("start", "recording what to run"))?;
            drop(lock);
            ports.release(&home.key, &record.ports)
        })
        .await?;
        Command::new(&self.shim)
            .arg(shim::SUPERVISE)
            .arg(dir)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("start", format!("the supervisor {}", self.shim.display())))
    }

    /// Waits until it is ready; one that does not get there is ended, so that another try begins anew.
    async fn settle(&self, home: &Home, record: &Record, shim: Option<Child>) -> Result<Outputs> {
        if let Err(error) = step(step!("provision.ready", home), self.ready(home, record, shim)).await {
            if let Err(also) = step(step!("provision.stop", home), self.stop(home)).await {
                tracing::warn!(instance.identity = home.identity(), error = %also, "an instance that was not ready does not end");
            }
            return Err(error);
        }
        let Record { launch, .. } = record;
        Ok(Outputs { connection_info: launch.connection_info.clone(), flags: launch.flags.clone() })
    }

    async fn ready(&self, home: &Home, record: &Record, mut shim: Option<Child>) -> Result<()> {
        let (readiness, marked) = (&record.launch.readiness, home.dir.join(READY));
        if tokio::fs::try_exists(&marked).await.is_ok_and(|ready| ready) {
            return Ok(());
        }
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = readiness.timeout.saturating_sub(began.elapsed());
            let patience = left.clamp(FIRST_PAUSE, PROBE_PATIENCE);
            let answer = probe::ask(&readiness.probe, &record.ports, self.probed, &home.dir, patience).await;
            // Asked after the probe: what answered may have been something else on that port, if ours is gone.
            self.still_runs(home, record, &mut shim, began.elapsed()).await?;
            match answer {
                Ok(()) => {
                    return tokio::fs::write(&marked, "").await.map_err(failed("ready", "recording that it is"));
                }
                Err(answer) if left.is_zero() => {
                    return Err(Error::Provision {
                        step: "ready",
                        detail: format!(
                            "{} was probed for {:?} and at last: {answer}{}",
                            probe::describe(&readiness.probe, &record.ports, self.probed),
                            readiness.timeout,
                            said(home, record).await
                        ),
                    });
                }
                Err(_) => tokio::time::sleep(pause.min(left)).await,
            }
            pause = (pause * 3 / 2).min(readiness.interval.max(FIRST_PAUSE));
        }
    }

    /// Fails if the program has ended, or its supervisor without a word.
    async fn still_runs(&self, home: &Home, record: &Record, shim: &mut Option<Child>, since: Duration) -> Result<()> {
        let left = shim.as_mut().and_then(|shim| shim.try_wait().ok().flatten());
        let how = match (read::<State>(home, STATE).await?, left) {
            (Some(State { end: Some(end), .. }), _) => format!("the program {}", end.how),
            (Some(state), _) if procfs::lives(state.shim) => return Ok(()),
            // It may have written its last, and ended, since its state was read.
            (Some(_), _) => match read::<State>(home, STATE).await? {
                Some(State { end: Some(end), .. }) => format!("the program {}", end.how),
                _ => "its supervisor was killed".to_owned(),
            },
            (None, Some(status)) => format!("its supervisor {} ended with {status}", self.shim.display()),
            (None, None) if since < START_PATIENCE => return Ok(()),
            (None, None) => format!("its supervisor {} says nothing", self.shim.display()),
        };
        Err(Error::Provision { step: "ready", detail: format!("{how}{}", said(home, record).await) })
    }

    /// Ends whatever runs, whole. Answers the supervisor's lock: as long as it is held none can start.
    async fn stop(&self, home: &Home) -> Result<File> {
        let grace = read::<Record>(home, RECORD).await.ok().flatten().map_or(self.config.grace, |r| r.launch.grace);
        let began = Instant::now();
        let mut sent = None;
        let mut pause = Duration::from_millis(1);
        let lock = loop {
            let taken = home.clone();
            if let Some(lock) = blocking(move || free(&taken)).await? {
                break lock;
            }
            let signal = if began.elapsed() > grace + STOP_PATIENCE { Signal::KILL } else { Signal::TERM };
            // One that has only begun has not said yet who it is, and is told a moment later.
            if let Some(state) = read::<State>(home, STATE).await?.filter(|_| sent != Some(signal)) {
                procfs::signal(state.shim, signal).map_err(failed("stop", "signalling its supervisor"))?;
                sent = Some(signal);
            }
            if began.elapsed() > grace + 2 * STOP_PATIENCE {
                let detail = "its supervisor does not end, or runs where this manager does not see it".to_owned();
                return Err(Error::Provision { step: "stop", detail });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(Duration::from_millis(20));
        };
        let state = read::<State>(home, STATE).await.unwrap_or(None);
        if let Some(state) = state.filter(|state| !state.end.as_ref().is_some_and(|end| end.whole)) {
            let home = home.clone();
            blocking(move || {
                // After a reboot there is nothing left to end.
                if state.boot != procfs::boot() {
                    return Ok(());
                }
                let swept = procfs::sweep(&home.dir, &state, STOP_PATIENCE).map_err(failed("stop", "sweeping"))?;
                if swept > 0 {
                    tracing::warn!(
                        instance.identity = home.identity(),
                        swept,
                        "ended what a killed supervisor had left"
                    );
                }
                Ok(())
            })
            .await?;
        }
        Ok(lock)
    }
}

#[async_trait]
impl Provisioner for Process {
    fn name(&self) -> &'static str {
        "process"
    }

    async fn up(&self, order: &Order) -> Result<Outputs> {
        self.bring(order, Running::Keep).await
    }

    async fn update(&self, order: &Order) -> Result<Outputs> {
        self.bring(order, Running::Replace).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let mut home = self.enter(challenge, identity, generation).await?;
        let lock = step(step!("provision.stop", home), self.stop(&home)).await?;
        let ports = self.ports.clone();
        let remove = step!("provision.remove", home);
        let work = blocking(move || {
            home.clear().map_err(failed("remove", "removing its directory"))?;
            ports.release(&home.key, &BTreeMap::new())?;
            home.mark(true).map_err(failed("remove", "recording that it is gone"))?;
            drop(lock);
            Ok(())
        });
        step(remove, work).await
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let instances = self.instances.clone();
        blocking(move || home::list(&instances).map_err(failed("list", "reading the instances"))).await
    }
}

/// The supervisor's lock, if none lives.
fn free(home: &Home) -> Result<Option<File>> {
    record::run_lock(&home.dir).map_err(failed("find", "looking for its supervisor"))
}

async fn read<T: serde::de::DeserializeOwned + Send + 'static>(home: &Home, name: &'static str) -> Result<Option<T>> {
    let home = home.clone();
    blocking(move || record::read(&home.dir, name).map_err(failed("find", format!("reading {name}")))).await
}

/// The last lines of output, to end an error with.
async fn said(home: &Home, record: &Record) -> String {
    let (home, secrets) = (home.clone(), record.launch.flags.clone());
    match blocking(move || Ok(output::tail(&home.dir, &secrets))).await.unwrap_or_default() {
        tail if tail.is_empty() => "; it wrote nothing".to_owned(),
        tail => format!("; its last output:\n{tail}"),
    }
}
