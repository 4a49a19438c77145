//! Instances as groups of processes on this machine.
//!
//! Each instance has a supervisor of its own ([`shim`]) that outlives the manager, and a directory:
//!
//! ```text
//! <dir>/instances/<hash of the challenge>-<identity>/
//!     label.json      challenge, identity, generation, reserved ports; locked while somebody works on the instance; stays for an hour after it is gone
//!     instance.json   ports and what to run; holds secrets
//!     state.json      supervisor, first process, how it ended
//!     supervisor.log  what went wrong with the supervisor, if something did
//!     ready           its probe has answered
//!     output.log      what it last wrote, and output.old.log before that
//!     work/           where it runs; its own
//! <dir>/run/<name of that directory>
//!                     locked for as long as the supervisor lives: how a manager finds it again, why it is never doubled, and how its end
//!                     is noticed
//! <dir>/ports/<port>  a link to the owner
//! <dir>/store.json    the store that all of it belongs to
//! ```
//!
//! Several managers of one machine (and one pid namespace) share the directory.
//!
//! Where control groups (v2) can be made below the manager's own, each instance has one, named `gauntlet-<hash of dir>-<name of that
//! directory>`. What an operation on an instance costs does not depend on what else runs: nothing that it waits for reads all of `/proc`, but
//! for one that finds a supervisor killed that had not put its instance into a group.
//!
//! It keeps instances apart from each other's ways, not from each other's reach: they run as the manager's user, with limits and without
//! new privileges, on its file system and network. It is for scenarios that are trusted with that. Where the manager runs under a service
//! manager that ends all processes of a service with it (systemd's default), tell it to end the main process only (`KillMode=process`),
//! or instances end with the manager and are brought up again when they are next asked for; and to leave groups below the manager's alone
//! (`Delegate=yes`).

mod cgroup;
mod ends;
mod handover;
mod home;
mod launch;
mod mark;
mod output;
mod ports;
mod probe;
mod procfs;
mod ready;
mod record;
mod restart;
pub mod shim;
mod standby;
mod stop;
mod timer;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::StreamExt as _;
use gauntlet_domain::{
    ChallengeId, Error, Identity, LaunchPlan, LaunchRequest, Limits, Outputs, Placement, PortHold, PortSpec,
    ProvisionedInstance, Provisioner, Result,
};
use tracing::{Instrument as _, Span};

use self::{
    cgroup::{Group, Groups},
    home::{Home, Wanted, blocking, failed},
    ports::{Held, Ports},
    ready::Shim,
    record::{LABEL, READY, RECORD, Record, STATE, State, WORK, Who},
    standby::Standby,
};
pub use self::{ends::Ends, restart::Restart};

/// How long what is killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(6);
/// Instances that are ended at once when all are.
const HALTED_AT_ONCE: usize = 64;

/// Where and how instances run on this machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything that is kept; made if it is not there. What it holds is readable by its owner only.
    pub dir: PathBuf,
    /// What players call this machine.
    pub host: String,
    /// The address that instances listen on: ports are tried there. Probes ask there too, or on loopback if it is unspecified.
    pub bind: IpAddr,
    /// The ports to give out. Nothing else should listen there: what is in use is passed over, but what takes a port in the moment between
    /// the start of a program and its own bind may be mistaken for it.
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
    /// Whether instances have control groups where these can be made.
    pub cgroups: bool,
    /// When what ends again and again is brought up again.
    pub restart: Restart,
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
            cgroups: true,
            restart: Restart::default(),
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
    standby: Standby,
    instances: PathBuf,
    ports: Ports,
    probed: IpAddr,
    groups: Option<Groups>,
}

/// A span of one step, below the one of the call.
macro_rules! step_span {
    ($name:literal, $home:expr) => {
        tracing::info_span!(
            $name,
            otel.kind = "internal",
            provisioner = "process",
            instance.identity = $home.identity(),
            otel.status_code = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
        )
    };
}

use step_span;

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
        [&instances, &ports, &dir.join(record::RUN)]
            .into_iter()
            .try_for_each(|dir| home::make(dir))
            .map_err(failed("configure", format!("directory {}", dir.display())))?;
        if !procfs::lists_children() {
            return Err(refused(
                "this kernel does not list the children of a process (CONFIG_PROC_CHILDREN)".to_owned(),
            ));
        }
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
        let groups = if config.cgroups {
            Groups::find(&record::hash(dir.as_os_str().as_bytes()))
        } else {
            Err("switched off".to_owned())
        };
        let groups = groups
            .inspect_err(|why| {
                tracing::info!(why, "instances have no control groups: they are found by their supervisors alone");
            })
            .ok();
        let standby = Standby::new(shim.clone());
        Ok(Self { config, dir, shim, standby, instances, ports, probed, groups })
    }

    /// Takes the directory for the store of that name, for good. To be called before any order of that store: an order's generation means
    /// something beside others of the same store only. One that belongs to no store yet is taken over as it is.
    ///
    /// # Errors
    /// [`Error::Provision`], saying what to do, if it belongs to another store.
    pub async fn claim(&self, store: &str) -> Result<()> {
        let (process, store) = (self.clone(), store.to_owned());
        blocking(move || {
            mark::claim(&process.dir, &store)?;
            process.remove_groups();
            Ok(())
        })
        .await
    }

    /// Removes control groups whose supervisors were killed, and ends what is left in them. Blocks.
    fn remove_groups(&self) {
        let Some(groups) = &self.groups else { return };
        let remove = |key: &String| -> io::Result<()> {
            // As long as this is held none can start.
            let Some(_lock) = record::take_run_lock(&self.instances.join(key), Who::Manager)? else { return Ok(()) };
            Group::new(groups.path(key)).end(KILL_PATIENCE).map(drop)
        };
        match groups.keys() {
            Err(error) => tracing::warn!(%error, "cannot list the control groups of instances"),
            Ok(keys) => {
                for key in keys {
                    if let Err(error) = remove(&key) {
                        tracing::warn!(key, %error, "the control group of an instance that has ended cannot be removed");
                    }
                }
            }
        }
    }

    /// Watches for instances that end by themselves, from now on.
    ///
    /// # Errors
    /// [`Error::Provision`] if the kernel gives no watch.
    pub fn ends(&self) -> Result<Ends> {
        Ends::watch(&self.dir, self.config.restart.clone())
    }

    /// Ends every instance and keeps what is recorded of it, as a machine that is shut down does: an `up` or `update` brings it back on its
    /// ports. Answers how many were running.
    pub async fn halt(&self) -> Result<usize> {
        let running: Vec<_> = self.list().await?.into_iter().filter(|found| found.alive).collect();
        let halts = running.iter().map(|found| async {
            let home = self.enter(&found.challenge, &found.identity, found.generation, Wanted::AsRecorded).await?;
            let runs = {
                let home = home.clone();
                blocking(move || Ok(free(&home)?.is_none())).await?
            };
            step(step_span!("provision.stop", home), self.stop(&home)).await.map(|_| usize::from(runs))
        });
        self.standby.clear();
        // One that does not end must not keep the others from it.
        let halted: Vec<_> = futures::stream::iter(halts).buffer_unordered(HALTED_AT_ONCE).collect().await;
        halted.into_iter().sum()
    }

    async fn bring(&self, request: &LaunchRequest, running: Running) -> Result<Outputs> {
        let home = self.enter(&request.challenge, &request.identity, request.generation, Wanted::There).await?;
        let (alive, mut stopped, before) = self.before(&home).await?;
        if alive
            && running == Running::Keep
            && let Some(record) = &before
        {
            return self.settle(&home, record, None, &[LABEL]).await;
        }
        if !alive && stopped.is_none() {
            stopped = Some(self.stop(&home).await?);
        }
        let record = self.record(home.clone(), request).await?;
        let lock = match stopped {
            Some(lock) => lock,
            None if before.as_ref() == Some(&record) => return self.settle(&home, &record, None, &[LABEL]).await,
            None => step(step_span!("provision.stop", home), self.stop(&home)).await?,
        };
        let starting = self.start(home.clone(), request, record.clone(), before, lock);
        let result = match step(step_span!("provision.start", home), starting).await {
            Ok(shim) => self.settle(&home, &record, Some(shim), &[LABEL, RECORD]).await,
            Err(error) => Err(error),
        };
        let Err(error) = result else { return result };
        let Some(port) = self.lost(&request.plan, &record).await? else { return Err(error) };
        tracing::warn!(
            instance.identity = home.identity(),
            port,
            %error,
            "another program took the port of an instance that was being started"
        );
        Err(Error::PortTaken { port, detail: error.to_string() })
    }

    async fn enter(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        wanted: Wanted,
    ) -> Result<Home> {
        Home::enter(&self.instances, challenge, identity, generation, wanted, self.config.patience).await
    }

    /// What there is before an order: whether its supervisor lives, and its program as far as that is known (where the supervisor has not
    /// noticed yet that the program ended, it does not run); the supervisor's lock, if nothing is left to be ended; and what is recorded.
    async fn before(&self, home: &Home) -> Result<(bool, Option<File>, Option<Record>)> {
        let home = home.clone();
        blocking(move || {
            // What cannot be read is as good as not there: it is written anew.
            let record = record::read::<Record>(&home.dir, RECORD).unwrap_or(None);
            let state = record::read::<State>(&home.dir, STATE).unwrap_or(None);
            Ok(match free(&home)? {
                Some(lock) => (false, Some(lock).filter(|_| state.is_none()), record),
                None => {
                    let lives = |state: State| state.end.is_none() && state.child.is_none_or(procfs::lives);
                    (state.is_none_or(lives), None, record)
                }
            })
        })
        .await
    }

    /// One of its ports that another program has, if one does.
    async fn lost(&self, plan: &LaunchPlan, record: &Record) -> Result<Option<u16>> {
        let (ports, specs, taken) = (self.ports.clone(), plan.ports.clone(), record.ports.clone());
        blocking(move || Ok(ports.lost(&specs, &taken))).await
    }

    /// Makes the directory and reserves the ports: those that it had before, as far as they are free.
    async fn allocate(
        &self,
        mut home: Home,
        specs: &[PortSpec],
        before: Option<Record>,
        running: bool,
    ) -> Result<Placement> {
        let (process, specs) = (self.clone(), specs.to_vec());
        blocking(move || {
            let dir = home.dir.join(WORK);
            home::make(&dir).map_err(failed("allocate", "making its directory"))?;
            let mut reserved = before.map(|record| record.ports).unwrap_or_default();
            reserved.extend(home.ports().clone());
            let (ports, held) = process.ports.assign(&home.key, &specs, &reserved, running)?;
            reserved.extend(ports.clone());
            home.record_ports(reserved).map_err(failed("allocate", "recording its ports"))?;
            let hold = PortHold::new(Mutex::new(held));
            Ok(Placement { host: process.config.host.clone(), ports, dir, hold })
        })
        .await
    }

    /// What a request wants to run. Fails if its reservation has been given up since.
    async fn record(&self, home: Home, request: &LaunchRequest) -> Result<Record> {
        let (process, plan, placement) = (self.clone(), request.plan.clone(), request.placement.clone());
        blocking(move || {
            let Placement { ports, dir, .. } = placement;
            if let Some(port) = process.ports.not_reserved(&home.key, &ports) {
                let detail = "it is no longer reserved for this instance".to_owned();
                return Err(Error::PortTaken { port, detail });
            }
            home::make(&dir).map_err(failed("start", "making its directory"))?;
            Ok(Record { version: record::VERSION, ports, launch: launch::decide(&process.config, &dir, plan)? })
        })
        .await
    }

    /// Writes the record and starts a supervisor on it. The lock proves that there is none.
    async fn start(
        &self,
        mut home: Home,
        request: &LaunchRequest,
        record: Record,
        before: Option<Record>,
        lock: File,
    ) -> Result<Shim> {
        let (process, specs, hold) = (self.clone(), request.plan.ports.clone(), request.placement.hold.clone());
        blocking(move || {
            let mut held = match hold.downcast_ref::<Mutex<Held>>() {
                Some(held) => std::mem::take(&mut *held.lock().unwrap_or_else(PoisonError::into_inner)),
                None => Held::default(),
            };
            process.ports.hold(&specs, &record.ports, &mut held)?;
            let last = record::read::<State>(&home.dir, STATE).unwrap_or(None);
            let prepare = || -> io::Result<()> {
                [READY, STATE].iter().try_for_each(|name| record::remove(&home.dir.join(name)))?;
                output::remove(&home.dir)?;
                record::rewrite(&home.dir, RECORD, &record)
            };
            prepare().map_err(failed("start", "recording what to run"))?;
            drop(lock);
            for ports in before.iter().map(|before| &before.ports).chain([home.ports()]) {
                process.ports.release(&home.key, ports, &record.ports)?;
            }
            home.record_ports(record.ports.clone()).map_err(failed("start", "recording its ports"))?;
            let restarts = last.map_or(0, |last| process.config.restart.count(&last)).to_string();
            let group = process.groups.as_ref().map(|groups| groups.path(&home.key));
            let mut arguments = vec![home.dir.as_os_str(), restarts.as_ref()];
            arguments.extend(group.as_ref().map(|group| group.as_os_str()));
            let supervisor = process.standby.take();
            supervisor
                .and_then(|supervisor| supervisor.assign(&arguments, held.hand_over()))
                .map_err(failed("start", format!("the supervisor {}", process.shim.display())))
        })
        .await
    }
}

#[async_trait]
impl Provisioner for Process {
    fn name(&self) -> &'static str {
        "process"
    }

    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        ports: &[PortSpec],
    ) -> Result<Placement> {
        let home = self.enter(challenge, identity, generation, Wanted::There).await?;
        let (alive, stopped, before) = self.before(&home).await?;
        // What a killed supervisor left may still hold the ports.
        if !alive && stopped.is_none() {
            self.stop(&home).await?;
        }
        let allocate = self.allocate(home.clone(), ports, before, alive);
        step(step_span!("provision.allocate", home), allocate).await
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.bring(request, Running::Keep).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.bring(request, Running::Replace).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let mut home = self.enter(challenge, identity, generation, Wanted::AsRecorded).await?;
        let lock = step(step_span!("provision.stop", home), self.stop(&home)).await?;
        let ports = self.ports.clone();
        let remove = step_span!("provision.remove", home);
        let work = blocking(move || {
            let record = record::read::<Record>(&home.dir, RECORD).unwrap_or(None);
            for had in record.iter().map(|record| &record.ports).chain([home.ports()]) {
                ports.release(&home.key, had, &BTreeMap::new())?;
            }
            home.clear().map_err(failed("remove", "removing its directory"))?;
            home.mark_gone().map_err(failed("remove", "recording that it is gone"))?;
            drop(lock);
            Ok(())
        });
        step(remove, work).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        let (instances, restart) = (self.instances.clone(), self.config.restart.clone());
        blocking(move || home::list(&instances, &restart).map_err(failed("list", "reading the instances"))).await
    }
}

/// The supervisor's lock, if none lives.
fn free(home: &Home) -> Result<Option<File>> {
    record::take_run_lock(&home.dir, Who::Manager).map_err(failed("find", "looking for its supervisor"))
}

async fn read<T: serde::de::DeserializeOwned + Send + 'static>(home: &Home, name: &'static str) -> Result<Option<T>> {
    let home = home.clone();
    blocking(move || record::read(&home.dir, name).map_err(failed("find", format!("reading {name}")))).await
}
