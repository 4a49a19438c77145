//! The sources keep the rules that no lint checks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use gauntlet_stack::workspace_root;

/// The only files that may lift the lint `unsafe_code`. Clippy requires a SAFETY comment on each of their blocks.
const UNSAFE: [&str; 2] = ["crates/sandbox/src/sys.rs", "crates/stack/src/process.rs"];
const MAX_LINES: usize = 500;
/// How the first comment of a longer file begins its reason.
const REASON: &str = "One file, because";

/// A source file: its path in the workspace, and its text.
struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    /// The lines without comments and before the tests, which may use anything.
    fn code(&self) -> impl Iterator<Item = &str> {
        let code = self.text.split("#[cfg(test)]").next().unwrap_or_default();
        code.lines().map(|line| line.split("//").next().unwrap_or_default())
    }

    /// The comment at the start of the file, on one line.
    fn first_comment(&self) -> String {
        let lines = self.text.lines().take_while(|line| line.starts_with("//"));
        lines.map(|line| line.trim_start_matches(['/', '!', ' '])).collect::<Vec<_>>().join(" ")
    }
}

/// Every source file of the workspace.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for dir in ["crates", "examples", "fuzz", "xtask"] {
        read(&workspace_root().join(dir), &mut found);
    }
    assert!(found.len() > 200, "{} sources", found.len());
    found
}

fn read(dir: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push(Source { path: path.strip_prefix(workspace_root()).unwrap().to_owned(), text });
        }
    }
}

#[test]
fn unsafe_code_is_in_named_files_only() {
    // The compiler denies unsafe code wherever this lint is not named.
    for source in sources().iter().filter(|source| source.path != Path::new(file!())) {
        let is_named = UNSAFE.iter().any(|path| source.path == Path::new(path));
        assert!(
            is_named || !source.text.contains("unsafe_code"),
            "{} lifts the lint unsafe_code; unsafe code belongs into {UNSAFE:?}",
            source.path.display()
        );
    }
}

/// Without this, a new package would have no lints at all.
#[test]
fn every_package_has_the_lints_of_the_workspace() {
    let metadata =
        cargo_metadata::MetadataCommand::new().no_deps().other_options(["--offline".to_owned()]).exec().unwrap();
    for package in &metadata.packages {
        let manifest = fs::read_to_string(&package.manifest_path).unwrap();
        assert!(
            manifest.contains("[lints]\nworkspace = true\n"),
            "{} lacks [lints] workspace = true",
            package.manifest_path
        );
    }
    let workspace = fs::read_to_string(workspace_root().join("Cargo.toml")).unwrap();
    for lint in ["unsafe_code = \"deny\"", "undocumented_unsafe_blocks = \"deny\""] {
        assert!(workspace.contains(lint), "Cargo.toml lacks {lint}");
    }
}

#[test]
fn long_files_have_a_reason() {
    for source in sources() {
        let lines = source.text.lines().count();
        assert!(
            lines <= MAX_LINES || source.first_comment().contains(REASON),
            "{} has {lines} lines; split it, or say in its first comment why not: {REASON} ...",
            source.path.display()
        );
    }
}

#[test]
fn modules_of_a_crate_depend_on_each_other_one_way() {
    let mut crates: BTreeMap<PathBuf, Vec<Source>> = BTreeMap::new();
    for source in sources() {
        let parts: Vec<_> = source.path.iter().collect();
        if let Some(src) = parts.iter().position(|part| *part == "src") {
            crates.entry(parts.iter().take(src + 1).collect()).or_default().push(source);
        }
    }
    for (src, sources) in crates {
        if let Some(circle) = circle(&dependencies(&src, &sources)) {
            panic!("modules of {} depend on each other in a circle: {}", src.display(), circle.join(" -> "));
        }
    }
}

/// The top-level modules of a crate, and those that each names as `crate::module`.
fn dependencies(src: &Path, sources: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let module = |source: &Source| {
        let first = source.path.strip_prefix(src).unwrap().iter().next().unwrap();
        Path::new(first).file_stem().unwrap().to_string_lossy().into_owned()
    };
    let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources {
        modules.entry(module(source)).or_default();
    }
    // The root may use every module.
    modules.retain(|name, _| !["lib", "main"].contains(&name.as_str()));
    let names: BTreeSet<String> = modules.keys().cloned().collect();
    for source in sources.iter().filter(|source| !source.path.ends_with("tests.rs")) {
        let from = module(source);
        let code: String = source.code().collect();
        let used = named_modules(&code).into_iter().filter(|name| *name != from && names.contains(name));
        modules.entry(from.clone()).and_modify(|to| to.extend(used));
    }
    modules
}

/// The names after `crate::`: one, or the first of each path in braces.
fn named_modules(code: &str) -> Vec<String> {
    let mut named = Vec::new();
    for path in code.split("crate::").skip(1) {
        let name = |text: &str| -> String {
            text.trim_start().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
        };
        let Some(group) = path.strip_prefix('{') else {
            named.push(name(path));
            continue;
        };
        let mut depth = 0;
        let mut start = 0;
        for (at, letter) in group.char_indices() {
            match letter {
                '{' => depth += 1,
                ',' if depth == 0 => {
                    named.push(name(&group[start..at]));
                    start = at + 1;
                }
                '}' if depth == 0 => {
                    named.push(name(&group[start..at]));
                    break;
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    named
}

/// A path that ends where it starts.
fn circle(edges: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    // Modules that only depend on removed modules are in no circle.
    let mut left = edges.clone();
    loop {
        let leaves: Vec<String> = left
            .iter()
            .filter(|(_, to)| to.iter().all(|name| !left.contains_key(name)))
            .map(|(name, _)| name.clone())
            .collect();
        if leaves.is_empty() {
            break;
        }
        leaves.iter().for_each(|leaf| drop(left.remove(leaf)));
    }
    // Each that is left leads to another that is left.
    let mut path = vec![left.keys().next()?.clone()];
    loop {
        let next = left[path.last()?].iter().find(|name| left.contains_key(*name))?.clone();
        if let Some(start) = path.iter().position(|name| *name == next) {
            path.push(next);
            return Some(path.split_off(start));
        }
        path.push(next);
    }
}

#[test]
fn circles_are_found() {
    let edges = |list: &[(&str, &str)]| {
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in list {
            edges.entry((*to).to_owned()).or_default();
            edges.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        edges
    };
    assert_eq!(circle(&edges(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    let found = circle(&edges(&[("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")])).unwrap();
    assert_eq!(found, ["b", "c", "b"]);
}

#[test]
fn used_modules_are_found() {
    let code = "use crate::{a::{self, B}, c, d::E}; use crate::f::G; crate::h();";
    assert_eq!(named_modules(code), ["a", "c", "d", "f", "h"]);
}
