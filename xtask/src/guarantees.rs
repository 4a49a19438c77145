//! `docs/guarantees.md` is held to the tests that it names.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use gauntlet_stack::workspace_root;

#[test]
fn every_test_that_is_named_exists() {
    let root = workspace_root();
    let text = fs::read_to_string(root.join("docs/guarantees.md")).unwrap();
    // What stands between two backticks is every second part.
    let named: Vec<(&str, &str)> =
        text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs::")).collect();
    assert!(named.len() > 50, "the document names {} tests", named.len());
    for (file, function) in named {
        let path = root.join(format!("{file}.rs"));
        let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}.rs is named, and {error}"));
        assert!(source.contains(&format!("fn {function}(")), "{file}.rs has no {function}");
    }
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
