//! `docs/guarantees.md` is held to the tests that it names.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;

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
