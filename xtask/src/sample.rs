//! `cargo xtask mutants --sample N`: how many of the small changes that cargo-mutants can make to a crate do its tests notice?
//!
//! A random sample gives a score that can be compared over time; each survivor is a test that is missing, or a change that changes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::Tools;

use crate::console::say;
use crate::test::{cargo, run};

const VERSION: &str = "27.1.0";
/// The crates whose tests are measured unless others are named.
pub(crate) const PACKAGES: [&str; 5] = ["coordination", "domain", "manager", "provision", "telemetry"];
/// One whose tests take longer is counted by itself: it was noticed, by whoever waits.
const TIMEOUT: &str = "300";

/// How many mutants, which, and of what.
pub(crate) struct Sample {
    pub(crate) size: usize,
    pub(crate) seed: u64,
    /// Names of crates, with or without `gauntlet-`.
    pub(crate) packages: Vec<String>,
}

impl Sample {
    /// Tries them in a copy of the checkout, one after the other, each with the tests of its own crate.
    pub(crate) fn run(&self, tree: &Path, target: &Path) -> Result<ExitCode> {
        let tool = tool(&Tools::from_env())?;
        let mutants = || {
            let mut command = Command::new(&tool);
            command
                .args(["mutants", "--no-config", "--colors", "never"])
                .current_dir(tree)
                .env("CARGO_TARGET_DIR", target);
            for package in &self.packages {
                let name = package.strip_prefix("gauntlet-").unwrap_or(package);
                command.args(["--package", &format!("gauntlet-{name}")]);
            }
            command
        };
        let listed = mutants().arg("--list").output().context("list mutants")?;
        if !listed.status.success() {
            bail!("cargo mutants --list failed: {}", String::from_utf8_lossy(&listed.stderr));
        }
        let all = String::from_utf8_lossy(&listed.stdout).lines().filter(|line| !line.is_empty()).count();
        let (shard, shards) = shard(all, self.size, self.seed);
        say(&format!("about {} of {all} mutants, by --seed {}", all.div_ceil(shards), self.seed));
        let output = target.with_file_name("sample");
        let mut command = mutants();
        // One of so many, from somewhere on. Its filters by name let all deletions of fields pass.
        command.args(["--sharding", "round-robin", "--shard", &format!("{shard}/{shards}")]);
        command.args(["--in-place", "--timeout", TIMEOUT, "--output"]).arg(&output);
        // It fails when one survives; what came of each is in its files.
        let status = command.status().context("run cargo mutants")?;
        let found = Found::read(&output.join("mutants.out"))?;
        if found.all() == 0 {
            bail!("no mutant was tried ({status}): the errors are above");
        }
        println!("{found}");
        Ok(ExitCode::SUCCESS)
    }
}

/// Which part of how many equal ones has about that size; the same for the same seed.
fn shard(all: usize, size: usize, seed: u64) -> (u64, usize) {
    let shards = (all / size.max(1)).max(1);
    (seed % shards as u64, shards)
}

/// What came of them.
#[derive(Debug, Default)]
struct Found {
    killed: Vec<String>,
    survived: Vec<String>,
    timed_out: Vec<String>,
    /// They do not compile, and say nothing about tests.
    unviable: Vec<String>,
}

impl Found {
    fn read(dir: &Path) -> Result<Found> {
        let read = |name: &str| {
            let path = dir.join(name);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            Ok::<Vec<String>, anyhow::Error>(text.lines().map(str::to_owned).collect())
        };
        Ok(Found {
            killed: read("caught.txt")?,
            survived: read("missed.txt")?,
            timed_out: read("timeout.txt")?,
            unviable: read("unviable.txt")?,
        })
    }

    fn all(&self) -> usize {
        self.killed.len() + self.survived.len() + self.timed_out.len() + self.unviable.len()
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (noticed, survived) = (self.killed.len() + self.timed_out.len(), self.survived.len());
        for (what, names) in [("survived", &self.survived), ("timed out", &self.timed_out)] {
            names.iter().try_for_each(|name| writeln!(f, "{what}: {name}"))?;
        }
        write!(
            f,
            "{noticed} of {} noticed: {} killed, {} timed out, {survived} survived; {} do not compile",
            noticed + survived,
            self.killed.len(),
            self.timed_out.len(),
            self.unviable.len()
        )
    }
}

/// cargo-mutants, which is built into the cache of tools unless it is there.
fn tool(tools: &Tools) -> Result<PathBuf> {
    const NAME: &str = "cargo-mutants";
    let kept = tools.cache.join(format!("{NAME}-{VERSION}"));
    let mut places = tools.dir.iter().chain(&tools.path).map(|dir| dir.join(NAME)).chain([kept.join("bin").join(NAME)]);
    if let Some(found) = places.find(|path| path.is_file()) {
        return Ok(found);
    }
    say(&format!("building {NAME} {VERSION} (some minutes, once)"));
    run(cargo().args(["install", NAME, "--locked", "--version", VERSION, "--root"]).arg(&kept))?;
    Ok(kept.join("bin").join(NAME))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_sample_follows_from_its_seed() {
        assert_eq!(shard(319, 40, 9), (2, 7));
        assert_eq!(shard(319, 40, 10), (3, 7));
        assert_eq!((shard(319, 1000, 9), shard(319, 0, 320), shard(0, 40, 9)), ((0, 1), (1, 319), (0, 1)));
    }

    #[test]
    fn what_came_of_them_is_counted() {
        let dir = std::env::temp_dir().join(format!("gauntlet-sample-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in [("caught", "a\nb\n"), ("missed", "c\n"), ("timeout", "d\n"), ("unviable", "")] {
            fs::write(dir.join(format!("{name}.txt")), text).unwrap();
        }
        let found = Found::read(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let said = found.to_string();
        assert_eq!((found.all(), said.lines().next()), (4, Some("survived: c")));
        assert!(said.ends_with("3 of 4 noticed: 2 killed, 1 timed out, 1 survived; 0 do not compile"), "{said}");
    }
}
