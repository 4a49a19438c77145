//! The binaries of the components: where they are looked for, and how they are had when they are nowhere.

mod apt;
mod command;
mod go;

use std::env;
use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::{Doing as _, Error, Progress, Result, create_dir, workspace_root};

/// A binary that the project runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// State and locks.
    Etcd,
    /// etcd's command line.
    Etcdctl,
    /// Holds scenarios.
    Registry,
    /// Metrics and rules.
    Prometheus,
    /// Checks Prometheus configuration and rules.
    Promtool,
    /// Delivers alerts.
    Alertmanager,
    /// Checks Alertmanager configuration.
    Amtool,
    /// The OpenTelemetry Collector of deploy/collector/manifest.yaml.
    Collector,
    /// Jaeger v2.
    Jaeger,
    /// Makes the networks in which tests cut members of a cluster off.
    Ip,
}

/// What [`crate::Stack`] runs.
pub const OBSERVABILITY: &[Tool] = &[Tool::Prometheus, Tool::Alertmanager, Tool::Collector, Tool::Jaeger];

/// Where a tool comes from when it is not there.
enum Source {
    /// A Debian package.
    Debian(&'static str),
    /// A build of ours, from Go modules.
    Go(go::Recipe),
}

impl Tool {
    /// Every tool.
    pub const ALL: [Tool; 10] = [
        Tool::Etcd,
        Tool::Etcdctl,
        Tool::Registry,
        Tool::Prometheus,
        Tool::Promtool,
        Tool::Alertmanager,
        Tool::Amtool,
        Tool::Collector,
        Tool::Jaeger,
        Tool::Ip,
    ];

    /// The name of its binary.
    pub const fn binary(self) -> &'static str {
        match self {
            Tool::Etcd => "etcd",
            Tool::Etcdctl => "etcdctl",
            Tool::Registry => "docker-registry",
            Tool::Prometheus => "prometheus",
            Tool::Promtool => "promtool",
            Tool::Alertmanager => "prometheus-alertmanager",
            Tool::Amtool => "amtool",
            Tool::Collector => "gauntlet-collector",
            Tool::Jaeger => "jaeger",
            Tool::Ip => "ip",
        }
    }

    /// Names under which others than Debian install the same binary.
    const fn aliases(self) -> &'static [&'static str] {
        match self {
            Tool::Registry => &["registry"],
            Tool::Alertmanager => &["alertmanager"],
            _ => &[],
        }
    }

    const fn source(self) -> Source {
        match self {
            Tool::Etcd => Source::Debian("etcd-server"),
            Tool::Etcdctl => Source::Debian("etcd-client"),
            Tool::Registry => Source::Debian("docker-registry"),
            Tool::Prometheus | Tool::Promtool => Source::Debian("prometheus"),
            Tool::Alertmanager | Tool::Amtool => Source::Debian("prometheus-alertmanager"),
            Tool::Collector => Source::Go(go::COLLECTOR),
            Tool::Jaeger => Source::Go(go::JAEGER),
            Tool::Ip => Source::Debian("iproute2"),
        }
    }

    /// What a person does to have it.
    pub fn hint(self) -> String {
        match self.source() {
            Source::Debian(package) => {
                format!("install Debian's package {package}, or put a binary named {} on PATH", self.binary())
            }
            Source::Go(_) => {
                format!(
                    "`cargo xtask stack up` builds it (Go {} or newer), or put a binary named {} on PATH",
                    go::OLDEST,
                    self.binary()
                )
            }
        }
    }

    /// The first line that a binary of it says about its version; `None` when it does not run.
    pub fn version(self, binary: &Path) -> Option<String> {
        let argument = match self {
            Tool::Etcdctl | Tool::Jaeger => "version",
            Tool::Ip => "-Version",
            _ => "--version",
        };
        let output = Command::new(binary).arg(argument).stdin(Stdio::null()).output().ok()?;
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        let text = String::from_utf8_lossy(&text).into_owned();
        match self {
            Tool::Jaeger => {
                text.lines().find(|line| line.contains("gitVersion")).or(text.lines().next()).map(str::to_owned)
            }
            _ => text.lines().next().map(str::to_owned),
        }
    }
}

/// Where tools are looked for and kept.
#[derive(Debug, Clone)]
pub struct Tools {
    /// Looked at first: `GAUNTLET_TOOLS`.
    pub dir: Option<PathBuf>,
    /// Looked at next: `PATH`, then the places where Debian's packages put binaries.
    pub path: Vec<PathBuf>,
    /// Where builds are kept: `GAUNTLET_CACHE`, else `XDG_CACHE_HOME/gauntlet/tools`, else `~/.cache/gauntlet/tools`.
    pub cache: PathBuf,
    /// The checkout whose manifests are built.
    pub source: PathBuf,
}

impl Tools {
    /// As the environment says.
    pub fn from_env() -> Tools {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut path: Vec<PathBuf> = set("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
        path.extend(["/usr/local/bin", "/usr/bin", "/usr/sbin"].map(PathBuf::from));
        let cache = set("GAUNTLET_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("gauntlet/tools")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/gauntlet/tools")))
            .unwrap_or_else(|| workspace_root().join(".cache/tools"));
        Tools { dir: set("GAUNTLET_TOOLS"), path, cache, source: workspace_root() }
    }

    /// The binary of a tool, when it is there.
    pub fn find(&self, tool: Tool) -> Option<PathBuf> {
        let names = || std::iter::once(tool.binary()).chain(tool.aliases().iter().copied());
        let dirs = self.dir.iter().chain(&self.path);
        let found = dirs.flat_map(|dir| names().map(move |name| dir.join(name))).find(|path| is_executable(path));
        found.or_else(|| match tool.source() {
            Source::Go(recipe) => recipe.kept(self).ok().filter(|path| is_executable(path)),
            Source::Debian(_) => None,
        })
    }

    /// The binary of a tool.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not there.
    pub fn require(&self, tool: Tool) -> Result<PathBuf> {
        self.find(tool).ok_or_else(|| Error::Missing { tool: tool.binary(), hint: tool.hint() })
    }

    /// Installs and builds what is missing of these, and reports while it takes time. When several processes want the same, one does it and the
    /// others wait.
    ///
    /// # Errors
    /// [`Error::Missing`] when neither apt nor Go can help, naming what to install; [`Error::Build`] with the end of the log;
    /// [`Error::Cancelled`].
    pub fn ensure(&self, tools: &[Tool], progress: &mut dyn Progress) -> Result<()> {
        self.ensure_packages(tools, progress)?;
        for tool in tools {
            if let Source::Go(recipe) = tool.source()
                && self.find(*tool).is_none()
            {
                let _lock = self.lock(tool.binary(), progress)?;
                // Whoever held the lock may have built it.
                if self.find(*tool).is_none() {
                    recipe.build(self, *tool, progress)?;
                }
            }
        }
        Ok(())
    }

    /// The part of [`Tools::ensure`] that installs packages: under a minute, and what is compiled may need it.
    ///
    /// # Errors
    /// As [`Tools::ensure`].
    pub fn ensure_packages(&self, tools: &[Tool], progress: &mut dyn Progress) -> Result<()> {
        let missing = || tools.iter().copied().filter(|tool| self.find(*tool).is_none());
        let packages = |list: &mut dyn Iterator<Item = Tool>| -> Vec<(Tool, &'static str)> {
            list.filter_map(|tool| match tool.source() {
                Source::Debian(package) => Some((tool, package)),
                Source::Go(_) => None,
            })
            .collect()
        };
        if packages(&mut missing()).is_empty() {
            return Ok(());
        }
        let _lock = self.lock("apt", progress)?;
        let wanted = packages(&mut missing());
        if !wanted.is_empty() {
            apt::install(self, &wanted, progress)?;
        }
        match packages(&mut missing()).first() {
            Some((tool, _)) => Err(Error::Missing { tool: tool.binary(), hint: tool.hint() }),
            None => Ok(()),
        }
    }

    /// Waits for the lock of that name; it is held until the file is dropped or this process ends.
    fn lock(&self, name: &str, progress: &mut dyn Progress) -> Result<File> {
        create_dir(&self.cache)?;
        let path = self.cache.join(format!("{name}.lock"));
        let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => {
                    return Err(Error::Io { doing: format!("lock {}", path.display()), source });
                }
                Err(TryLockError::WouldBlock) if progress.cancelled() => return Err(Error::Cancelled),
                Err(TryLockError::WouldBlock) => {}
            }
            if !told {
                progress.report(&format!("{name}: another process is at it, waiting for that"));
                told = true;
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use super::*;

    fn tools(dir: &Path) -> Tools {
        Tools { dir: None, path: Vec::new(), cache: dir.join("cache"), source: workspace_root() }
    }

    fn executable(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "#!/bin/sh\necho 'jaeger 1.2.3'\n").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn looks_in_the_named_directory_then_on_the_path_then_in_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        assert_eq!(tools.find(Tool::Jaeger), None);
        let kept = go::JAEGER.kept(&tools).unwrap();
        executable(&kept);
        assert_eq!(tools.find(Tool::Jaeger), Some(kept));
        tools.path.push(dir.path().join("path"));
        executable(&dir.path().join("path/jaeger"));
        assert_eq!(tools.find(Tool::Jaeger), Some(dir.path().join("path/jaeger")));
        tools.dir = Some(dir.path().join("named"));
        executable(&dir.path().join("named/jaeger"));
        assert_eq!(tools.find(Tool::Jaeger), Some(dir.path().join("named/jaeger")));
        assert_eq!(Tool::Jaeger.version(&dir.path().join("named/jaeger")).as_deref(), Some("jaeger 1.2.3"));
    }

    #[test]
    fn a_file_that_is_not_executable_and_a_directory_are_no_tools() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        tools.path.push(dir.path().to_path_buf());
        std::fs::write(dir.path().join("etcd"), "").unwrap();
        std::fs::create_dir(dir.path().join("jaeger")).unwrap();
        assert_eq!((tools.find(Tool::Etcd), tools.find(Tool::Jaeger)), (None, None));
    }

    #[test]
    fn names_that_other_distributions_use_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        tools.path.push(dir.path().to_path_buf());
        executable(&dir.path().join("alertmanager"));
        assert_eq!(tools.find(Tool::Alertmanager), Some(dir.path().join("alertmanager")));
    }

    #[test]
    fn another_manifest_is_another_build() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        let before = go::COLLECTOR.kept(&tools).unwrap();
        assert_eq!(go::COLLECTOR.kept(&tools).unwrap(), before);
        std::fs::create_dir_all(dir.path().join("deploy/collector")).unwrap();
        std::fs::write(dir.path().join("deploy/collector/manifest.yaml"), "dist: {}").unwrap();
        tools.source = dir.path().to_path_buf();
        assert_ne!(go::COLLECTOR.kept(&tools).unwrap(), before);
    }

    #[test]
    fn who_waits_for_another_process_can_give_up() {
        struct Impatient(Vec<String>);
        impl Progress for Impatient {
            fn report(&mut self, line: &str) {
                self.0.push(line.to_owned());
            }
            fn cancelled(&self) -> bool {
                !self.0.is_empty()
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let tools = tools(dir.path());
        let mut progress = Impatient(Vec::new());
        let held = tools.lock("jaeger", &mut progress).unwrap();
        assert!(progress.0.is_empty());
        assert!(matches!(tools.lock("jaeger", &mut progress), Err(Error::Cancelled)));
        assert_eq!(progress.0, ["jaeger: another process is at it, waiting for that"]);
        drop(held);
        tools.lock("jaeger", &mut progress).unwrap();
    }

    #[test]
    fn what_is_missing_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = tools(dir.path()).require(Tool::Etcd).unwrap_err().to_string();
        assert_eq!(error, "etcd is missing: install Debian's package etcd-server, or put a binary named etcd on PATH");
    }
}
