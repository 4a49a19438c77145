//! `cargo xtask chaos`: the simulation, for any number of seeds.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::test_binary;

const SEEDS: &str = "simulation::seeds";

#[derive(Debug, Args)]
#[command(
    after_help = "Prints its progress and, at the end, how often each fault met each step. It stops at the first seed that violates an \
                  invariant, and prints the last events and the command that replays the seed. Ctrl-C stops it at any time; continue with --from."
)]
pub(crate) struct Chaos {
    /// Number of seeds to run
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// First seed
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 60))]
    from: u64,
    /// Run only this seed, and print every event
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from"])]
    replay: Option<u64>,
}

impl Chaos {
    /// Fails if an invariant was violated. The test itself prints the report.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let (from, seeds) = self.replay.map_or((self.from, self.seeds), |seed| (seed, 1));
        let mut simulation = test_binary::single_test("gauntlet-simulation", "simulation", SEEDS)?;
        simulation
            .env("GAUNTLET_SEEDS", seeds.to_string())
            .env("GAUNTLET_FROM", from.to_string())
            .env_remove("GAUNTLET_TRACE");
        if self.replay.is_some() {
            simulation.env("GAUNTLET_TRACE", "1");
        }
        let status = simulation.status().context("run the simulation")?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
