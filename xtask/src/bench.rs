//! `cargo xtask bench`: benchmarks that compare Gauntlet with what it is built on.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use gauntlet_stack::{Tool, Tools};

use crate::command::{cargo, run};
use crate::console::say;

/// Run a benchmark
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Locks, creates and renewals, each compared with one raw transaction of the same store; results also in target/bench/coordination.json
    #[command(disable_help_flag = true)]
    Coordination {
        /// Arguments of the benchmark; --help lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Operations while 0, 1,000 and 4,000 instances run; results also in target/bench/scale.json
    #[command(disable_help_flag = true)]
    Scale {
        /// Arguments of the benchmark; --help lists them
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
                // The benchmark runs the programs of the workspace.
                run(cargo().args(["build", "--release", "--bins"]))?;
                ("gauntlet-e2e", "scale", arguments)
            }
        };
        run(cargo().args(["bench", "--package", package, "--bench", bench, "--"]).args(arguments))?;
        Ok(ExitCode::SUCCESS)
    }
}
