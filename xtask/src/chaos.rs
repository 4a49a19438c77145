//! `cargo xtask chaos`: the simulation, for any number of seeds.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::workspace_root;

use crate::test::cargo;
use crate::{binary, runner};

const SEEDS: &str = "simulation::seeds";

#[derive(Debug, Args)]
#[command(
    after_help = "Prints how far it is, and in the end how often each fault met each step. The first seed that violates an invariant ends \
                  it, with its last events and the command that replays it. Ctrl-C ends it at any time; `--from` goes on elsewhere."
)]
pub(crate) struct Chaos {
    /// How many seeds to run
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first of them
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 60))]
    from: u64,
    /// Run this seed alone, and print every event as it happens
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from"])]
    replay: Option<u64>,
}

impl Chaos {
    /// Succeeds if no invariant was violated. The test says all there is to say.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let (from, seeds) = self.replay.map_or((self.from, self.seeds), |seed| (seed, 1));
        let mut here = cargo();
        here.current_dir(workspace_root());
        let target = ["--test".to_owned(), "simulation".to_owned()];
        let Some(test) = binary::of_tests(here, "gauntlet-simulation", &target)? else {
            bail!("the tests do not build: the errors are above");
        };
        runner::require(&test, SEEDS)?;
        let mut command = Command::new(test);
        command
            .args([SEEDS, "--exact", "--nocapture"])
            .env("GAUNTLET_SEEDS", seeds.to_string())
            .env("GAUNTLET_FROM", from.to_string())
            .env_remove("GAUNTLET_TRACE")
            // The panic's message is all there is to see.
            .env("RUST_BACKTRACE", "0")
            .current_dir(workspace_root().join("crates/simulation"));
        if self.replay.is_some() {
            command.env("GAUNTLET_TRACE", "1");
        }
        let status = command.status().context("run the simulation")?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
