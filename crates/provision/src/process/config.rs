//! The configuration of the process backend.

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use gauntlet_domain::Limits;

use super::restart::Restart;

/// Where and how instances run on this machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory for all data, created if it doesn't exist. Only its owner can read what is in it.
    pub dir: PathBuf,
    /// The host name or address that players connect to.
    pub host: String,
    /// The address that instances listen on, where ports are checked. Probes connect to it, or to loopback if it is unspecified.
    pub bind: IpAddr,
    /// The ports for instances. No other program should listen there: ports in use are skipped, but a program that takes a port between the
    /// start of an instance's program and its bind may be mistaken for the instance.
    pub ports: RangeInclusive<u16>,
    /// The program of the supervisors, whose `main` must call [`run_if_requested`](super::supervisor::run_if_requested) first. `None` is
    /// `gauntlet-shim` in the directory of the running program, or else the running program itself.
    pub supervisor: Option<PathBuf>,
    /// Where to look up programs that the scenario doesn't contain; also the `PATH` of instances.
    pub path: Vec<PathBuf>,
    /// The limits of instances whose scenario sets none; those left out are [`default_limits`](super::default_limits).
    pub defaults: Limits,
    /// The highest limits that a scenario may set; `None` is unlimited.
    pub maximums: Limits,
    /// The time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Whether to use control groups, where they can be created.
    pub cgroups: bool,
    /// The delays before an instance that ended on its own is launched again.
    pub restart: Restart,
    /// How long to wait for another manager that works on the same instance.
    pub directory_lock_timeout: Duration,
}

impl Config {
    /// Instances listen on all addresses at ports 20000 to 29999, and players connect to `127.0.0.1`. The
    /// grace period is two seconds. Programs are looked up beside the running one, then in the system's usual directories.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
        let system = ["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from);
        Self {
            dir: dir.into(),
            host: Ipv4Addr::LOCALHOST.to_string(),
            bind: Ipv4Addr::UNSPECIFIED.into(),
            ports: 20_000..=29_999,
            supervisor: None,
            path: beside.into_iter().chain(system).collect(),
            defaults: Limits::default(),
            maximums: Limits::default(),
            grace: Duration::from_secs(2),
            cgroups: true,
            restart: Restart::default(),
            directory_lock_timeout: Duration::from_secs(10),
        }
    }
}
