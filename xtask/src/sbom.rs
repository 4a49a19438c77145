//! `cargo xtask sbom`: a software bill of materials for each binary, as CycloneDX JSON.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tools, workspace_root};
use serde_json::Value;

use crate::cargo_tool;
use crate::command::{cargo, output, run};
use crate::console::say;

/// The packages with binaries that users run.
pub(crate) const PACKAGES: [&str; 4] = ["gauntlet-cli", "gauntlet-janitor", "gauntlet-manager", "gauntlet-provision"];
/// How cargo-cyclonedx ends the name of the file of a binary, which it writes beside the package's Cargo.toml.
const SUFFIX: &str = "_bin.cdx.json";

#[derive(Debug, Args)]
#[command(
    after_help = "cargo-cyclonedx writes them from Cargo.lock: every crate that a binary is built from, including build scripts, with version, \
                  licence, checksum and dependencies. This command compares them with `cargo tree`. The same commit gives the same dependencies; \
                  serial numbers differ."
)]
pub(crate) struct Sbom {
    /// Where to write them
    #[arg(long, value_name = "DIR", default_value = "target/sbom")]
    out: PathBuf,
}

impl Sbom {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let cyclonedx = cargo_tool::CYCLONEDX.ensure(&Tools::from_env())?;
        let date = output(Command::new("git").args(["log", "-1", "--format=%ct"]))?;
        // For this machine's target, with the default features, as release builds are.
        let options = ["cyclonedx", "--describe", "binaries", "--format", "json", "--spec-version", "1.5", "--quiet"];
        run(Command::new(cyclonedx).args(options).env("SOURCE_DATE_EPOCH", date.trim()))?;
        let out = workspace_root().join(&self.out);
        fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
        let built = tree(&["--workspace", "--edges", "normal,build"])?;
        let tests: BTreeSet<String> = tree(&["--workspace", "--edges", "all"])?.difference(&built).cloned().collect();
        let mut written = 0;
        for (package, path) in written_files()? {
            if PACKAGES.contains(&package.as_str()) {
                let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
                // The same on every machine.
                let text = text.replace(&workspace_root().display().to_string(), "/gauntlet");
                check(&text, &tree(&["--package", &package, "--edges", "normal,build"])?, &tests)
                    .with_context(|| path.display().to_string())?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().replace(SUFFIX, ".cdx.json");
                fs::write(out.join(&name), text).with_context(|| format!("write {name}"))?;
                say(&out.join(&name).display().to_string());
                written += 1;
            }
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        if written < PACKAGES.len() {
            bail!("cargo-cyclonedx described only {written} of the binaries of {}", PACKAGES.join(", "));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The files that cargo-cyclonedx wrote into the checkout, each with its package.
fn written_files() -> Result<Vec<(String, PathBuf)>> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("parse the output of cargo metadata")?;
    let mut files = Vec::new();
    for package in metadata.get("packages").and_then(Value::as_array).into_iter().flatten() {
        let text = |field: &str| package.get(field).and_then(Value::as_str);
        let (Some(name), Some(manifest)) = (text("name"), text("manifest_path")) else {
            continue;
        };
        let dir = Path::new(manifest).parent().context("a manifest has no directory")?;
        for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
            if path.to_string_lossy().ends_with(SUFFIX) {
                files.push((name.to_owned(), path));
            }
        }
    }
    Ok(files)
}

/// The crates that cargo builds for a selection of packages and kinds of dependencies, as `name version`.
fn tree(selection: &[&str]) -> Result<BTreeSet<String>> {
    let options = ["tree", "--locked", "--prefix", "none", "--format", "{p}"];
    let listed = output(cargo().args(options).args(selection))?;
    Ok(listed.lines().filter_map(name_and_version).collect())
}

/// Of a line such as `serde v1.0.229 (proc-macro) (*)`.
fn name_and_version(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    Some(format!("{} {}", words.next()?, words.next()?.strip_prefix('v')?))
}

/// Checks that a bill of materials has what the binary is built from, and nothing that only tests use. It may have more: it is made from the
/// dependencies of all features that some package of the workspace enables.
fn check(sbom: &str, binary: &BTreeSet<String>, tests: &BTreeSet<String>) -> Result<()> {
    let sbom: Value = serde_json::from_str(sbom).context("not JSON")?;
    let text = |component: &Value, field: &str| component.get(field).and_then(Value::as_str).map(str::to_owned);
    let is_empty =
        |component: &Value, field: &str| component.get(field).and_then(Value::as_array).is_none_or(Vec::is_empty);
    let components = sbom.get("components").and_then(Value::as_array).into_iter().flatten();
    let mut listed = BTreeSet::new();
    for component in components.chain(sbom.pointer("/metadata/component")) {
        let (Some(name), Some(version)) = (text(component, "name"), text(component, "version")) else {
            bail!("a component has no name or version: {component}");
        };
        listed.insert(format!("{name} {version}"));
        let is_from_registry = text(component, "purl").is_some_and(|purl| !purl.contains("download_url=file"));
        if is_from_registry && is_empty(component, "hashes") {
            bail!("{name} {version} has no checksum");
        }
        if is_empty(component, "licenses") {
            bail!("{name} {version} has no licence");
        }
    }
    // A binary is named after itself, not after its package, so our own names are not compared.
    let is_ours = |name: &str| name.starts_with("gauntlet");
    let missing: Vec<&String> = binary.iter().filter(|name| !is_ours(name) && !listed.contains(*name)).collect();
    if !missing.is_empty() {
        bail!("lacks crates that the binary is built from: {missing:?}");
    }
    let unused: Vec<&String> = listed.intersection(tests).collect();
    if !unused.is_empty() {
        bail!("has crates that only tests use: {unused:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn sbom(components: &[Value]) -> String {
        let binary = json!({ "name": "gauntlet-x", "version": "0.1.0", "licenses": [{ "expression": "Apache-2.0" }] });
        json!({ "metadata": { "component": binary }, "components": components }).to_string()
    }

    fn component(name: &str) -> Value {
        json!({
            "name": name, "version": "1.0.0", "purl": format!("pkg:cargo/{name}@1.0.0"),
            "licenses": [{ "expression": "MIT" }], "hashes": [{ "alg": "SHA-256", "content": "00" }],
        })
    }

    #[test]
    fn bill_of_materials_has_what_is_built_and_nothing_of_tests() {
        let set = |names: &[&str]| names.iter().map(|name| format!("{name} 1.0.0")).collect::<BTreeSet<_>>();
        let (binary, tests) = (set(&["a"]), set(&["c"]));
        let check = |components: &[Value]| check(&sbom(components), &binary, &tests).map_err(|error| error.to_string());
        assert_eq!(check(&[component("a"), component("b")]), Ok(()));
        assert!(
            check(&[component("b")]).unwrap_err().contains("lacks crates that the binary is built from: [\"a 1.0.0\"]")
        );
        assert!(check(&[component("a"), component("c")]).unwrap_err().contains("[\"c 1.0.0\"]"));
        for field in ["hashes", "licenses", "version"] {
            let mut incomplete = component("a");
            incomplete.as_object_mut().unwrap().remove(field);
            assert!(check(&[incomplete]).is_err(), "{field}");
        }
    }

    #[test]
    fn crates_are_read_from_the_tree() {
        assert_eq!(name_and_version("serde v1.0.229 (proc-macro) (*)").as_deref(), Some("serde 1.0.229"));
        assert_eq!(name_and_version(""), None);
    }
}
