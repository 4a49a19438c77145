//! Test binaries: built by cargo and run directly, so that there is one process to wait for and to stop.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::workspace_root;
use serde_json::Value;

use crate::command::cargo;

/// Builds the tests of `target` (`--lib`, or `--test` and a name) of a package and returns their binary. If they do not compile, prints the
/// errors and returns `None`. `cargo` sets where, and in which target directory.
pub(crate) fn build(mut cargo: Command, package: &str, target: &[String]) -> Result<Option<PathBuf>> {
    cargo.args(["test", "--quiet", "--no-run", "--message-format", "json", "--package", package]).args(target);
    let built = cargo.stderr(Stdio::inherit()).output().context("run cargo")?;
    let messages = String::from_utf8_lossy(&built.stdout).into_owned();
    let messages: Vec<Value> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = |message: &Value, at: &str| message.pointer(at).and_then(Value::as_str).map(str::to_owned);
    if !built.status.success() {
        let errors = messages.iter().filter(|message| text(message, "/message/level").as_deref() == Some("error"));
        errors.filter_map(|message| text(message, "/message/rendered")).for_each(|error| eprint!("{error}"));
        return Ok(None);
    }
    // Earlier ones are binaries of the package that its tests run.
    let binary = messages.iter().filter_map(|message| text(message, "/executable")).next_back();
    binary.map(|binary| Some(binary.into())).with_context(|| format!("{package} has no tests in {target:?}"))
}

/// Builds the test target `target` of a package, and returns the command that runs only the test `test`, with its output.
///
/// # Errors
/// When the tests do not compile, or there is no such test.
pub(crate) fn single_test(package: &str, target: &str, test: &str) -> Result<Command> {
    let mut cargo = cargo();
    cargo.current_dir(workspace_root());
    let Some(binary) = build(cargo, package, &["--test".to_owned(), target.to_owned()])? else {
        bail!("the tests do not compile; the errors are above");
    };
    require(&binary, test)?;
    let mut command = Command::new(binary);
    command.args(["--exact", test, "--nocapture"]).current_dir(workspace_root().join(directory(package)));
    // A backtrace would bury the panic's message.
    command.env("RUST_BACKTRACE", "0");
    Ok(command)
}

/// The directory of a package of this workspace, relative to the checkout.
pub(crate) fn directory(package: &str) -> PathBuf {
    Path::new("crates").join(package.strip_prefix("gauntlet-").unwrap_or(package))
}

/// The tests that a binary would run with these arguments.
pub(crate) fn list(executable: &Path, arguments: &[&str]) -> Result<BTreeSet<String>> {
    let context = || format!("list the tests of {}", executable.display());
    let listed = Command::new(executable).args(arguments).arg("--list").stdin(Stdio::null()).output();
    let listed = listed.with_context(context)?;
    if !listed.status.success() {
        bail!("{} failed: {}", context(), String::from_utf8_lossy(&listed.stderr));
    }
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Fails unless the binary has a test of exactly this name. A test binary that runs no test succeeds.
fn require(executable: &Path, test: &str) -> Result<()> {
    if list(executable, &["--exact", test])?.is_empty() {
        bail!("{} has no test {test}", executable.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn tests_of_a_binary_are_listed_and_required_by_full_name() {
        const THIS: &str = "test_binary::tests::tests_of_a_binary_are_listed_and_required_by_full_name";
        let this = std::env::current_exe().unwrap();
        let listed = list(&this, &[]).unwrap();
        assert!(listed.contains(THIS), "{listed:?}");
        require(&this, THIS).unwrap();
        assert!(require(&this, "test_binary::tests").is_err(), "this is only a part of a name");
    }
}
