//! `cargo xtask fuzz`: libFuzzer, guided by coverage, on the targets of `fuzz/`.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::workspace_root;

use crate::command::{cargo, command_line, output, run};
use crate::console::say;

/// What makes the compiler count edges and report comparisons. The stable compiler has these, unlike the sanitizers.
const COVERAGE: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];
/// The longest input, in bytes.
const MAX_LENGTH: usize = 16 * 1024;
/// The memory that an input may need, in MiB.
const MAX_MEMORY: usize = 2048;
/// How long one input may take, in seconds.
const TIMEOUT: usize = 10;

#[derive(Debug, Args)]
#[command(
    after_help = "Inputs that reach new code are kept in target/fuzz/corpora, so that a later run continues there. An input that fails is written to \
                  target/fuzz/failures: copy it to fuzz/corpora/TARGET, where the tests run it, and mend the code. Needs a C++ compiler."
)]
pub(crate) struct Fuzz {
    /// Targets; all if none is named
    targets: Vec<String>,
    /// How long to search for each target
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
}

impl Fuzz {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let known = targets()?;
        if let Some(unknown) = self.targets.iter().find(|target| !known.contains(target)) {
            bail!("unknown target {unknown:?}; the targets are {}", known.join(", "));
        }
        let fuzzer = build()?;
        let targets = if self.targets.is_empty() { known } else { self.targets };
        let mut failed = Vec::new();
        for target in targets {
            say(&format!("{target}, for {} min", self.minutes));
            let mut command = Command::new(&fuzzer);
            let (kept, failures) = (directory("corpora", &target)?, directory("failures", &target)?);
            command
                .env("GAUNTLET_FUZZ_TARGET", &target)
                .arg(format!("-max_total_time={}", self.minutes * 60))
                .arg(format!("-max_len={MAX_LENGTH}"))
                .arg(format!("-rss_limit_mb={MAX_MEMORY}"))
                .arg(format!("-timeout={TIMEOUT}"))
                .arg(format!("-artifact_prefix={}/", failures.display()))
                .args(["-print_final_stats=1", "-verbosity=0"])
                .arg(kept)
                .arg(workspace_root().join("fuzz/corpora").join(&target));
            let status = command.current_dir(workspace_root()).status();
            if !status.with_context(|| format!("run {}", command_line(&command)))?.success() {
                failed.push(target);
            }
        }
        if failed.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        bail!("inputs failed, which are in target/fuzz/failures: {}", failed.join(", "))
    }
}

/// The names of the targets: each has a corpus.
fn targets() -> Result<Vec<String>> {
    let dir = workspace_root().join("fuzz/corpora");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        names
            .push(entry.with_context(|| format!("list {}", dir.display()))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Builds the fuzzer in a directory of its own, because every crate is compiled for it.
fn build() -> Result<PathBuf> {
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    let dir = workspace_root().join("target/fuzz/build");
    say("building the fuzzer (minutes, when crates have changed)");
    let mut cargo = cargo();
    cargo
        .args(["build", "--package", "gauntlet-fuzz", "--bin", "fuzz", "--features", "libfuzzer", "--locked"])
        // Named, so that build scripts and procedural macros are not compiled for it.
        .args(["--target", host, "--target-dir"])
        .arg(&dir)
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"))
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    run(&mut cargo)?;
    Ok(dir.join(host).join("debug/fuzz"))
}

/// A directory of a target, created if missing.
fn directory(kind: &str, target: &str) -> Result<PathBuf> {
    let dir = workspace_root().join("target/fuzz").join(kind).join(target);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The tests of `fuzz/` find the corpus of each target; this finds the target of each corpus.
    #[test]
    fn every_corpus_has_a_target() {
        let source = fs::read_to_string(workspace_root().join("fuzz/src/lib.rs")).unwrap();
        let targets = targets().unwrap();
        assert!(targets.len() >= 9, "{targets:?}");
        for target in targets {
            assert!(source.contains(&format!("(\"{target}\", ")), "{target} is no target");
        }
    }
}
