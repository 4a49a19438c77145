//! `cargo xtask setup`: everything that plain `cargo build` and editors need, and optionally the tests.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use gauntlet_stack::{Tools, tools};

use crate::console::{Screen, Stop};

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// Also install and build every component that the tests run
    #[arg(long)]
    tools: bool,
}

impl Setup {
    /// `main` has already installed protoc, as it does for every command.
    pub(crate) fn run(self) -> Result<ExitCode> {
        if self.tools {
            Tools::from_env().ensure(tools::TESTS, &mut Screen(&Stop::listen()?))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
