//! `cargo xtask bench`: what is fast, measured beside what is below it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use gauntlet_stack::{Tool, Tools};

use crate::console::say;
use crate::test::{cargo, run};

/// What to measure
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Locks, creates and renewals beside one raw transaction of their store; also written to target/bench/coordination.json
    #[command(disable_help_flag = true)]
    Coordination {
        /// Handed to the benchmark: `--help` says what there is
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Operations beside 0, 1,000 and 4,000 running instances, in one run; also written to target/bench/scale.json
    #[command(disable_help_flag = true)]
    Scale {
        /// Handed to the benchmark: `--help` says what there is
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

impl Bench {
    pub(crate) fn run(self) -> Result<ExitCode> {
        Tools::from_env().ensure(&[Tool::Etcd], &mut say)?;
        let (package, bench, arguments) = match self {
            Self::Coordination { arguments } => ("gauntlet-coordination", "coordination", arguments),
            Self::Scale { arguments } => {
                // The programs that it runs.
                run(cargo().args(["build", "--release", "--bins"]))?;
                ("gauntlet-e2e", "scale", arguments)
            }
        };
        run(cargo().args(["bench", "--package", package, "--bench", bench, "--"]).args(arguments))?;
        Ok(ExitCode::SUCCESS)
    }
}
