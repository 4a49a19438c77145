//! `gauntlet`: the command line of the project, and manager and janitor in one process.

mod client;
mod dev;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs challenge instances on demand and makes every step observable.
#[derive(Debug, Parser)]
#[command(name = "gauntlet", version, about, long_about, disable_help_subcommand = true)]
#[command(
    after_help = "Exit codes: 0 on success, 1 on failure, 64 for a wrong flag or variable, 69 if the server does not answer."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Each command sets up its own runtime and telemetry.
#[derive(Debug, Subcommand)]
enum Command {
    Dev(dev::Dev),
    #[command(flatten)]
    Client(Box<client::Command>),
}

fn main() -> ExitCode {
    gauntlet_manager::supervise_if_requested();
    if let Err(error) = gauntlet_startup::protect_memory() {
        eprintln!("error: cannot protect the memory of this process: {error}");
        return ExitCode::FAILURE;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return gauntlet_startup::print_parse_error(&error).into(),
    };
    match cli.command {
        Command::Dev(dev) => dev.run(),
        Command::Client(command) => client::run(*command),
    }
}
