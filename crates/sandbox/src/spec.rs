//! What to run, and what it may see.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A program, and what it may see and use. `Debug` doesn't show arguments and environment: they may contain secrets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The program, as its own root shows it. `None` ends the sequence just before exec: for a probe.
    pub program: Option<PathBuf>,
    /// The arguments, without the program's name.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// The working directory, as its own root shows it.
    pub directory: PathBuf,
    /// The limits of each of its processes.
    pub limits: ResourceLimits,
    /// The files that it sees.
    pub view: View,
    /// Its user and group outside the sandbox at level `uid`. Nobody else should have them.
    pub uid: u32,
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spec")
            .field("program", &self.program)
            .field("directory", &self.directory)
            .field("limits", &self.limits)
            .field("view", &self.view)
            .field("uid", &self.uid)
            .finish_non_exhaustive()
    }
}

/// The files that a program sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum View {
    /// A root of its own: levels with namespaces.
    Root(Root),
    /// The machine's files: levels without.
    Host(HostPaths),
}

/// A root of its own: `/usr` and the parts of `/etc` that programs need, read-only; the binds, read-only; `/work`, `/tmp` and `/dev/shm`,
/// writable and of one bounded size; its own `/proc`; a few devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The directory whose `usr` the program sees; `/` is the machine's own.
    pub system: PathBuf,
    /// Further directories and files, read-only.
    pub binds: Vec<Bind>,
    /// The bytes that `/work`, `/tmp` and `/dev/shm` hold in all; `None` is as much as there is memory.
    pub size: Option<u64>,
    /// The files and directories that they hold in all; `None` is any number.
    pub inodes: Option<u64>,
    /// The host name that the program sees.
    pub hostname: String,
}

/// A directory or file of the machine that a program sees, read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// The path on the machine.
    pub source: PathBuf,
    /// The absolute path that the program sees.
    pub target: PathBuf,
}

/// The paths of the machine that a program may use at level `landlock`. At level `none`, it may use all that its user may use.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostPaths {
    /// Files that it may read and run. Paths that don't exist are left out.
    pub read: Vec<PathBuf>,
    /// Directories that it may change.
    pub write: Vec<PathBuf>,
    /// TCP ports that it may listen on. It may connect to none.
    pub tcp_ports: Vec<u16>,
}

/// Limits of each process (`setrlimit`). None of them raises the limits of the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResourceLimits {
    /// Open files.
    pub open_files: Option<u64>,
    /// CPU seconds until SIGXCPU; SIGKILL follows two seconds later.
    pub cpu_seconds: Option<u64>,
    /// Bytes of address space.
    pub address_space: Option<u64>,
    /// Bytes of the largest file.
    pub file_size: Option<u64>,
    /// Processes and threads of the user. Has no effect on the machine's root.
    pub processes: Option<u64>,
}
