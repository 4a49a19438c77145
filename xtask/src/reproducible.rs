//! `cargo xtask reproducible`: two release builds of a commit, in different directories, must give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::workspace_root;
use sha2::{Digest as _, Sha256};

use crate::command::{cargo, output, run};
use crate::console::say;
use crate::sbom::PACKAGES;

#[derive(Debug, Args)]
#[command(
    after_help = "Clones HEAD into two directories of different length, builds the release binaries in each with --locked and with the \
                  directories removed from what the compiler records, and compares their SHA-256. The binaries and SHA256SUMS are in \
                  target/reproducible. The same commit, compiler and C compiler give the same sums on another machine.\n\n\
                  Takes twice as long as a release build. --package gauntlet-provision is the shortest."
)]
pub(crate) struct Reproducible {
    /// Package to build; may be repeated
    #[arg(long, value_name = "PACKAGE", value_parser = PACKAGES, default_values = PACKAGES)]
    package: Vec<String>,
    /// Keep the two clones and their builds
    #[arg(long)]
    keep: bool,
}

impl Reproducible {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let root = workspace_root().join("target/reproducible");
        remove(&root)?;
        let commit = output(Command::new("git").args(["rev-parse", "HEAD"]))?;
        let date = output(Command::new("git").args(["log", "-1", "--format=%ct"]))?;
        say(&format!("building {} twice", commit.trim()));
        let mut builds = Vec::new();
        for dir in [root.join("a"), root.join("another-directory/b")] {
            run(Command::new("git").args(["clone", "--quiet", "--no-hardlinks", "."]).arg(&dir))?;
            build(&dir, &self.package, date.trim())?;
            builds.push((digests(&dir.join("target/release"))?, dir));
        }
        let [(first, first_dir), (second, _)] = builds.as_slice() else { bail!("there are no two builds") };
        let different = differences(first, second);
        if !different.is_empty() {
            bail!("{} differ; both builds are in {}", different.join(", "), root.display());
        }
        let mut sums = String::new();
        for (name, digest) in first {
            fs::copy(first_dir.join("target/release").join(name), root.join(name))
                .with_context(|| format!("copy {name}"))?;
            sums += &format!("{digest}  {name}\n");
        }
        fs::write(root.join("SHA256SUMS"), &sums).context("write SHA256SUMS")?;
        if !self.keep {
            builds.iter().try_for_each(|(_, dir)| remove(dir))?;
        }
        print!("{sums}");
        say("both builds are equal");
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds packages in a clone.
fn build(clone: &Path, packages: &[String], date: &str) -> Result<()> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let home = home.context("neither CARGO_HOME nor HOME is set")?;
    // Paths are in messages of panics, and in what C compilers record.
    let maps = [(clone, "/gauntlet"), (home.as_path(), "/cargo")];
    let rust = maps.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())).join("\x1f");
    let c = maps.map(|(from, to)| format!("-ffile-prefix-map={}={to}", from.display())).join(" ");
    let mut cargo = cargo();
    cargo
        .args(["build", "--release", "--locked", "--bins"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .arg("--manifest-path")
        .arg(clone.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(clone.join("target"))
        .env("CARGO_ENCODED_RUSTFLAGS", rust)
        .env("CFLAGS", c)
        .env("SOURCE_DATE_EPOCH", date)
        .env("CARGO_INCREMENTAL", "0")
        // The clone has none of its own.
        .env("PROTOC", workspace_root().join(".cache/protoc/bin/protoc"));
    run(&mut cargo)
}

/// The SHA-256 of each program in a directory.
fn digests(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut digests = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Beside the programs cargo keeps what it knows about them, in files with an extension.
        if path.is_file() && path.extension().is_none() && !name.starts_with('.') {
            let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            digests.insert(name, hex::encode(Sha256::digest(content)));
        }
    }
    if digests.is_empty() {
        bail!("{} has no programs", dir.display());
    }
    Ok(digests)
}

/// The programs that are not the same in both builds.
fn differences(first: &BTreeMap<String, String>, second: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = first.keys().chain(second.keys()).collect();
    names.into_iter().filter(|name| first.get(*name) != second.get(*name)).cloned().collect()
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn builds_differ_in_bytes_and_in_programs() {
        let build = |programs: &[(&str, &str)]| {
            let dir = std::env::temp_dir().join(format!("gauntlet-builds-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            for (name, content) in programs {
                fs::write(dir.join(name), content).unwrap();
            }
            let found = digests(&dir).unwrap();
            fs::remove_dir_all(&dir).unwrap();
            found
        };
        let first = build(&[("manager", "1"), ("janitor", "2"), ("manager.d", "/a"), (".cargo-lock", "")]);
        assert_eq!(first.len(), 2);
        assert_eq!(first.get("janitor").unwrap(), "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35");
        assert!(differences(&first, &build(&[("manager", "1"), ("janitor", "2"), ("manager.d", "/b")])).is_empty());
        assert_eq!(differences(&first, &build(&[("manager", "9")])), ["janitor", "manager"]);
    }
}
