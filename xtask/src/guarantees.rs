//! `docs/guarantees.md` is held to the tests that it names: each is among those that the test binaries run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::workspace_root;

use crate::runner::Binary;

/// The tests of the store's contract, which are instantiated once for each of its backends.
const CONTRACT: &str = "crates/coordination/src/contract";
const BACKENDS: [&str; 2] = ["embedded", "etcd"];

/// Fails with the names of those that do not run.
pub(crate) fn check(binaries: &[Binary]) -> Result<()> {
    let path = workspace_root().join("docs/guarantees.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let named = named(&text);
    if named.len() < 50 {
        bail!("docs/guarantees.md names {} tests: are they still written as `file.rs::function`?", named.len());
    }
    let missing: Vec<String> = named
        .into_iter()
        .filter(|(file, function)| !defines(file, function) || !runs(binaries, file, function))
        .map(|(file, function)| format!("{}::{function}", file.display()))
        .collect();
    if !missing.is_empty() {
        bail!("docs/guarantees.md names what no test binary runs: {}", missing.join(", "));
    }
    Ok(())
}

/// What stands between two backticks and is a file and a function of it.
fn named(text: &str) -> Vec<(PathBuf, &str)> {
    // That is every second part.
    let code = text.split('`').skip(1).step_by(2);
    let named = code.filter_map(|code| code.split_once(".rs::"));
    named.map(|(file, function)| (PathBuf::from(format!("{file}.rs")), function)).collect()
}

/// Whether the file has a function of that name: what a binary lists does not say in which file of a module it is.
fn defines(file: &Path, function: &str) -> bool {
    let source = fs::read_to_string(workspace_root().join(file)).unwrap_or_default();
    source.contains(&format!("fn {function}("))
}

/// Whether some binary runs it: a test of that name in the file's module, or in one within it. Tests of the contract are run for each backend.
fn runs(binaries: &[Binary], file: &Path, function: &str) -> bool {
    let paths: Vec<&str> = binaries
        .iter()
        .filter_map(|binary| {
            let modules =
                if file.starts_with(CONTRACT) { vec!["contract".to_owned()] } else { below(&binary.root, file)? };
            let (begin, end) = ([modules, vec![String::new()]].concat().join("::"), format!("::{function}"));
            Some(binary.tests.iter().map(String::as_str).filter(move |test| {
                test.strip_prefix(begin.as_str()).is_some_and(|rest| rest == function || rest.ends_with(&end))
            }))
        })
        .flatten()
        .collect();
    if file.starts_with(CONTRACT) {
        let on = |backend: &&str| paths.contains(&format!("contract::{backend}::{function}").as_str());
        return BACKENDS.iter().all(on);
    }
    !paths.is_empty()
}

/// The path of a file's module in the crate with that root; `None` if it is not in it.
fn below(root: &Path, file: &Path) -> Option<Vec<String>> {
    if root == file {
        return Some(Vec::new());
    }
    let module = file.strip_prefix(root.parent()?).ok()?.with_extension("");
    let mut modules: Vec<String> = module.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    modules.pop_if(|last| last == "mod");
    Some(modules)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn binary(root: &str, tests: &[&str]) -> Binary {
        Binary::listed(root, tests.iter().copied())
    }

    #[test]
    fn only_what_runs_counts() {
        let contract = ["contract::embedded::a", "contract::etcd::a", "contract::embedded::half", "etcd::tests::b"];
        let binaries = [
            binary("crates/coordination/src/lib.rs", &contract),
            binary("crates/e2e/tests/main.rs", &["faults::storm::c", "faults::d"]),
            binary("crates/domain/src/lib.rs", &["pool::tests::f", "pool_of::tests::g"]),
            binary("crates/telemetry/tests/docs.rs", &["e"]),
        ];
        let runs = |file: &str, function: &str| super::runs(&binaries, Path::new(file), function);
        assert!(runs("crates/coordination/src/contract/locks.rs", "a"));
        assert!(!runs("crates/coordination/src/contract/locks.rs", "half"), "on one backend alone");
        assert!(runs("crates/coordination/src/etcd/tests.rs", "b"));
        assert!(!runs("crates/coordination/src/etcd.rs", "c") && !runs("crates/coordination/src/embedded.rs", "b"));
        assert!(runs("crates/domain/src/pool.rs", "f") && !runs("crates/domain/src/pool.rs", "g"));
        assert!(runs("crates/e2e/tests/faults/storm.rs", "c") && runs("crates/e2e/tests/faults/mod.rs", "d"));
        assert!(!runs("crates/e2e/tests/faults/storm.rs", "d"), "of another module");
        assert!(runs("crates/telemetry/tests/docs.rs", "e") && !runs("crates/telemetry/tests/docs.rs", "a"));
        assert!(!runs("crates/telemetry/tests/pages.rs", "e"), "of another binary");
    }

    #[test]
    fn a_test_is_named_by_file_and_function() {
        let named = named("a `x/y.rs::z`, and `cargo xtask test`, and `max`: `b.rs::c`");
        assert_eq!(named, [(PathBuf::from("x/y.rs"), "z"), (PathBuf::from("b.rs"), "c")]);
    }

    /// A test that needs a component requires it, and its error names the command that adds it.
    #[test]
    fn only_xtask_installs_and_builds_components() {
        fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    sources(&path, found);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    found.push(path);
                }
            }
        }
        let crates = workspace_root().join("crates");
        let mut found = Vec::new();
        sources(&crates, &mut found);
        assert!(found.len() > 100, "{} sources", found.len());
        for path in found.iter().filter(|path| !path.starts_with(crates.join("stack/src"))) {
            let source = fs::read_to_string(path).unwrap();
            assert!(
                !source.contains(".ensure(") && !source.contains(".ensure_packages("),
                "{} installs or builds components: require them instead",
                path.display()
            );
        }
    }
}
