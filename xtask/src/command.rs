//! Running cargo and other commands in the checkout.

use std::iter;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::workspace_root;

/// The cargo that runs this process, with the environment that a user's shell gives it. `cargo run` adds variables about this package; build
/// scripts that read them would run again and rebuild their crates.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Runs a command in the root of the checkout, with its output on the terminal.
///
/// # Errors
/// When the command cannot be run or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let status = command.current_dir(workspace_root()).status().with_context(|| format!("run {line}"))?;
    if !status.success() {
        bail!("{line} failed ({status})");
    }
    Ok(())
}

/// Runs a command in the root of the checkout and returns what it prints on standard output.
///
/// # Errors
/// When the command cannot be run, fails, or prints no text.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command.current_dir(workspace_root()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("run {line}"))?;
    if !output.status.success() {
        bail!("{line} failed ({})", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{line} printed bytes that are not UTF-8"))
}

/// The command as a person would type it, without its environment.
pub(crate) fn command_line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn failed_command_is_named_without_its_environment() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit 3"]).env_remove("CARGO_PKG_NAME").env("SOME", "setting");
        assert_eq!(run(&mut command).unwrap_err().to_string(), "sh -c exit 3 failed (exit status: 3)");
    }
}
