//! `gauntlet`: everything in one command.

mod client;
mod dev;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
        Err(error) => return gauntlet_startup::print_parse_error(&error).into(),
    };
    match cli.command {
        Command::Dev(dev) => dev.run(),
        Command::Client(command) => client::run(command),
    }
}
