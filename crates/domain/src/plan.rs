//! What a provisioner is given: the ports to reserve, and the launch plan rendered for them.

use std::{any::Any, collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

/// A port that a scenario needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// The name that templates use; unique within the scenario.
    pub name: String,
    /// The transport.
    pub protocol: Protocol,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// Where an instance will run: what [`Provisioner::reserve`](crate::Provisioner::reserve) returns.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// The host name or address that players connect to.
    pub host: String,
    /// The port number reserved for each name.
    pub ports: BTreeMap<String, u16>,
    /// The instance's own writable directory, removed with the instance.
    pub dir: PathBuf,
    /// Keeps the ports from other programs until the launch.
    pub hold: PortHold,
}

/// Keeps reserved ports from other programs; the last clone releases them when it is dropped.
///
/// Opaque to everybody but the provisioner that made it. The reservation itself doesn't depend on it: that one is recorded and lasts until
/// [`Provisioner::down`](crate::Provisioner::down).
#[derive(Clone, Default)]
pub struct PortHold(Option<Arc<dyn Any + Send + Sync>>);

impl PortHold {
    /// Wraps whatever the provisioner must keep open.
    pub fn new(held: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(held)))
    }

    /// What [`PortHold::new`] was given, if it was a `T`.
    pub fn downcast_ref<T: Any>(&self) -> Option<&T> {
        self.0.as_ref()?.downcast_ref()
    }
}

impl fmt::Debug for PortHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "held" } else { "not held" })
    }
}

/// What to run for one instance, and how to tell that it is ready. Nothing is left to render. `Debug` leaves out flags and everything that
/// may contain one.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct LaunchPlan {
    /// The ports that the program listens on, as they were reserved.
    pub ports: Vec<PortSpec>,
    /// The scenario's files: read-only, shared by its instances.
    pub files: PathBuf,
    /// The program and its arguments; at least the program. A relative program is looked up in `files`, then in `PATH`.
    pub command: Vec<String>,
    /// The environment of the process. The provisioner adds only variables that are missing here.
    pub env: BTreeMap<String, String>,
    /// How to tell that the instance is ready.
    pub readiness: Readiness,
    /// The resource limits.
    pub limits: Limits,
    /// How strongly to isolate the instance; `None` is the provisioner's choice.
    pub isolation: Option<Isolation>,
    /// How players reach the instance.
    pub connection_info: String,
    /// The flags that prove the challenge solved, in order; secret.
    pub flags: Vec<String>,
}

impl fmt::Debug for LaunchPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchPlan").field("ports", &self.ports).field("files", &self.files).finish_non_exhaustive()
    }
}

/// How strongly an instance is isolated from its machine and from other instances, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isolation {
    /// It runs as the provisioner's user, on its files and its network.
    None,
    /// It may use some files and its own ports alone.
    Landlock,
    /// It has namespaces and a root of its own.
    Userns,
    /// As [`Isolation::Userns`], with a user of its own.
    Uid,
}

/// A readiness check and its times.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Readiness {
    /// The check.
    pub probe: Probe,
    /// The longest pause between two probes.
    pub interval: Duration,
    /// The launch has failed once this much time has passed without a successful probe.
    pub timeout: Duration,
}

/// A readiness check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// The named port accepts a connection.
    Tcp {
        /// The port's name.
        port: String,
    },
    /// A GET request returns this status.
    Http {
        /// The port's name.
        port: String,
        /// The path, with its leading slash.
        path: String,
        /// The expected status.
        status: u16,
    },
    /// A line of the output contains this text.
    Output {
        /// The text.
        contains: String,
    },
}

impl Default for Probe {
    /// Any line of output.
    fn default() -> Self {
        Self::Output { contains: String::new() }
    }
}

/// Resource limits of an instance; `None` means the operator's default, and [`Limits::NONE`] no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Memory of all processes and files in memory together, in bytes.
    pub memory: Option<u64>,
    /// Processes and threads at a time.
    pub processes: Option<u64>,
    /// CPU time per second of all processes together, in percent of one core.
    pub cpu_quota: Option<u64>,
    /// Bytes of the files that the instance writes.
    pub disk: Option<u64>,
    /// CPU time of each process, in seconds.
    pub cpu_seconds: Option<u64>,
    /// Open files of each process.
    pub open_files: Option<u64>,
    /// Output to keep, in bytes; the oldest is dropped first.
    pub output: Option<u64>,
}

impl Limits {
    /// The value of a limit that doesn't limit.
    pub const NONE: u64 = u64::MAX;
}
