//! `cargo xtask test`: every check and test that CI runs.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tool, Tools, tools, workspace_root};

use crate::command::{cargo, run};
use crate::console::say;
use crate::{cargo_tool, deny, guarantees, mutants, runner};

/// The packages whose tests start the observability stack.
const STACK_PACKAGES: [&str; 2] = ["crates/e2e", "crates/stack"];

/// The components that the other tests run.
const FAST_TOOLS: &[Tool] = &[Tool::Etcd, Tool::Registry];

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Run only tests whose name contains this, and no other checks
    filter: Option<String>,
    /// Skip tests that start the observability stack, and do not build it
    #[arg(long)]
    fast: bool,
}

impl Test {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let started = Instant::now();
        let mut steps = Steps::default();
        let outcome = self.steps(&mut steps);
        let times: Vec<String> =
            steps.done.iter().map(|(name, duration)| format!("{name} {}", seconds(*duration))).collect();
        let verdict = if outcome.is_ok() { "passed" } else { "FAILED" };
        say(&format!("{verdict} in {} ({})", seconds(started.elapsed()), times.join(", ")));
        outcome.map(|()| ExitCode::SUCCESS)
    }

    fn steps(&self, steps: &mut Steps) -> Result<()> {
        let tools = Tools::from_env();
        let is_full = self.filter.is_none();
        steps.run("packages", || Ok(tools.ensure_packages(tools::TESTS, &mut say)?))?;
        if is_full {
            steps.cargo("fmt", &["fmt", "--all", "--check"])?;
            steps.run("mutants apply", mutants::check)?;
        }
        // Components are built at low priority, while the workspace compiles.
        let needed = if self.fast { FAST_TOOLS } else { tools::TESTS };
        let checks_crates = is_full && !self.fast;
        let component_builds = {
            let tools = tools.clone();
            thread::spawn(move || {
                if checks_crates {
                    cargo_tool::DENY.ensure(&tools)?;
                }
                Ok::<_, anyhow::Error>(tools.ensure(needed, &mut say)?)
            })
        };
        if is_full {
            steps.cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
        }
        // One build of binaries and tests: two would resolve features differently and compile most crates twice.
        steps.cargo("build", &["build", "--workspace", "--all-targets"])?;
        steps.run("components", || match component_builds.join() {
            Ok(built) => built,
            Err(_) => bail!("the thread that builds the components panicked"),
        })?;
        if checks_crates {
            steps.run("deny", || deny::check(&tools))?;
        }
        if is_full {
            steps.run("configuration", || check_configuration(&tools, self.fast))?;
        }
        let mut binaries = Vec::new();
        steps.run("list tests", || {
            binaries = runner::binaries()?;
            if is_full { guarantees::check(&binaries) } else { Ok(()) }
        })?;
        if self.fast {
            binaries.retain(|binary| STACK_PACKAGES.iter().all(|package| !binary.root.starts_with(package)));
        }
        let tests = steps.run("tests", || runner::run(&binaries, self.filter.as_deref()));
        if is_full {
            steps.cargo("examples in docs", &["test", "--workspace", "--doc", "--no-fail-fast"])?;
        }
        tests
    }
}

/// Checks configuration files with the tools of the components that read them.
fn check_configuration(tools: &Tools, fast: bool) -> Result<()> {
    let promtool = tools.require(Tool::Promtool)?;
    // This also checks the rule files that it names.
    run(Command::new(&promtool).args(["check", "config", "deploy/prometheus/prometheus.yml"]))?;
    run(Command::new(&promtool).args(["test", "rules"]).args(files("deploy/prometheus/tests", ".test.yml")?))?;
    run(Command::new(tools.require(Tool::Amtool)?).args(["check-config", "alertmanager/alertmanager.yml"]))?;
    if !fast {
        run(Command::new(tools.require(Tool::Collector)?).args(["validate", "--config", "otel-collector.yaml"]))?;
        run(Command::new(tools.require(Tool::Jaeger)?).args(["validate", "--config", "jaeger/config.yaml"]))?;
    }
    Ok(())
}

/// The files with a suffix in a directory of the checkout, sorted.
fn files(dir: &str, suffix: &str) -> Result<Vec<PathBuf>> {
    let dir = workspace_root().join(dir);
    let entries = fs::read_dir(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut files: Vec<PathBuf> = entries
        .with_context(|| format!("list {}", dir.display()))?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with(suffix))
        .collect();
    files.sort();
    Ok(files)
}

/// The steps that were run, and their durations.
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

fn seconds(duration: Duration) -> String {
    format!("{:.0} s", duration.as_secs_f64())
}
