//! What a scenario asks a provisioner for, rendered for one instance.

use std::{collections::BTreeMap, fmt::Debug, path::PathBuf, time::Duration};

use crate::Result;

/// A scenario prepared for one instance: everything is known but where it will run.
pub trait Plan: Debug + Send + Sync {
    /// The ports it needs, each named once.
    fn ports(&self) -> &[PortSpec];

    /// Renders its templates, now that host and ports are known. Pure: the same place gives the same workload.
    fn render(&self, place: &Place) -> Result<Workload>;
}

/// A port that a scenario asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// How templates call it.
    pub name: String,
    /// What it speaks.
    pub protocol: Protocol,
}

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// A stream.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

/// Where an instance runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// What players call the host.
    pub host: String,
    /// The number of each named port.
    pub ports: BTreeMap<String, u16>,
    /// The instance's own directory: writable, gone when it is taken down.
    pub dir: PathBuf,
}

/// What to run and how to tell that it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// The scenario's files: read-only, shared by its instances.
    pub files: PathBuf,
    /// The program and its arguments; at least the program. A relative program is looked for in `files`, then in `PATH`.
    pub command: Vec<String>,
    /// The whole environment of the process.
    pub env: BTreeMap<String, String>,
    /// How to tell that it is ready.
    pub readiness: Readiness,
    /// What it may use.
    pub limits: Limits,
    /// How players reach it.
    pub connection_info: String,
    /// What proves it solved, in order; secret.
    pub flags: Vec<String>,
}

/// How to tell that an instance is ready, and for how long to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// The question.
    pub probe: Probe,
    /// Between two tries.
    pub interval: Duration,
    /// After which it has failed.
    pub timeout: Duration,
}

/// A question whose answer is readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// A connection to the named port is accepted.
    Tcp {
        /// The port's name.
        port: String,
    },
    /// A GET answers with this status.
    Http {
        /// The port's name.
        port: String,
        /// The path, from its slash on.
        path: String,
        /// The status to wait for.
        status: u16,
    },
    /// A line of its output contains this text.
    Output {
        /// The text.
        contains: String,
    },
}

/// What an instance may use; `None` is the operator's default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Address space of each process, in bytes.
    pub memory: Option<u64>,
    /// CPU time of each process, in seconds.
    pub cpu_seconds: Option<u64>,
    /// Open files of each process.
    pub open_files: Option<u64>,
    /// Output kept, in bytes; the oldest goes first.
    pub output: Option<u64>,
}
