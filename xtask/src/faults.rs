//! `cargo xtask faults`: the storm of faults that CI has one round of, for as long as one likes.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use gauntlet_stack::{Tool, Tools};

use crate::{
    console::say,
    test::{cargo, run},
};

const STORM: &str = "faults::storm::";

#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// How long, in minutes; it ends after the round that is under way then
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// What the choice of faults follows from; the seed of each run is printed at its start
    #[arg(long)]
    seed: Option<u64>,
}

impl Faults {
    pub(crate) fn run(self) -> Result<ExitCode> {
        Tools::from_env().ensure_packages(&[Tool::Protoc, Tool::Etcd, Tool::Etcdctl, Tool::Ip], &mut say)?;
        run(cargo().args(["build", "--workspace", "--bins"]))?;
        let mut storm = cargo();
        storm.env("GAUNTLET_FAULTS_MINUTES", self.minutes.to_string());
        if let Some(seed) = self.seed {
            storm.env("GAUNTLET_FAULTS_SEED", seed.to_string());
        }
        run(storm.args(["test", "--package", "gauntlet-e2e", "--test", "e2e", STORM, "--", "--nocapture"]))?;
        Ok(ExitCode::SUCCESS)
    }
}
