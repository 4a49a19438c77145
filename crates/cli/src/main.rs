//! `gauntlet`: everything in one command.

mod client;
mod dev;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A flag or variable is wrong: EX_USAGE of sysexits.h.
const USAGE: u8 = 64;

/// Runs challenge instances on demand, and makes every step of it observable.
#[derive(Debug, Parser)]
#[command(name = "gauntlet", version, about, long_about, disable_help_subcommand = true)]
#[command(
    after_help = "It exits with 0, with 1 on a failure, with 64 on wrong usage, with 69 when what it needs does not answer."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Each brings its own runtime and telemetry.
#[derive(Debug, Subcommand)]
enum Command {
    Dev(dev::Dev),
    #[command(flatten)]
    Client(client::Command),
}

fn main() -> ExitCode {
    gauntlet_manager::supervise_if_requested();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // Nobody to tell when even that fails.
            let _ = error.print();
            return code.into();
        }
    };
    match cli.command {
        Command::Dev(dev) => dev.run(),
        Command::Client(command) => client::run(command),
    }
}
