//! Builds the collector from its builder manifest, and etcd and Jaeger from modules of this repository that pin their versions.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::command::{LongCommand, OnCancel, succeeds};
use super::{Tool, Tools};
use crate::{Doing as _, Error, Progress, Result, create_dir, read};

/// The oldest Go release that builds all of them.
pub(super) const OLDEST: &str = "1.26";

const BUILDER: &str = "go.opentelemetry.io/collector/cmd/builder@v0.159.0";
const COLLECTOR_MANIFEST: &str = "deploy/collector/manifest.yaml";
const JAEGER_INPUTS: &[&str] = &["jaeger/build/go.mod", "jaeger/build/go.sum"];
const ETCD_INPUTS: &[&str] = &["etcd/build/go.mod", "etcd/build/go.sum"];
const STRIPPED: &str = "-s -w";
/// Module v1.76.0 is the release that Jaeger calls 2.13.0.
const JAEGER_LDFLAGS: &str = "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=v2.13.0";

/// How to build a binary from pinned Go modules.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipe {
    pub(super) name: &'static str,
    binary: &'static str,
    /// The files, relative to the checkout, whose content decides whether a cached build is still current.
    inputs: &'static [&'static str],
    /// What decides it besides the inputs: the linker flags, or the version of the builder.
    settings: &'static str,
    /// How long the build usually takes, for a person.
    pub(super) usual: &'static str,
    source: Source,
    /// Where the build leaves the binary, relative to its directory.
    product: &'static str,
}

/// Where the code comes from.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A package of one of the project's modules, which pins its dependencies.
    Module { dir: &'static str, package: &'static str },
    /// The manifest of the OpenTelemetry Collector Builder.
    CollectorManifest(&'static str),
}

pub(super) const COLLECTOR: Recipe = Recipe {
    name: "collector",
    binary: "gauntlet-collector",
    inputs: &[COLLECTOR_MANIFEST],
    settings: BUILDER,
    usual: "about 6 min the first time",
    source: Source::CollectorManifest(COLLECTOR_MANIFEST),
    product: "_build/gauntlet-collector",
};

pub(super) const JAEGER: Recipe = Recipe {
    settings: JAEGER_LDFLAGS,
    usual: "about 6 min the first time",
    ..Recipe::module("jaeger", "jaeger/build", JAEGER_INPUTS, "github.com/jaegertracing/jaeger/cmd/jaeger")
};

pub(super) const ETCD: Recipe = Recipe::module("etcd", "etcd/build", ETCD_INPUTS, "go.etcd.io/etcd/server/v3");

pub(super) const ETCDCTL: Recipe = Recipe::module("etcdctl", "etcd/build", ETCD_INPUTS, "go.etcd.io/etcd/etcdctl/v3");

impl Recipe {
    /// A stripped binary, built from a package of the module in `dir`.
    const fn module(
        name: &'static str,
        dir: &'static str,
        inputs: &'static [&'static str],
        package: &'static str,
    ) -> Recipe {
        let source = Source::Module { dir, package };
        let usual = "about a minute the first time";
        Recipe { name, binary: name, inputs, settings: STRIPPED, usual, source, product: name }
    }

    /// The commands that build it in `work`, each with a name.
    fn steps(&self, tools: &Tools, work: &Path) -> Vec<(&'static str, Command)> {
        match self.source {
            Source::Module { dir, package } => {
                let mut build = go(&tools.source.join(dir));
                build
                    .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", self.settings, "-o"])
                    .arg(work.join(self.product))
                    .arg(package);
                vec![(self.name, build)]
            }
            Source::CollectorManifest(manifest) => {
                let mut install = go(work);
                install.args(["install", self.settings]).env("GOBIN", work);
                let mut build = low_priority(&work.join("builder"));
                build.arg("--config").arg(tools.source.join(manifest)).current_dir(work);
                vec![("collector builder", install), (self.name, build)]
            }
        }
    }

    /// The path of the build of the current inputs, whether it exists or not.
    pub(super) fn cached(&self, tools: &Tools) -> Result<PathBuf> {
        let mut hash = Sha256::new();
        hash.update(self.settings);
        for input in self.inputs {
            hash.update(read(&tools.source.join(input))?);
        }
        let mut key = String::new();
        for byte in hash.finalize().iter().take(6) {
            let _ = write!(key, "{byte:02x}");
        }
        Ok(tools.cache.join(format!("{}-{key}", self.name)).join(self.binary))
    }

    /// Builds the binary and stores it in the cache. The caller must hold the tool's lock.
    pub(super) fn build(&self, tools: &Tools, tool: Tool, progress: &mut dyn Progress) -> Result<()> {
        if let Some(missing) = missing() {
            let hint = format!("building it needs Go {missing}; or name a binary in {}", tool.variable());
            return Err(Error::Missing { tool: tool.binary(), hint });
        }
        let cached = self.cached(tools)?;
        // Under the tool's lock, so a fixed name is safe. An interrupted build may have left the directory behind.
        let work = tools.cache.join(format!("{}-building", self.name));
        if work.exists() {
            std::fs::remove_dir_all(&work).doing(|| format!("remove {}", work.display()))?;
        }
        create_dir(&work)?;
        let log = tools.cache.join(format!("{}.log", self.name));
        for (what, command) in self.steps(tools, &work) {
            let what = format!("building {what}");
            LongCommand { what: &what, usual: self.usual, log: &log, on_cancel: OnCancel::Kill }
                .run(command, progress)?;
        }
        if let Some(dir) = cached.parent() {
            create_dir(dir)?;
        }
        std::fs::rename(work.join(self.product), &cached).doing(|| format!("store {}", cached.display()))?;
        std::fs::remove_dir_all(&work).doing(|| format!("remove {}", work.display()))
    }
}

/// The Go release to install and the command that installs it; `None` if there is a `go`.
pub(super) fn missing() -> Option<String> {
    if succeeds(Command::new("go").arg("version")) {
        return None;
    }
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Some(format!(
        "{OLDEST} or newer on PATH: mkdir -p ~/.local && curl -fsSL https://go.dev/dl/go{OLDEST}.0.linux-{architecture}.tar.gz \
         | tar -C ~/.local -xz && export PATH=~/.local/go/bin:$PATH"
    ))
}

/// A `go` command in `dir`, at low priority.
fn go(dir: &Path) -> Command {
    let mut command = low_priority(Path::new("go"));
    command.current_dir(dir);
    command
}

/// A command at low priority, so that it doesn't slow down a person's work.
fn low_priority(program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "10"]).arg(program).stdin(Stdio::null());
    command
}
