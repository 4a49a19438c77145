//! Builds from Go modules: the collector from its builder manifest, etcd and Jaeger from modules of ours that pin them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::command::{run_logged, succeeds};
use super::{Tool, Tools};
use crate::{Doing as _, Error, Progress, Result, create_dir, read};

/// The oldest Go that builds all of them.
pub(super) const OLDEST: &str = "1.26";

const BUILDER: &str = "go.opentelemetry.io/collector/cmd/builder@v0.159.0";
const ETCD_PACKAGE: &str = "go.etcd.io/etcd/server/v3";
const ETCDCTL_PACKAGE: &str = "go.etcd.io/etcd/etcdctl/v3";
const STRIPPED: &str = "-s -w";
const JAEGER_PACKAGE: &str = "github.com/jaegertracing/jaeger/cmd/jaeger";
/// Module v1.76.0 is the release that Jaeger calls 2.13.0.
const JAEGER_LDFLAGS: &str = "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=v2.13.0";

/// A build of ours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipe {
    pub(super) name: &'static str,
    binary: &'static str,
    /// The files, relative to the checkout, whose content decides whether a kept build is still the right one.
    inputs: &'static [&'static str],
    /// What of the steps decides it too.
    settings: &'static str,
    pub(super) usual: &'static str,
    steps: fn(&Tools, &Path) -> Vec<(&'static str, Command)>,
    /// Where the steps leave the binary, relative to their directory.
    product: &'static str,
}

pub(super) const COLLECTOR: Recipe = Recipe {
    name: "collector",
    binary: "gauntlet-collector",
    inputs: &["deploy/collector/manifest.yaml"],
    settings: BUILDER,
    usual: "about 6 min the first time",
    steps: |tools, work| {
        let mut install = go(work);
        install.args(["install", BUILDER]).env("GOBIN", work);
        let mut build = polite(&work.join("builder"));
        build.arg("--config").arg(tools.source.join("deploy/collector/manifest.yaml")).current_dir(work);
        vec![("collector builder", install), ("collector", build)]
    },
    product: "_build/gauntlet-collector",
};

pub(super) const JAEGER: Recipe = Recipe {
    name: "jaeger",
    binary: "jaeger",
    inputs: &["jaeger/build/go.mod", "jaeger/build/go.sum"],
    settings: JAEGER_LDFLAGS,
    usual: "about 6 min the first time",
    steps: |tools, work| {
        vec![("jaeger", module_build(tools, "jaeger/build", JAEGER_LDFLAGS, &work.join("jaeger"), JAEGER_PACKAGE))]
    },
    product: "jaeger",
};

pub(super) const ETCD: Recipe = Recipe {
    name: "etcd",
    binary: "etcd",
    inputs: &["etcd/build/go.mod", "etcd/build/go.sum"],
    settings: STRIPPED,
    usual: "about a minute the first time",
    steps: |tools, work| vec![("etcd", module_build(tools, "etcd/build", STRIPPED, &work.join("etcd"), ETCD_PACKAGE))],
    product: "etcd",
};

pub(super) const ETCDCTL: Recipe = Recipe {
    name: "etcdctl",
    binary: "etcdctl",
    steps: |tools, work| {
        vec![("etcdctl", module_build(tools, "etcd/build", STRIPPED, &work.join("etcdctl"), ETCDCTL_PACKAGE))]
    },
    product: "etcdctl",
    ..ETCD
};

impl Recipe {
    /// Where the build of the present inputs is kept, whether it is there or not.
    pub(super) fn kept(&self, tools: &Tools) -> Result<PathBuf> {
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

    /// Builds it and keeps it. The caller holds the lock of the tool.
    pub(super) fn build(&self, tools: &Tools, tool: Tool, progress: &mut dyn Progress) -> Result<()> {
        if let Some(missing) = missing() {
            let hint = format!("building it needs Go, {missing}; or name a binary in {}", tool.variable());
            return Err(Error::Missing { tool: tool.binary(), hint });
        }
        let kept = self.kept(tools)?;
        // Under the lock, so one name will do; what a build that was broken off left is taken away.
        let work = tools.cache.join(format!("{}-building", self.name));
        if work.exists() {
            std::fs::remove_dir_all(&work).doing(|| format!("remove {}", work.display()))?;
        }
        create_dir(&work)?;
        let log = tools.cache.join(format!("{}.log", self.name));
        for (what, command) in (self.steps)(tools, &work) {
            run_logged(command, &format!("building {what}"), self.usual, &log, progress)?;
        }
        if let Some(dir) = kept.parent() {
            create_dir(dir)?;
        }
        std::fs::rename(work.join(self.product), &kept).doing(|| format!("keep {}", kept.display()))?;
        std::fs::remove_dir_all(&work).doing(|| format!("remove {}", work.display()))
    }
}

/// Why nothing can be built here and the command that changes it; `None` when there is a `go`.
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

/// A build of a package of one of our modules, of exactly the versions that it pins.
fn module_build(tools: &Tools, module: &str, ldflags: &str, product: &Path, package: &str) -> Command {
    let mut build = go(&tools.source.join(module));
    build
        .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o"])
        .arg(product)
        .arg(package);
    build
}

/// `go`, at low priority.
fn go(dir: &Path) -> Command {
    let mut command = polite(Path::new("go"));
    command.current_dir(dir);
    command
}

/// A program at low priority: what a person waits for goes first.
fn polite(program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "10"]).arg(program).stdin(Stdio::null());
    command
}
