//! `cargo xtask test`: everything that CI runs.

use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tool, Tools, tools, workspace_root};

use crate::console::say;
use crate::{guarantees, mutants, runner};

/// The packages whose tests start the observability stack.
const SLOW: [&str; 2] = ["crates/e2e", "crates/stack"];

/// What the tests need that are not end to end.
const FAST: &[Tool] = &[Tool::Etcd, Tool::Registry];

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Run only the tests whose name contains this, and no other check
    filter: Option<String>,
    /// Leave out the tests that start the observability stack, and the builds it needs
    #[arg(long)]
    fast: bool,
}

impl Test {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let started = Instant::now();
        let mut steps = Steps::default();
        let outcome = self.steps(&mut steps);
        let times: Vec<String> = steps.done.iter().map(|(name, took)| format!("{name} {}", seconds(*took))).collect();
        let verdict = if outcome.is_ok() { "passed" } else { "FAILED" };
        say(&format!("{verdict} in {} ({})", seconds(started.elapsed()), times.join(", ")));
        outcome.map(|()| ExitCode::SUCCESS)
    }

    fn steps(&self, steps: &mut Steps) -> Result<()> {
        let tools = Tools::from_env();
        let every = self.filter.is_none();
        steps.run("packages", || Ok(tools.ensure_packages(tools::TESTS, &mut say)?))?;
        if every {
            steps.cargo("fmt", &["fmt", "--all", "--check"])?;
            steps.run("mutants apply", mutants::check)?;
        }
        // At low priority, while the workspace compiles.
        let needed = if self.fast { FAST } else { tools::TESTS };
        let builds = {
            let tools = tools.clone();
            thread::spawn(move || tools.ensure(needed, &mut say))
        };
        if every {
            steps.cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
        }
        // Binaries and tests in one go: apart they would resolve features differently, and compile most things twice.
        steps.cargo("build", &["build", "--workspace", "--all-targets"])?;
        steps.run("components", || match builds.join() {
            Ok(built) => Ok(built?),
            Err(_) => bail!("the thread that builds them has panicked"),
        })?;
        if every {
            steps.run("configuration", || check_configuration(&tools, self.fast))?;
        }
        let mut binaries = Vec::new();
        steps.run("list tests", || {
            binaries = runner::binaries()?;
            if every { guarantees::check(&binaries) } else { Ok(()) }
        })?;
        if self.fast {
            binaries.retain(|binary| SLOW.iter().all(|package| !binary.root.starts_with(package)));
        }
        let ran = steps.run("tests", || runner::run(&binaries, self.filter.as_deref()));
        if every {
            steps.cargo("examples in docs", &["test", "--workspace", "--doc", "--no-fail-fast"])?;
        }
        ran
    }
}

/// The checks that each component brings for its own files.
fn check_configuration(tools: &Tools, fast: bool) -> Result<()> {
    let promtool = tools.require(Tool::Promtool)?;
    // With it, the rules that it names.
    run(Command::new(&promtool).args(["check", "config", "deploy/prometheus/prometheus.yml"]))?;
    run(Command::new(&promtool).args(["test", "rules"]).args(files("deploy/prometheus/tests", ".test.yml")?))?;
    run(Command::new(tools.require(Tool::Amtool)?).args(["check-config", "alertmanager/alertmanager.yml"]))?;
    if !fast {
        run(Command::new(tools.require(Tool::Collector)?).args(["validate", "--config", "otel-collector.yaml"]))?;
        run(Command::new(tools.require(Tool::Jaeger)?).args(["validate", "--config", "jaeger/config.yaml"]))?;
    }
    Ok(())
}

/// The files of a directory of the checkout with that ending, in order.
fn files(dir: &str, ending: &str) -> Result<Vec<PathBuf>> {
    let dir = workspace_root().join(dir);
    let entries = fs::read_dir(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut files: Vec<PathBuf> = entries
        .with_context(|| format!("list {}", dir.display()))?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    files.sort();
    Ok(files)
}

/// What was done, and how long it took.
#[derive(Default)]
struct Steps {
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) -> Result<()> {
        say(name);
        let started = Instant::now();
        let outcome = step();
        self.done.push((name, started.elapsed()));
        outcome.context(name)
    }

    fn cargo(&mut self, name: &'static str, arguments: &[&str]) -> Result<()> {
        self.run(name, || run(cargo().args(arguments)))
    }
}

/// The cargo that runs this, as if it was called by hand: what `cargo run` says of this package would have crates built anew whose build
/// scripts look at it.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Runs a command in the checkout, its output on the screen.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = line(command);
    let status = command.current_dir(workspace_root()).status().with_context(|| format!("run {line}"))?;
    if !status.success() {
        bail!("{line} failed ({status})");
    }
    Ok(())
}

/// A command as a person would type it: its environment is left out.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn seconds(time: Duration) -> String {
    format!("{:.0} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_failed_command_is_named_without_its_environment() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit 3"]).env_remove("CARGO_PKG_NAME").env("SOME", "setting");
        assert_eq!(run(&mut command).unwrap_err().to_string(), "sh -c exit 3 failed (exit status: 3)");
    }
}
