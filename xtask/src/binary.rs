//! The binary of a package's tests: run by itself, it is one process to wait for, and to end.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Builds the tests of a package and answers their binary; `None`, its errors on the screen, if they do not build. `cargo` is where, and in
/// which target directory; `target` is `--lib`, or `--test` and a name.
pub(crate) fn of_tests(mut cargo: Command, package: &str, target: &[String]) -> Result<Option<PathBuf>> {
    cargo.args(["test", "--quiet", "--no-run", "--message-format", "json", "--package", package]).args(target);
    let built = cargo.stderr(Stdio::inherit()).output().context("run cargo")?;
    let messages = String::from_utf8_lossy(&built.stdout).into_owned();
    let messages: Vec<Value> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = |message: &Value, at: &str| message.pointer(at).and_then(Value::as_str).map(str::to_owned);
    if !built.status.success() {
        // Warnings are of no interest here.
        let errors = messages.iter().filter(|message| text(message, "/message/level").as_deref() == Some("error"));
        errors.filter_map(|message| text(message, "/message/rendered")).for_each(|error| eprint!("{error}"));
        return Ok(None);
    }
    // Others are of what it is tested with.
    let binary = messages.iter().filter_map(|message| text(message, "/executable")).next_back();
    binary.map(|binary| Some(binary.into())).with_context(|| format!("{package} has no tests in {target:?}"))
}
