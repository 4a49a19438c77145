//! Builds from Go modules: the collector from its builder manifest, Jaeger from a module of ours that pins it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::command::{run_logged, succeeds};
use super::{Tool, Tools};
use crate::{Doing as _, Error, Progress, Result, create_dir, read};

/// The oldest Go that builds both.
pub(super) const OLDEST: &str = "1.26";

const BUILDER: &str = "go.opentelemetry.io/collector/cmd/builder@v0.159.0";
const JAEGER_PACKAGE: &str = "github.com/jaegertracing/jaeger/cmd/jaeger";
/// Module v1.76.0 is the release that Jaeger calls 2.13.0.
const JAEGER_LDFLAGS: &str = "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=v2.13.0";

/// A build of ours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipe {
    name: &'static str,
    binary: &'static str,
    /// The files, relative to the checkout, whose content decides whether a kept build is still the right one.
    inputs: &'static [&'static str],
    /// What of the steps decides it too.
    settings: &'static str,
    usual: &'static str,
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
        let mut build = go(&tools.source.join("jaeger/build"));
        build
            .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", JAEGER_LDFLAGS, "-o"])
            .arg(work.join("jaeger"))
            .arg(JAEGER_PACKAGE);
        vec![("jaeger", build)]
    },
    product: "jaeger",
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
        if !succeeds(Command::new("go").arg("version")) {
            let hint = format!(
                "it is built with Go {OLDEST} or newer: install Go and put `go` on PATH, or put a binary named {} there",
                self.binary
            );
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
