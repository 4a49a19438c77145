//! Checks that every test named in `docs/guarantees.md` and `docs/security.md` exists and is run by a test binary.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::workspace_root;

use crate::runner::Binary;

/// The contract tests of the store, which run once for each backend.
const CONTRACT: &str = "crates/coordination/src/contract";
const BACKENDS: [&str; 2] = ["embedded", "etcd"];

/// The documents, and how many tests each names at least: a check that finds none would pass.
const DOCUMENTS: [(&str, usize); 2] = [("docs/guarantees.md", 50), ("docs/security.md", 20)];

/// # Errors
/// When a named test is not run. The error lists all of a document.
pub(crate) fn check(binaries: &[Binary]) -> Result<()> {
    DOCUMENTS.into_iter().try_for_each(|(document, least)| check_document(document, least, binaries))
}

fn check_document(document: &str, least: usize, binaries: &[Binary]) -> Result<()> {
    let path = workspace_root().join(document);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let named = named_tests(&text);
    if named.len() < least {
        bail!("{document} names only {} tests; write them as `file.rs::function`", named.len());
    }
    let missing: Vec<String> = named
        .into_iter()
        .filter(|(file, function)| !defines(file, function) || !runs(binaries, file, function))
        .map(|(file, function)| format!("{}::{function}", file.display()))
        .collect();
    if !missing.is_empty() {
        bail!("{document} names tests that no test binary runs: {}", missing.join(", "));
    }
    Ok(())
}

/// The code spans of the form `file.rs::function`.
fn named_tests(text: &str) -> Vec<(PathBuf, &str)> {
    // Every second part is between backticks.
    let code = text.split('`').skip(1).step_by(2);
    let named = code.filter_map(|code| code.split_once(".rs::"));
    named.map(|(file, function)| (PathBuf::from(format!("{file}.rs")), function)).collect()
}

/// Whether the file defines the function. The list of a binary shows the module of a test, but not its file.
fn defines(file: &Path, function: &str) -> bool {
    let source = fs::read_to_string(workspace_root().join(file)).unwrap_or_default();
    source.contains(&format!("fn {function}("))
}

/// Whether a binary has a test of this name in the file's module or a module within it. Contract tests must run on every backend.
fn runs(binaries: &[Binary], file: &Path, function: &str) -> bool {
    let paths: Vec<&str> = binaries
        .iter()
        .filter_map(|binary| {
            let modules =
                if file.starts_with(CONTRACT) { vec!["contract".to_owned()] } else { module_path(&binary.root, file)? };
            let (prefix, suffix) = ([modules, vec![String::new()]].concat().join("::"), format!("::{function}"));
            Some(binary.tests.iter().map(String::as_str).filter(move |test| {
                test.strip_prefix(prefix.as_str()).is_some_and(|rest| rest == function || rest.ends_with(&suffix))
            }))
        })
        .flatten()
        .collect();
    if file.starts_with(CONTRACT) {
        let runs_on = |backend: &&str| paths.contains(&format!("contract::{backend}::{function}").as_str());
        return BACKENDS.iter().all(runs_on);
    }
    !paths.is_empty()
}

/// The module path of a file in the crate with the root file `root`; `None` if it is not part of that crate.
fn module_path(root: &Path, file: &Path) -> Option<Vec<String>> {
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
        Binary::fake(root, tests.iter().copied())
    }

    #[test]
    fn only_tests_that_run_count() {
        let contract = ["contract::embedded::a", "contract::etcd::a", "contract::embedded::half", "etcd::tests::b"];
        let binaries = [
            binary("crates/coordination/src/lib.rs", &contract),
            binary("crates/e2e/tests/main.rs", &["faults::storm::c", "faults::d"]),
            binary("crates/domain/src/lib.rs", &["pool::tests::f", "pool_of::tests::g"]),
            binary("crates/telemetry/tests/docs.rs", &["e"]),
        ];
        let runs = |file: &str, function: &str| super::runs(&binaries, Path::new(file), function);
        assert!(runs("crates/coordination/src/contract/locks.rs", "a"));
        assert!(!runs("crates/coordination/src/contract/locks.rs", "half"), "runs on one backend only");
        assert!(runs("crates/coordination/src/etcd/tests.rs", "b"));
        assert!(!runs("crates/coordination/src/etcd.rs", "c") && !runs("crates/coordination/src/embedded.rs", "b"));
        assert!(runs("crates/domain/src/pool.rs", "f") && !runs("crates/domain/src/pool.rs", "g"));
        assert!(runs("crates/e2e/tests/faults/storm.rs", "c") && runs("crates/e2e/tests/faults/mod.rs", "d"));
        assert!(!runs("crates/e2e/tests/faults/storm.rs", "d"), "belongs to another module");
        assert!(runs("crates/telemetry/tests/docs.rs", "e") && !runs("crates/telemetry/tests/docs.rs", "a"));
        assert!(!runs("crates/telemetry/tests/pages.rs", "e"), "belongs to another binary");
    }

    #[test]
    fn tests_are_named_by_file_and_function() {
        let named = named_tests("a `x/y.rs::z`, and `cargo xtask test`, and `max`: `b.rs::c`");
        assert_eq!(named, [(PathBuf::from("x/y.rs"), "z"), (PathBuf::from("b.rs"), "c")]);
    }

    /// Tests only require components; the error names the command that installs them.
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
                "{} installs or builds components; use `require` instead",
                path.display()
            );
        }
    }
}
