//! The configuration of the process backend.

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use gauntlet_domain::Limits;
use gauntlet_sandbox::Level;

use super::{cgroup::LimitBackend, restart::Restart};

/// systemd's allocation of user ids leaves those from 1879048192 to 2147352575 unused.
const FIRST_UID: u32 = 1_900_000_000;

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
    /// Where to look up programs that the scenario doesn't contain; also the `PATH` of instances. Isolated instances see these directories, except
    /// those that don't exist.
    pub path: Vec<PathBuf>,
    /// The isolation of instances; the strongest that the machine allows if `None`.
    pub isolation: Option<Level>,
    /// The weakest isolation that instances may have, whatever their scenario asks for. `None` is what the machine and `isolation` allow.
    pub require_isolation: Option<Level>,
    /// The directory whose `usr` isolated instances see.
    pub system: PathBuf,
    /// The users of instances at level `uid`, outside. Nothing else on the machine should have them, and each directory of instances needs a
    /// range of its own.
    pub uids: RangeInclusive<u32>,
    /// The limits of instances whose scenario sets none; those left out are [`default_limits`](super::default_limits).
    pub defaults: Limits,
    /// The highest limits that a scenario may set; `None` is unlimited.
    pub maximums: Limits,
    /// The time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// The weakest backend of the limits of whole instances that will do.
    pub require_limits: LimitBackend,
    /// Whether to use control groups, where they can be created.
    pub cgroups: bool,
    /// The delays before an instance that ended on its own is launched again.
    pub restart: Restart,
    /// How long to wait for another manager that works on the same instance.
    pub directory_lock_timeout: Duration,
}

impl Config {
    /// Instances listen on all addresses at ports 20000 to 29999, and players connect to `127.0.0.1`. The grace period is two seconds. Programs are
    /// looked up in the system's usual directories. Instances are isolated as far as the machine allows.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let system = ["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from);
        Self {
            dir: dir.into(),
            host: Ipv4Addr::LOCALHOST.to_string(),
            bind: Ipv4Addr::UNSPECIFIED.into(),
            ports: 20_000..=29_999,
            supervisor: None,
            path: system.to_vec(),
            isolation: None,
            require_isolation: None,
            system: "/".into(),
            uids: FIRST_UID..=FIRST_UID + 99_999,
            defaults: Limits::default(),
            maximums: Limits::default(),
            grace: Duration::from_secs(2),
            require_limits: LimitBackend::Rlimit,
            cgroups: true,
            restart: Restart::default(),
            directory_lock_timeout: Duration::from_secs(10),
        }
    }
}
