//! Instances as groups of processes on this machine.
//!
//! Each instance has a supervisor of its own ([`supervisor`]), which outlives the manager, and a directory:
//!
//! ```text
//! <dir>/instances/<hash of the challenge>-<identity>/
//!     label.json      challenge, identity, generation and ports; locked while a manager works on the instance; kept for an hour after
//!                     the instance is removed
//!     instance.json   ports and what to run; contains secrets
//!     state.json      supervisor, first process, how the instance ended
//!     supervisor.log  errors of the supervisor, if there were any
//!     ready           the readiness probe has succeeded
//!     output.log      the latest output, and output.old.log before that
//!     work/           the working directory of an instance without a root of its own
//! <dir>/run/<name of that directory>
//!                     the supervisor lock, held while the supervisor lives: managers find the supervisor by it, it keeps a second one
//!                     from starting, and its release shows the end of the instance
//! <dir>/ports/<port>  a link to the instance that has reserved the port
//! <dir>/uids/<id>     locked while an instance has this user id
//! <dir>/store.json    the store that the directory belongs to
//! ```
//!
//! Several managers on one machine (and in one PID namespace) may share the directory.
//!
//! Where control groups can be created below the manager's own, each instance has one, named `gauntlet-<hash of dir>-<supervisor's process id and
//! start time>`. With the controllers of v2 or v1, it limits the memory, the processes and the CPU share of the whole instance. The cost of an
//! operation doesn't depend on other instances: no operation reads all of `/proc`, except one that finds a killed supervisor whose
//! instance has no group.
//!
//! Instances are isolated as far as the machine and the operator allow ([`Isolation`], crate `gauntlet-sandbox`). At levels `uid` and `userns`,
//! an instance has namespaces and a root of its own: it reaches none of these files, no other process and no network but its own, and the
//! supervisor forwards its ports. At `landlock` and `none` it runs as the manager's user on its file system and network: only run
//! scenarios that are trusted with that. Under a service manager that ends all processes of a service (systemd's default),
//! set `KillMode=process`: otherwise instances end with the manager, and are launched again the next time they are needed. Set
//! `Delegate=yes`, too, so that systemd leaves the groups below the manager's alone.

mod blocking;
mod cgroup;
mod config;
mod ends;
mod exceeded;
mod handover;
mod instance_dir;
mod isolation;
mod launch;
mod listing;
mod output;
mod ports;
mod probe;
mod procfs;
mod ready;
mod record;
mod remove_tree;
mod restart;
mod standby;
mod step;
mod stop;
mod store_claim;
pub mod supervisor;
mod timer;
mod uids;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use futures::StreamExt as _;
use gauntlet_domain::{
    ChallengeId, Error, Facts, Identity, LaunchPlan, LaunchRequest, Outputs, Placement, PortHold, PortSpec,
    ProvisionedInstance, Provisioner, Result,
};

use self::{
    blocking::{blocking, failed},
    cgroup::Groups,
    exceeded::Reporter,
    instance_dir::{InstanceDir, Presence, create_dir},
    ports::{HeldPorts, Ports},
    ready::StartedSupervisor,
    record::{LABEL, LockRole, READY, RECORD, Record, STATE, State, WORK},
    standby::Standby,
    step::{run_step, step_span},
};
pub use gauntlet_sandbox::Level;

pub use self::{
    cgroup::LimitBackend, config::Config, ends::Ends, exceeded::Exceeded, isolation::Isolation, launch::default_limits,
    restart::Restart,
};

/// How many instances [`Process::halt`] stops at a time.
const MAX_CONCURRENT_STOPS: usize = 64;

/// The `process` backend of [`Provisioner`].
///
/// A call waits at most [`Config::directory_lock_timeout`] for another manager that works on the same instance. A launch then takes at most the plan's
/// readiness timeout, a removal the grace period and a few seconds.
///
/// # Cancel safety
/// Dropping a call's future leaves a recorded, partly done change. Repeating the call completes it.
#[derive(Debug, Clone)]
pub struct Process {
    config: Config,
    dir: PathBuf,
    supervisor: PathBuf,
    standby: Standby,
    instances: PathBuf,
    ports: Ports,
    probe_address: IpAddr,
    groups: Option<Groups>,
    reporter: Reporter,
    isolation: Isolation,
}

/// What a launch does with an instance that already runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IfRunning {
    Keep,
    Replace,
}

/// What exists of an instance before a launch.
struct Existing {
    /// Whether supervisor and program run. False if the program has exited and its supervisor hasn't noticed yet.
    alive: bool,
    /// The supervisor lock, if there is nothing to stop.
    lock: Option<File>,
    record: Option<Record>,
}

impl Process {
    /// Checks the configuration and creates the directory. Blocks briefly.
    ///
    /// # Errors
    /// [`Error::Provision`] if the configuration is invalid, the directory can't be created, the kernel lacks a feature, or instances would be
    /// isolated less than the operator requires.
    pub fn new(mut config: Config) -> Result<Self> {
        let refused = |detail: String| Error::Provision { step: "configure", detail };
        if config.ports.is_empty() || *config.ports.start() == 0 {
            return Err(refused(format!(
                "the port range {:?} is empty or contains port 0: use a range such as 20000 to 29999",
                config.ports
            )));
        }
        // All managers must use the same path, whatever links lead to it.
        let dir = std::fs::create_dir_all(&config.dir)
            .and_then(|()| config.dir.canonicalize())
            .map_err(failed("configure", format!("directory {}", config.dir.display())))?;
        let (instances, ports) = (dir.join("instances"), dir.join("ports"));
        [&instances, &ports, &dir.join(record::RUN), &dir.join(record::UIDS)]
            .into_iter()
            .try_for_each(|dir| create_dir(dir))
            .map_err(failed("configure", format!("directory {}", dir.display())))?;
        if !procfs::lists_children() {
            return Err(refused(
                "this kernel does not list the children of a process: it needs CONFIG_PROC_CHILDREN".to_owned(),
            ));
        }
        // Instances have other working directories than the manager.
        for dir in &mut config.path {
            *dir = std::path::absolute(&*dir).map_err(failed("configure", format!("path {}", dir.display())))?;
        }
        let supervisor = match config.supervisor.clone() {
            Some(supervisor) => std::path::absolute(supervisor),
            None => std::env::current_exe().map(|exe| {
                let small = exe.with_file_name("gauntlet-shim");
                if small.is_file() { small } else { exe }
            }),
        };
        let supervisor = supervisor.map_err(failed("configure", "the supervisor's program"))?;
        if !supervisor.is_file() {
            return Err(refused(format!("the supervisor's program {} does not exist", supervisor.display())));
        }
        let ports = Ports { dir: ports, instances: instances.clone(), range: config.ports.clone(), bind: config.bind };
        let probe_address = match config.bind {
            IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            address => address,
        };
        let groups = cgroup::detect(&config, &dir);
        launch::check_backend(config.require_limits, backend(groups.as_ref()))?;
        launch::complete_defaults(&mut config.defaults, backend(groups.as_ref()));
        let isolation = Isolation::detect(&config, &supervisor)?;
        let standby = Standby::new(supervisor.clone(), isolation.level, groups.clone());
        Ok(Self {
            config,
            dir,
            supervisor,
            standby,
            instances,
            ports,
            probe_address,
            groups,
            isolation,
            reporter: Reporter::default(),
        })
    }

    /// How strongly instances are isolated.
    pub fn isolation(&self) -> &Isolation {
        &self.isolation
    }

    /// Counts the limits that instances reached with `facts`.
    #[must_use]
    pub fn with_facts(mut self, facts: Arc<dyn Facts>) -> Self {
        self.reporter = Reporter::new(facts);
        self
    }

    /// Claims the directory for the store with that name. Call this before any other operation, because generations only compare within one
    /// store. A directory that no store has claimed yet is claimed with its instances.
    ///
    /// # Errors
    /// [`Error::Provision`], with the remedy, if the directory belongs to another store.
    pub async fn claim(&self, store: &str) -> Result<()> {
        let (process, store) = (self.clone(), store.to_owned());
        blocking(move || {
            store_claim::claim(&process.dir, &store)?;
            process.groups.inspect(Groups::remove_abandoned);
            Ok(())
        })
        .await
    }

    /// What limits instances as a whole.
    pub fn limit_backend(&self) -> LimitBackend {
        backend(self.groups.as_ref())
    }

    /// Starts to watch for instances that end on their own.
    ///
    /// # Errors
    /// [`Error::Provision`] if the kernel can't watch the directory.
    pub fn ends(&self) -> Result<Ends> {
        Ends::watch(&self.dir, self.config.restart.clone())
    }

    /// Stops every instance but keeps its record, as a shutdown of the machine would: `up` or `update` launches it again with the same ports.
    /// Returns how many were running.
    pub async fn halt(&self) -> Result<usize> {
        let running: Vec<_> = self.list().await?.into_iter().filter(|found| found.alive).collect();
        let stops = running.iter().map(|found| async {
            let instance = self.lock(&found.challenge, &found.identity, found.generation, Presence::Keep).await?;
            let runs = {
                let instance = instance.clone();
                blocking(move || Ok(try_supervisor_lock(&instance)?.is_none())).await?
            };
            run_step(step_span!("provision.stop", instance), self.stop(&instance)).await.map(|_| usize::from(runs))
        });
        self.standby.clear();
        // All are stopped, even if one of them fails.
        let stopped: Vec<_> = futures::stream::iter(stops).buffer_unordered(MAX_CONCURRENT_STOPS).collect().await;
        stopped.into_iter().sum()
    }

    async fn launch(&self, request: &LaunchRequest, if_running: IfRunning) -> Result<Outputs> {
        let instance = self.lock(&request.challenge, &request.identity, request.generation, Presence::Record).await?;
        let Existing { mut alive, mut lock, record: before } = self.existing(&instance).await?;
        if alive
            && if_running == IfRunning::Keep
            && let Some(record) = &before
        {
            let kept = self.wait_until_ready(&instance, record, None, &[LABEL]).await;
            let Err(error) = kept else { return kept };
            let now = self.existing(&instance).await?;
            if now.alive {
                return Err(error);
            }
            // A cancelled launch may have left the instance starting, and it has exited since: it is started again.
            tracing::info!(instance.identity = instance.identity(), %error, "a running instance exited before it was ready");
            (alive, lock) = (false, now.lock);
        }
        if !alive && lock.is_none() {
            lock = Some(self.stop(&instance).await?);
        }
        let record = self.resolve(instance.clone(), request).await?;
        let lock = match lock {
            Some(lock) => lock,
            None if before.as_ref() == Some(&record) => {
                return self.wait_until_ready(&instance, &record, None, &[LABEL]).await;
            }
            None => run_step(step_span!("provision.stop", instance), self.stop(&instance)).await?,
        };
        let starting = self.start(instance.clone(), request, record.clone(), before, lock);
        let span = step_span!("provision.start", instance, "instance.isolation" = record.launch.isolation.name());
        let result = match run_step(span, starting).await {
            Ok(supervisor) => self.wait_until_ready(&instance, &record, Some(supervisor), &[LABEL, RECORD]).await,
            Err(error) => Err(error),
        };
        let Err(error) = result else { return result };
        let Some(port) = self.port_in_use(&request.plan, &record).await? else { return Err(error) };
        tracing::warn!(
            instance.identity = instance.identity(),
            port,
            %error,
            "another program took the port of an instance that was being started"
        );
        Err(Error::PortTaken { port, detail: error.to_string() })
    }

    async fn lock(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        presence: Presence,
    ) -> Result<InstanceDir> {
        let timeout = self.config.directory_lock_timeout;
        InstanceDir::lock(&self.instances, challenge, identity, generation, presence, timeout).await
    }

    async fn existing(&self, instance: &InstanceDir) -> Result<Existing> {
        let instance = instance.clone();
        blocking(move || {
            // An unreadable file counts as missing: it will be replaced.
            let record = record::read::<Record>(&instance.dir, RECORD).unwrap_or(None);
            let state = record::read::<State>(&instance.dir, STATE).unwrap_or(None);
            Ok(match try_supervisor_lock(&instance)? {
                Some(lock) => Existing { alive: false, lock: Some(lock).filter(|_| state.is_none()), record },
                None => {
                    let runs = |state: State| state.end.is_none() && state.child.is_none_or(procfs::is_running);
                    Existing { alive: state.is_none_or(runs), lock: None, record }
                }
            })
        })
        .await
    }

    /// Returns one of the instance's ports that another program uses, if there is one.
    async fn port_in_use(&self, plan: &LaunchPlan, record: &Record) -> Result<Option<u16>> {
        let (ports, specs, reserved) = (self.ports.clone(), plan.ports.clone(), record.ports.clone());
        blocking(move || Ok(ports.first_in_use(&specs, &reserved))).await
    }

    /// Creates the working directory and reserves the ports, preferably those that the instance had before.
    async fn allocate(
        &self,
        mut instance: InstanceDir,
        specs: &[PortSpec],
        before: Option<Record>,
        running: bool,
    ) -> Result<Placement> {
        let (process, specs) = (self.clone(), specs.to_vec());
        blocking(move || {
            let dir = instance.dir.join(WORK);
            create_dir(&dir).map_err(failed("allocate", "creating its working directory"))?;
            let mut reserved = before.map(|record| record.ports).unwrap_or_default();
            reserved.extend(instance.ports().clone());
            let (ports, held) = process.ports.reserve(&instance.key, &specs, &reserved, running)?;
            reserved.extend(ports.clone());
            instance.record_ports(reserved).map_err(failed("allocate", "recording its ports"))?;
            let hold = PortHold::new(Mutex::new(held));
            Ok(Placement { host: process.config.host.clone(), ports, dir, hold })
        })
        .await
    }

    /// Turns a request into the record for the supervisor. Fails if the instance no longer has its reservation.
    async fn resolve(&self, instance: InstanceDir, request: &LaunchRequest) -> Result<Record> {
        let (process, plan, placement) = (self.clone(), request.plan.clone(), request.placement.clone());
        blocking(move || {
            let Placement { ports, dir, .. } = placement;
            if let Some(port) = process.ports.first_not_reserved(&instance.key, &ports) {
                let detail = "it is no longer reserved for this instance".to_owned();
                return Err(Error::PortTaken { port, detail });
            }
            create_dir(&dir).map_err(failed("start", "creating its working directory"))?;
            let launch = launch::resolve(&process, &dir, &ports, plan)?;
            Ok(Record { version: record::VERSION, ports, launch })
        })
        .await
    }

    /// Writes the record and passes the instance to a supervisor. Holding `lock` guarantees that it has none yet.
    async fn start(
        &self,
        mut instance: InstanceDir,
        request: &LaunchRequest,
        record: Record,
        before: Option<Record>,
        lock: File,
    ) -> Result<StartedSupervisor> {
        let (process, specs, hold) = (self.clone(), request.plan.ports.clone(), request.placement.hold.clone());
        blocking(move || {
            let mut held = match hold.downcast_ref::<Mutex<HeldPorts>>() {
                Some(held) => std::mem::take(&mut *held.lock().unwrap_or_else(PoisonError::into_inner)),
                None => HeldPorts::default(),
            };
            process.ports.hold(&specs, &record.ports, &mut held)?;
            let last = record::read::<State>(&instance.dir, STATE).unwrap_or(None);
            let prepare = || -> io::Result<()> {
                [READY, STATE].iter().try_for_each(|name| record::remove(&instance.dir.join(name)))?;
                output::remove(&instance.dir)?;
                record::rewrite(&instance.dir, RECORD, &record)
            };
            prepare().map_err(failed("start", "recording what to run"))?;
            drop(lock);
            for ports in before.iter().map(|before| &before.ports).chain([instance.ports()]) {
                process.ports.release(&instance.key, ports, &record.ports)?;
            }
            instance.record_ports(record.ports.clone()).map_err(failed("start", "recording its ports"))?;
            let restarts = last.map_or(0, |last| process.config.restart.consecutive_ends(&last)).to_string();
            let arguments = [instance.dir.as_os_str(), restarts.as_ref()];
            let supervisor = process.standby.take(record.launch.isolation);
            supervisor
                .and_then(|supervisor| supervisor.assign(&arguments, held.into_descriptor()))
                .map_err(failed("start", format!("the supervisor {}", process.supervisor.display())))
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
        let instance = self.lock(challenge, identity, generation, Presence::Record).await?;
        let Existing { alive, lock, record } = self.existing(&instance).await?;
        // Processes that a killed supervisor left may still use the ports.
        if !alive && lock.is_none() {
            self.stop(&instance).await?;
        }
        let allocate = self.allocate(instance.clone(), ports, record, alive);
        run_step(step_span!("provision.allocate", instance), allocate).await
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.launch(request, IfRunning::Keep).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.launch(request, IfRunning::Replace).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let mut instance = self.lock(challenge, identity, generation, Presence::Keep).await?;
        let lock = run_step(step_span!("provision.stop", instance), self.stop(&instance)).await?;
        let ports = self.ports.clone();
        let remove = step_span!("provision.remove", instance);
        let work = blocking(move || {
            let record = record::read::<Record>(&instance.dir, RECORD).unwrap_or(None);
            for reserved in record.iter().map(|record| &record.ports).chain([instance.ports()]) {
                ports.release(&instance.key, reserved, &BTreeMap::new())?;
            }
            instance.clear().map_err(failed("remove", "removing its directory"))?;
            instance.mark_removed().map_err(failed("remove", "recording that it is removed"))?;
            drop(lock);
            Ok(())
        });
        run_step(remove, work).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        let (instances, restart) = (self.instances.clone(), self.config.restart.clone());
        blocking(move || listing::list(&instances, &restart).map_err(failed("list", "reading the instances"))).await
    }
}

fn backend(groups: Option<&Groups>) -> LimitBackend {
    groups.map_or(LimitBackend::Rlimit, Groups::backend)
}

/// Takes the supervisor lock, unless a supervisor lives. Blocks.
fn try_supervisor_lock(instance: &InstanceDir) -> Result<Option<File>> {
    record::try_supervisor_lock(&instance.dir, LockRole::Manager).map_err(failed("find", "looking for its supervisor"))
}

/// Reads one of the instance's files.
async fn read<T: serde::de::DeserializeOwned + Send + 'static>(
    instance: &InstanceDir,
    name: &'static str,
) -> Result<Option<T>> {
    let instance = instance.clone();
    blocking(move || record::read(&instance.dir, name).map_err(failed("find", format!("reading {name}")))).await
}
