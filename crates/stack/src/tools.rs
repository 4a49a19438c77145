//! Finds the components' binaries, and installs or builds missing ones.

mod apt;
mod command;
mod go;
mod plan;

use std::env;
use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

pub use plan::Plan;

use crate::{Doing as _, Error, Progress, Result, create_dir, workspace_root};

/// A binary that the project runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// The store of state and locks.
    Etcd,
    /// etcd's command-line client.
    Etcdctl,
    /// The OCI registry that stores scenarios.
    Registry,
    /// Stores metrics and evaluates rules.
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
    /// Creates the networks in which tests partition a cluster.
    Ip,
    /// Creates the bare Debian of `cargo xtask clean-room`.
    Mmdebstrap,
}

/// The tools that [`crate::Stack`] needs.
pub const OBSERVABILITY: &[Tool] = &[Tool::Prometheus, Tool::Alertmanager, Tool::Collector, Tool::Jaeger];

/// The tools that the tests use: all but mmdebstrap.
pub const TESTS: &[Tool] = match &Tool::ALL {
    [tests @ .., Tool::Mmdebstrap] => tests,
    _ => panic!("mmdebstrap must be the last tool"),
};

/// How to add a missing tool.
enum Source {
    /// A Debian package.
    Debian(&'static str),
    /// A build from Go modules.
    Go(go::Recipe),
}

impl Tool {
    /// Every tool.
    pub const ALL: [Tool; 11] = [
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
        Tool::Mmdebstrap,
    ];

    /// The name of the binary.
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
            Tool::Mmdebstrap => "mmdebstrap",
        }
    }

    /// The environment variable that names the binary to use. If it is set, no other binary is considered.
    pub const fn variable(self) -> &'static str {
        match self {
            Tool::Etcd => "GAUNTLET_ETCD",
            Tool::Etcdctl => "GAUNTLET_ETCDCTL",
            Tool::Registry => "GAUNTLET_REGISTRY",
            Tool::Prometheus => "GAUNTLET_PROMETHEUS",
            Tool::Promtool => "GAUNTLET_PROMTOOL",
            Tool::Alertmanager => "GAUNTLET_ALERTMANAGER",
            Tool::Amtool => "GAUNTLET_AMTOOL",
            Tool::Collector => "GAUNTLET_COLLECTOR",
            Tool::Jaeger => "GAUNTLET_JAEGER",
            Tool::Ip => "GAUNTLET_IP",
            Tool::Mmdebstrap => "GAUNTLET_MMDEBSTRAP",
        }
    }

    /// Whether a binary on `PATH` may be used. Distributions ship older etcd releases, which behave differently from the deployed one.
    const fn is_taken_from_path(self) -> bool {
        !matches!(self, Tool::Etcd | Tool::Etcdctl)
    }

    /// Names that other distributions give the same binary.
    const fn aliases(self) -> &'static [&'static str] {
        match self {
            Tool::Registry => &["registry"],
            Tool::Alertmanager => &["alertmanager"],
            _ => &[],
        }
    }

    const fn source(self) -> Source {
        match self {
            Tool::Etcd => Source::Go(go::ETCD),
            Tool::Etcdctl => Source::Go(go::ETCDCTL),
            Tool::Registry => Source::Debian("docker-registry"),
            Tool::Prometheus | Tool::Promtool => Source::Debian("prometheus"),
            Tool::Alertmanager | Tool::Amtool => Source::Debian("prometheus-alertmanager"),
            Tool::Collector => Source::Go(go::COLLECTOR),
            Tool::Jaeger => Source::Go(go::JAEGER),
            Tool::Ip => Source::Debian("iproute2"),
            Tool::Mmdebstrap => Source::Debian("mmdebstrap"),
        }
    }

    /// What to do if the tool is missing.
    pub fn hint(self) -> String {
        let how = match self.source() {
            Source::Debian(package) => {
                format!("installs Debian's package {package}, as root or with a passwordless sudo")
            }
            Source::Go(_) => format!("builds it with Go {} or newer", go::OLDEST),
        };
        format!("`cargo xtask setup --tools` {how}; or name a binary in {}", self.variable())
    }

    /// The first line of the version that a binary of this tool prints; `None` if the binary doesn't run.
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

/// Where tools are found, and where builds are stored.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The binaries named by [`Tool::variable`]; no other binary of these tools is used.
    pub named: Vec<(Tool, PathBuf)>,
    /// Searched first: `GAUNTLET_TOOLS`.
    pub dir: Option<PathBuf>,
    /// Searched next, except for etcd and etcdctl: `PATH`, then the directories into which Debian's packages install binaries.
    pub path: Vec<PathBuf>,
    /// Where builds are stored: `GAUNTLET_CACHE`, else `XDG_CACHE_HOME/gauntlet/tools`, else `~/.cache/gauntlet/tools`.
    pub cache: PathBuf,
    /// The checkout with the manifests to build from.
    pub source: PathBuf,
}

impl Tools {
    /// Reads the settings from the environment.
    pub fn from_env() -> Tools {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut path: Vec<PathBuf> = set("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
        path.extend(["/usr/local/bin", "/usr/bin", "/usr/sbin"].map(PathBuf::from));
        let cache = set("GAUNTLET_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("gauntlet/tools")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/gauntlet/tools")))
            .unwrap_or_else(|| workspace_root().join(".cache/tools"));
        let named = Tool::ALL.into_iter().filter_map(|tool| Some((tool, set(tool.variable())?))).collect();
        Tools { named, dir: set("GAUNTLET_TOOLS"), path, cache, source: workspace_root() }
    }

    /// Finds the binary of a tool: the one that its variable names, if it is set; otherwise the first in `dir`, `path` and `cache`.
    pub fn find(&self, tool: Tool) -> Option<PathBuf> {
        if let Some(path) = self.named(tool) {
            return is_executable(path).then(|| path.to_path_buf());
        }
        let names = || std::iter::once(tool.binary()).chain(tool.aliases().iter().copied());
        let path = if tool.is_taken_from_path() { self.path.as_slice() } else { &[] };
        let dirs = self.dir.iter().chain(path);
        let found = dirs.flat_map(|dir| names().map(move |name| dir.join(name))).find(|path| is_executable(path));
        found.or_else(|| match tool.source() {
            Source::Go(recipe) => recipe.cached(self).ok().filter(|path| is_executable(path)),
            Source::Debian(_) => None,
        })
    }

    fn named(&self, tool: Tool) -> Option<&Path> {
        self.named.iter().find(|(of, _)| *of == tool).map(|(_, path)| path.as_path())
    }

    /// As [`Tools::find`], for a tool that must exist.
    ///
    /// # Errors
    /// [`Error::Missing`], with the command that adds the tool.
    pub fn require(&self, tool: Tool) -> Result<PathBuf> {
        self.find(tool).ok_or_else(|| self.missing(tool))
    }

    fn missing(&self, tool: Tool) -> Error {
        Error::Missing { tool: tool.binary(), hint: self.missing_hint(tool) }
    }

    fn missing_hint(&self, tool: Tool) -> String {
        match self.named(tool) {
            Some(path) => {
                format!(
                    "{} names {}, which is not an executable file: correct or unset it",
                    tool.variable(),
                    path.display()
                )
            }
            None => tool.hint(),
        }
    }

    /// Whether the binary is a build of this project, from the current manifest.
    pub fn is_own_build(&self, tool: Tool, binary: &Path) -> bool {
        matches!(tool.source(), Source::Go(recipe) if recipe.cached(self).is_ok_and(|cached| cached == binary))
    }

    /// Returns what [`Tools::ensure`] would install and build.
    pub fn plan(&self, tools: &[Tool]) -> Plan {
        Plan::new(self, tools)
    }

    /// Installs and builds the tools that are missing, and reports progress. If several processes need the same tool, one does the work and
    /// the others wait.
    ///
    /// # Errors
    /// [`Error::Missing`] if neither apt nor Go can add a tool, with what to install; [`Error::Build`] with the end of the log;
    /// [`Error::Cancelled`].
    pub fn ensure(&self, tools: &[Tool], progress: &mut dyn Progress) -> Result<()> {
        self.ensure_packages(tools, progress)?;
        for tool in tools {
            if let Source::Go(recipe) = tool.source()
                && self.find(*tool).is_none()
            {
                if self.named(*tool).is_some() {
                    return Err(self.missing(*tool));
                }
                let _lock = self.lock(tool.binary(), progress)?;
                // The process that held the lock may have built it.
                if self.find(*tool).is_none() {
                    recipe.build(self, *tool, progress)?;
                }
            }
        }
        Ok(())
    }

    /// The part of [`Tools::ensure`] that installs packages, which takes less than a minute.
    ///
    /// # Errors
    /// As [`Tools::ensure`].
    pub fn ensure_packages(&self, tools: &[Tool], progress: &mut dyn Progress) -> Result<()> {
        if let Some((tool, _)) = self.missing_packages(tools).iter().find(|(tool, _)| self.named(*tool).is_some()) {
            return Err(self.missing(*tool));
        }
        if self.missing_packages(tools).is_empty() {
            return Ok(());
        }
        let _lock = self.lock("apt", progress)?;
        // The process that held the lock may have installed them.
        let wanted = self.missing_packages(tools);
        if !wanted.is_empty() {
            apt::install(self, &wanted, progress)?;
        }
        match self.missing_packages(tools).first() {
            Some((tool, _)) => Err(self.missing(*tool)),
            None => Ok(()),
        }
    }

    /// The missing tools that come from a Debian package, with their packages.
    fn missing_packages(&self, tools: &[Tool]) -> Vec<(Tool, &'static str)> {
        let missing = tools.iter().filter(|tool| self.find(**tool).is_none());
        missing
            .filter_map(|tool| match tool.source() {
                Source::Debian(package) => Some((*tool, package)),
                Source::Go(_) => None,
            })
            .collect()
    }

    /// Waits for the lock `name`. It is held until the file is dropped or this process ends.
    fn lock(&self, name: &str, progress: &mut dyn Progress) -> Result<File> {
        create_dir(&self.cache)?;
        let path = self.cache.join(format!("{name}.lock"));
        let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
        let mut reported = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => {
                    return Err(Error::Io { doing: format!("lock {}", path.display()), source });
                }
                Err(TryLockError::WouldBlock) if progress.cancelled() => return Err(Error::Cancelled),
                Err(TryLockError::WouldBlock) => {}
            }
            if !reported {
                progress.report(&format!("{name}: waiting for another process that installs or builds it"));
                reported = true;
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
        Tools { named: Vec::new(), dir: None, path: Vec::new(), cache: dir.join("cache"), source: workspace_root() }
    }

    fn executable(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "#!/bin/sh\necho 'jaeger 1.2.3'\n").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn find_prefers_the_tools_directory_then_the_path_then_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        assert_eq!(tools.find(Tool::Jaeger), None);
        let cached = go::JAEGER.cached(&tools).unwrap();
        executable(&cached);
        assert_eq!(tools.find(Tool::Jaeger), Some(cached));
        tools.path.push(dir.path().join("path"));
        executable(&dir.path().join("path/jaeger"));
        assert_eq!(tools.find(Tool::Jaeger), Some(dir.path().join("path/jaeger")));
        tools.dir = Some(dir.path().join("named"));
        executable(&dir.path().join("named/jaeger"));
        assert_eq!(tools.find(Tool::Jaeger), Some(dir.path().join("named/jaeger")));
        assert_eq!(Tool::Jaeger.version(&dir.path().join("named/jaeger")).as_deref(), Some("jaeger 1.2.3"));
    }

    #[test]
    fn named_binary_excludes_all_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        let named = dir.path().join("elsewhere/my-jaeger");
        tools.named.push((Tool::Jaeger, named.clone()));
        tools.path.push(dir.path().join("path"));
        executable(&dir.path().join("path/jaeger"));
        assert_eq!(tools.find(Tool::Jaeger), None);
        let error = tools.ensure(&[Tool::Jaeger], &mut |_: &str| {}).unwrap_err().to_string();
        let why = format!("jaeger is missing: GAUNTLET_JAEGER names {}, which is not", named.display());
        assert!(error.starts_with(&why), "{error}");
        executable(&named);
        assert_eq!(tools.find(Tool::Jaeger), Some(named));
    }

    #[test]
    fn etcd_on_the_path_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        tools.path.push(dir.path().join("path"));
        executable(&dir.path().join("path/etcd"));
        executable(&dir.path().join("path/etcdctl"));
        assert_eq!((tools.find(Tool::Etcd), tools.find(Tool::Etcdctl)), (None, None));
        let cached = go::ETCD.cached(&tools).unwrap();
        executable(&cached);
        assert_eq!(tools.find(Tool::Etcd), Some(cached));
    }

    #[test]
    fn non_executable_files_and_directories_are_not_tools() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        tools.path.push(dir.path().to_path_buf());
        std::fs::write(dir.path().join("prometheus"), "").unwrap();
        std::fs::create_dir(dir.path().join("jaeger")).unwrap();
        assert_eq!((tools.find(Tool::Prometheus), tools.find(Tool::Jaeger)), (None, None));
    }

    #[test]
    fn binaries_are_found_by_their_aliases() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        tools.path.push(dir.path().to_path_buf());
        executable(&dir.path().join("alertmanager"));
        assert_eq!(tools.find(Tool::Alertmanager), Some(dir.path().join("alertmanager")));
    }

    #[test]
    fn changed_manifest_invalidates_a_cached_build() {
        let dir = tempfile::tempdir().unwrap();
        let mut tools = tools(dir.path());
        let before = go::COLLECTOR.cached(&tools).unwrap();
        assert_eq!(go::COLLECTOR.cached(&tools).unwrap(), before);
        std::fs::create_dir_all(dir.path().join("deploy/collector")).unwrap();
        std::fs::write(dir.path().join("deploy/collector/manifest.yaml"), "dist: {}").unwrap();
        tools.source = dir.path().to_path_buf();
        assert_ne!(go::COLLECTOR.cached(&tools).unwrap(), before);
    }

    #[test]
    fn waiting_for_a_lock_can_be_cancelled() {
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
        assert_eq!(progress.0, ["jaeger: waiting for another process that installs or builds it"]);
        drop(held);
        tools.lock("jaeger", &mut progress).unwrap();
    }

    #[test]
    fn error_for_a_missing_tool_says_how_to_add_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = |tool| tools(dir.path()).require(tool).unwrap_err().to_string();
        assert_eq!(
            error(Tool::Etcd),
            "etcd is missing: `cargo xtask setup --tools` builds it with Go 1.26 or newer; or name a binary in GAUNTLET_ETCD"
        );
        assert_eq!(
            error(Tool::Promtool),
            "promtool is missing: `cargo xtask setup --tools` installs Debian's package prometheus, as root or with a passwordless \
             sudo; or name a binary in GAUNTLET_PROMTOOL"
        );
    }
}
