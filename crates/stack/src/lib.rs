//! The real components of the pipeline (etcd, registry, collector, Jaeger, Prometheus, Alertmanager): how their binaries are had, and how
//! they run as child processes from the very files that users deploy.
//!
//! Everything here blocks. Every child ends with this process, however it ends. Tests take free ports; `cargo xtask` the documented ones.
//!
//! ```no_run
//! use gauntlet_stack::{Options, Stack, Tools, tools};
//!
//! # fn main() -> gauntlet_stack::Result<()> {
//! let mut progress = |line: &str| eprintln!("{line}");
//! Tools::from_env().ensure(tools::OBSERVABILITY, &mut progress)?;
//! let mut stack = Stack::start(Options::for_tests("/tmp/somewhere")?, &mut progress)?;
//! println!("send spans to {}", stack.collector.otlp_grpc());
//! stack.collector.process.kill()?;
//! stack.collector.process.start()?;
//! # Ok(())
//! # }
//! ```

pub mod etcd;
pub mod http;
pub mod observability;
pub mod pages;
pub mod ports;
pub mod process;
pub mod registry;
mod render;
pub mod tools;

use std::io;
use std::path::{Path, PathBuf};

pub use etcd::Etcd;
pub use observability::{Alertmanager, Collector, Jaeger, Options, Pace, Prometheus, Stack};
pub use ports::{Port, Ports};
pub use process::{Process, Ready, Spec};
pub use registry::{Registry, RegistryOptions};
pub use tools::{Tool, Tools};

/// What a caller hears while something takes longer than a moment, and how it says that it no longer wants it.
pub trait Progress {
    /// One line for a person: what is going on, or what came of it.
    fn report(&mut self, line: &str);

    /// Whether the work shall be given up. Asked several times a second during installs and builds.
    fn cancelled(&self) -> bool {
        false
    }
}

impl<F: FnMut(&str)> Progress for F {
    fn report(&mut self, line: &str) {
        self(line);
    }
}

/// Why a component could not be had or does not run. The text says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, directory or process could not be used.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the system answered.
        source: io::Error,
    },
    /// A binary is nowhere and can't be had here.
    #[error("{tool} is missing: {hint}")]
    Missing {
        /// The binary's name.
        tool: &'static str,
        /// What to install or run.
        hint: String,
    },
    /// An install or a build went wrong.
    #[error("{what} failed ({status}). The end of {}:\n{tail}", log.display())]
    Build {
        /// What was installed or built.
        what: String,
        /// How the command ended.
        status: String,
        /// Its whole output.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// The caller gave up through [`Progress::cancelled`].
    #[error("given up on request")]
    Cancelled,
    /// A port that was asked for is in use.
    #[error("port {port} ({name}) is taken: end what listens there, or choose another with --port {name}=NUMBER")]
    PortTaken {
        /// The number.
        port: u16,
        /// The port's name in [`Port`].
        name: &'static str,
    },
    /// No free port was found in the range that tests use.
    #[error("no free port between {from} and {to}")]
    NoFreePort {
        /// First port tried.
        from: u16,
        /// The port after the last.
        to: u16,
    },
    /// A component ended or did not answer in time.
    #[error("{name} {what}. The end of {}:\n{tail}", log.display())]
    NotReady {
        /// The component.
        name: String,
        /// What it did instead of becoming ready.
        what: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// A deployed file no longer holds a text that is replaced in it.
    #[error("{} does not contain {text:?}, which is to be replaced: bring crates/stack/src/render.rs and the file together", file.display())]
    Drift {
        /// The deployed file.
        file: PathBuf,
        /// The text that was looked for.
        text: String,
    },
    /// A component's HTTP API refused or could not be understood.
    #[error("{url}: {reason}")]
    Http {
        /// The whole address.
        url: String,
        /// Status, or what went wrong.
        reason: String,
    },
}

/// A [`std::result::Result`] with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Adds to an I/O error what was being done.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { doing: what(), source })
    }
}

/// The checkout that this crate was compiled in: where the deployed files are.
pub fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_path_buf()
}

/// The last lines of a log, for an error text. Empty when it can't be read.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 25;
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n")
}

pub(crate) fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).doing(|| format!("create directory {}", path.display()))
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).doing(|| format!("write {}", path.display()))
}

pub(crate) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).doing(|| format!("read {}", path.display()))
}
