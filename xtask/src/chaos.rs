//! `cargo xtask chaos`: the simulation, for any number of seeds.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::test::{cargo, run};

#[derive(Debug, Args)]
pub(crate) struct Chaos {
    /// How many seeds to run
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Print every event as it happens; for one seed
    #[arg(long)]
    trace: bool,
}

impl Chaos {
    /// Succeeds if no invariant was violated. The test prints progress, counts of what was done, and how to replay what failed.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let mut command = cargo();
        command
            .args(["test", "--quiet", "--package", "gauntlet-simulation", "--test", "simulation"])
            .args(["simulation::seeds", "--", "--exact", "--nocapture"])
            .env("GAUNTLET_SEEDS", self.seeds.to_string())
            .env("GAUNTLET_FROM", self.from.to_string())
            .env_remove("GAUNTLET_TRACE")
            // The panic's message is all there is to see.
            .env("RUST_BACKTRACE", "0");
        if self.trace {
            command.env("GAUNTLET_TRACE", "1");
        }
        run(&mut command)?;
        Ok(ExitCode::SUCCESS)
    }
}
