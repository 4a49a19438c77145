//! The patches in `mutants/`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use gauntlet_stack::workspace_root;

use crate::command::run;

/// A patch, and what its header declares.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mutant {
    pub(super) name: String,
    pub(super) patch: PathBuf,
    /// The promise that it breaks.
    pub(super) breaks: String,
    /// Where the test is that must detect it.
    pub(super) target: Target,
    pub(super) test: String,
}

/// A test target of a package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) package: String,
    /// `--lib`, or `--test` and a name.
    pub(super) arguments: Vec<String>,
}

/// Every mutant, sorted by number.
pub(super) fn all() -> Result<Vec<Mutant>> {
    let dir = workspace_root().join("mutants");
    let mut patches = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            patches.push(path);
        }
    }
    patches.sort();
    patches.into_iter().map(Mutant::read).collect()
}

impl Mutant {
    fn read(patch: PathBuf) -> Result<Mutant> {
        let text = fs::read_to_string(&patch).with_context(|| format!("read {}", patch.display()))?;
        let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (breaks, target, test) = parse_header(&text).with_context(|| {
            format!(
                "{} has no valid header: start it with `Breaks: TEXT` and `Killed by: PACKAGE [--lib|--test NAME] TEST`",
                patch.display()
            )
        })?;
        Ok(Mutant { name, patch, breaks, target, test })
    }

    /// Checks that the patch applies to the checkout.
    pub(super) fn check(&self) -> Result<()> {
        let apply = run(Command::new("git").args(["apply", "--check"]).arg(&self.patch));
        apply.with_context(|| {
            format!("{} no longer applies; make its change again and save the diff", self.patch.display())
        })
    }
}

/// The text before the diff: what the patch breaks, and the test that detects it.
fn parse_header(text: &str) -> Option<(String, Target, String)> {
    let (header, _) = text.split_once("\n--- ")?;
    let (breaks, killed_by) = header.strip_prefix("Breaks: ")?.split_once("\nKilled by: ")?;
    let mut words = killed_by.split_whitespace().map(str::to_owned);
    let (package, test) = (words.next()?, words.next_back()?);
    Some((breaks.replace('\n', " "), Target { package, arguments: words.collect() }, test))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn header_names_the_broken_promise_and_the_test() {
        let text = "Breaks: One thing\nand another.\nKilled by: some-crate --test faults a::b\n\n--- a/x\n+++ b/x\n";
        let (breaks, target, test) = parse_header(text).unwrap();
        assert_eq!(breaks, "One thing and another.");
        assert_eq!((target.package.as_str(), test.as_str()), ("some-crate", "a::b"));
        assert_eq!(target.arguments, ["--test", "faults"]);
        assert_eq!(parse_header("Breaks: all\n--- a/x\n+++ b/x\n"), None);
    }

    #[test]
    fn every_mutant_has_a_valid_header() {
        let mutants = all().unwrap();
        assert!(mutants.len() >= 12 && mutants.is_sorted_by_key(|mutant| mutant.name.clone()));
    }
}
