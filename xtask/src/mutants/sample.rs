//! `cargo xtask mutants --sample N`: how many random small changes to a crate do its tests detect?
//!
//! A random sample gives a score that can be compared over time. cargo-mutants makes the changes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::{Tools, process::spawn_bound};

use super::copy::Copy;
use crate::cargo_tool;
use crate::console::say;

/// The crates that are sampled by default.
pub(super) const PACKAGES: [&str; 5] = ["coordination", "domain", "manager", "provision", "telemetry"];
/// A mutant times out after this many times the duration of its crate's tests without a mutant.
const TIMEOUT_MULTIPLIER: &str = "2";
/// The shortest timeout, in seconds.
const MINIMUM_TIMEOUT: &str = "120";

/// Which mutants to try.
pub(super) struct Sample {
    /// About how many.
    pub(super) size: usize,
    pub(super) seed: u64,
    /// Names of crates, with or without `gauntlet-`.
    pub(super) packages: Vec<String>,
}

impl Sample {
    /// Tries them one after the other, each with the tests of its crate.
    pub(super) fn run(&self, copy: &Copy) -> Result<ExitCode> {
        let tool = cargo_tool::MUTANTS.ensure(&Tools::from_env())?;
        let mutants = |package: &str| {
            let mut command = Command::new(&tool);
            command
                .args(["mutants", "--no-config", "--colors", "never", "--package", package])
                .current_dir(&copy.tree)
                .env("CARGO_TARGET_DIR", &copy.target);
            command
        };
        let mut counts = BTreeMap::new();
        for package in &self.packages {
            let package = format!("gauntlet-{}", package.strip_prefix("gauntlet-").unwrap_or(package));
            let listed = mutants(&package).arg("--list").output().context("list mutants")?;
            if !listed.status.success() {
                bail!("cargo mutants --list failed: {}", String::from_utf8_lossy(&listed.stderr));
            }
            let count = String::from_utf8_lossy(&listed.stdout).lines().filter(|line| !line.is_empty()).count();
            counts.insert(package, count);
        }
        let all = counts.values().sum();
        let shard = Shard::new(all, self.size, self.seed);
        counts.retain(|_, count| shard.size(*count) > 0);
        let mut progress = Progress::new(counts.values().map(|count| shard.size(*count)).sum());
        say(&format!("{} of {all} mutants, chosen by --seed {}", progress.total, self.seed));
        let mut outcomes = Outcomes::default();
        // One run for each crate, because a run has one timeout, which follows from the tests of all its crates.
        for package in counts.keys() {
            say(&format!("building and running the tests of {package} without a mutant"));
            let output = copy.target.with_file_name("sample").join(package);
            fs::create_dir_all(&output).with_context(|| format!("create {}", output.display()))?;
            let mut command = mutants(package);
            // A shard, because cargo-mutants cannot filter deletions of struct fields by name.
            command.args(["--sharding", "round-robin", "--shard", &shard.to_string()]);
            command.args(["--timeout-multiplier", TIMEOUT_MULTIPLIER, "--minimum-test-timeout", MINIMUM_TIMEOUT]);
            command.args(["--in-place", "--caught", "--unviable", "--output"]).arg(&output);
            progress.follow(command)?;
            // cargo-mutants fails when a mutant survives, so only its files tell whether it worked.
            let tried = outcomes.total();
            outcomes.add(&output.join("mutants.out"))?;
            if outcomes.total() == tried {
                bail!("cargo-mutants tried no mutant of {package}; the errors are above");
            }
        }
        if outcomes.total() == 0 {
            bail!("{} have no mutants", self.packages.join(", "));
        }
        println!("{outcomes}");
        Ok(ExitCode::SUCCESS)
    }
}

/// Numbers the mutants that cargo-mutants reports, over several runs.
struct Progress {
    started: Instant,
    finished: usize,
    total: usize,
}

impl Progress {
    fn new(total: usize) -> Progress {
        Progress { started: Instant::now(), finished: 0, total }
    }

    /// Runs cargo-mutants and prints what it reports.
    fn follow(&mut self, mut command: Command) -> Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = spawn_bound(command).context("run cargo mutants")?;
        let output = child.stdout.take().context("the output of cargo mutants is not piped")?;
        for line in BufReader::new(output).lines() {
            let line = line.context("read the output of cargo mutants")?;
            if is_outcome(&line) {
                self.finished += 1;
                let minutes = self.started.elapsed().as_secs() / 60;
                say(&format!("{}/{} after {minutes} min: {line}", self.finished, self.total));
            } else {
                say(&line);
            }
        }
        child.wait().context("wait for cargo mutants")?;
        Ok(())
    }
}

/// Whether a line of cargo-mutants reports a mutant, such as `MISSED   src/a.rs:1:2: replace f with () in 3s build + 1s test`.
fn is_outcome(line: &str) -> bool {
    ["caught ", "MISSED ", "TIMEOUT ", "unviable "].iter().any(|outcome| line.starts_with(outcome))
}

/// One of several equal parts of the mutants of a crate: every `count`th, starting at `index`.
#[derive(Debug, PartialEq, Eq)]
struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// The part that samples about `size` of `all` mutants, the same for the same seed.
    fn new(all: usize, size: usize, seed: u64) -> Shard {
        let count = (all / size.max(1)).max(1);
        let index = usize::try_from(seed % count as u64).unwrap_or_default();
        Shard { index, count }
    }

    /// The size of this part of `mutants`.
    fn size(&self, mutants: usize) -> usize {
        mutants.saturating_sub(self.index).div_ceil(self.count)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// The mutants by outcome.
#[derive(Debug, Default)]
struct Outcomes {
    killed: Vec<String>,
    survived: Vec<String>,
    timed_out: Vec<String>,
    /// Mutants that do not compile, which tells nothing about the tests.
    unviable: Vec<String>,
}

impl Outcomes {
    /// Adds the outcomes of a run, from its directory `mutants.out`.
    fn add(&mut self, dir: &Path) -> Result<()> {
        for (name, mutants) in [
            ("caught.txt", &mut self.killed),
            ("missed.txt", &mut self.survived),
            ("timeout.txt", &mut self.timed_out),
            ("unviable.txt", &mut self.unviable),
        ] {
            let path = dir.join(name);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            mutants.extend(text.lines().map(str::to_owned));
        }
        Ok(())
    }

    fn total(&self) -> usize {
        self.killed.len() + self.survived.len() + self.timed_out.len() + self.unviable.len()
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (detected, survived) = (self.killed.len() + self.timed_out.len(), self.survived.len());
        for (outcome, names) in [("survived", &self.survived), ("timed out", &self.timed_out)] {
            names.iter().try_for_each(|name| writeln!(f, "{outcome}: {name}"))?;
        }
        write!(
            f,
            "{detected} of {} detected: {} killed, {} timed out, {survived} survived; {} more do not compile",
            detected + survived,
            self.killed.len(),
            self.timed_out.len(),
            self.unviable.len()
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn shard_follows_from_size_and_seed() {
        let shard = |all, size, seed| {
            let shard = Shard::new(all, size, seed);
            (shard.index, shard.count, shard.size(all))
        };
        assert_eq!(shard(319, 40, 9), (2, 7, 46));
        assert_eq!(shard(319, 40, 10), (3, 7, 46));
        assert_eq!(shard(319, 40, 11), (4, 7, 45));
        assert_eq!(shard(319, 1000, 9), (0, 1, 319));
        assert_eq!(shard(319, 0, 320), (1, 319, 1));
        assert_eq!(shard(0, 40, 9), (0, 1, 0));
    }

    #[test]
    fn lines_with_an_outcome_are_progress() {
        let lines = ["MISSED   src/a.rs:1:2: replace f", "caught   src/a.rs", "TIMEOUT  src/a.rs", "unviable src/a.rs"];
        assert!(lines.into_iter().all(is_outcome));
        assert!(!["Found 3 mutants to test", "ok       Unmutated baseline in 3s"].into_iter().any(is_outcome));
    }

    #[test]
    fn outcomes_are_read_and_counted() {
        let dir = std::env::temp_dir().join(format!("gauntlet-sample-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in [("caught", "a\nb\n"), ("missed", "c\n"), ("timeout", "d\n"), ("unviable", "")] {
            fs::write(dir.join(format!("{name}.txt")), text).unwrap();
        }
        let mut outcomes = Outcomes::default();
        outcomes.add(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let text = outcomes.to_string();
        assert_eq!((outcomes.total(), text.lines().next()), (4, Some("survived: c")));
        assert!(text.ends_with("3 of 4 detected: 2 killed, 1 timed out, 1 survived; 0 more do not compile"), "{text}");
    }
}
