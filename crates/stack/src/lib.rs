//! Finds, installs and builds the binaries of the real components (etcd, registry, collector, Jaeger, Prometheus, Alertmanager), and runs
//! them as child processes on the configuration files that users deploy.
//!
//! Every function here blocks. Every child ends when this process ends, for whatever reason. Tests use free ports, `cargo xtask` uses the
//! documented ones.
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

/// Receives the progress of slow work, and can cancel it.
pub trait Progress {
    /// Reports one line for a person: what is being done, or its result.
    fn report(&mut self, line: &str);

    /// Whether to cancel the work. Installs and builds check it several times a second.
    fn cancelled(&self) -> bool {
        false
    }
}

impl<F: FnMut(&str)> Progress for F {
    fn report(&mut self, line: &str) {
        self(line);
    }
}

/// Why a component can't be found, installed, built or run. The text says what to do about it, where there is a remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, directory or process failed.
    #[error("{doing}: {source}")]
    Io {
        /// The operation.
        doing: String,
        /// The system's error.
        source: io::Error,
    },
    /// A binary wasn't found and can't be installed or built here.
    #[error("{tool} is missing: {hint}")]
    Missing {
        /// The binary's name.
        tool: &'static str,
        /// What to install or run.
        hint: String,
    },
    /// An install or a build failed.
    #[error("{what} failed ({status}). The end of {}:\n{tail}", log.display())]
    Build {
        /// What was installed or built.
        what: String,
        /// The command's exit status.
        status: String,
        /// The file with its complete output.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// The caller cancelled the work through [`Progress::cancelled`].
    #[error("cancelled")]
    Cancelled,
    /// A requested port is in use.
    #[error(
        "port {port} ({name}) is in use: stop the process listening on it (`ss -ltnp sport = :{port}`), or choose another port with --port {name}=NUMBER"
    )]
    PortTaken {
        /// The port number.
        port: u16,
        /// The port's name in [`Port`].
        name: &'static str,
    },
    /// The range that tests use contains no free port.
    #[error("no free port between {from} and {to}: other tests hold them all, or other programs listen on them")]
    NoFreePort {
        /// The first port tried.
        from: u16,
        /// The port after the last.
        to: u16,
    },
    /// A component exited, or wasn't ready in time.
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
    /// A deployed file no longer contains a text that has to be replaced in it.
    #[error("{} does not contain {text:?}, which has to be replaced: update the replacement in crates/stack/src/observability.rs", file.display())]
    Drift {
        /// The deployed file.
        file: PathBuf,
        /// The missing text.
        text: String,
    },
    /// A request to a component's HTTP API failed, or its response can't be parsed.
    #[error("{url}: {reason}")]
    Http {
        /// The request's URL.
        url: String,
        /// The status, or the failure.
        reason: String,
    },
}

/// A [`std::result::Result`] with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Turns an I/O error into [`Error::Io`], with the operation that failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { doing: what(), source })
    }
}

/// The checkout in which this crate was compiled, with the deployed files.
pub fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_path_buf()
}

/// The last lines of a log, for an error text; empty if it can't be read.
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
