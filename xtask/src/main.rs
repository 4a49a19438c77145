//! Set-up, tests and the observability stack: `cargo xtask --help`.

mod bench;
mod binary;
mod chaos;
mod clean_room;
mod console;
mod dev;
mod doctor;
mod faults;
mod guarantees;
mod mutants;
mod protoc;
mod runner;
mod sample;
mod setup;
mod stack;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, tests and the observability stack of Gauntlet
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build and run everything on this machine: manager, janitor, example challenges, and the observability stack beside them
    Dev(dev::Dev),
    /// Install what is missing, then run every check and every test
    Test(test::Test),
    /// Simulate managers, etcd and a machine with every fault there is, one seed after another
    Chaos(chaos::Chaos),
    /// Managers and an etcd cluster, all real, under load: kill, pause and cut off one after the other, and see what was promised kept
    #[command(after_help = faults::HELP)]
    Faults(faults::Faults),
    /// Break coordination on purpose, in each known way in a copy of the checkout, and see a test notice it
    Mutants(mutants::Mutants),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Bench),
    /// The observability stack: collector, Jaeger, Prometheus, Alertmanager
    #[command(subcommand)]
    Stack(stack::Command),
    /// Run the README's commands on a bare Debian, as somebody who comes to it new
    CleanRoom(clean_room::CleanRoom),
    /// Say what is there, what is missing, and what to do
    Doctor,
    /// Prepare this checkout for plain `cargo build` and for editors; every other command does it too
    Setup(setup::Setup),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let outcome = protoc::install().and_then(|()| match command {
        Command::Dev(dev) => dev.run(),
        Command::Test(test) => test.run(),
        Command::Chaos(chaos) => chaos.run(),
        Command::Faults(faults) => faults.run(),
        Command::Mutants(mutants) => mutants.run(),
        Command::Bench(bench) => bench.run(),
        Command::Stack(command) => command.run(),
        Command::CleanRoom(clean_room) => clean_room.run(),
        Command::Doctor => doctor::run(),
        Command::Setup(setup) => setup.run(),
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("cargo xtask: {error:#}");
        ExitCode::FAILURE
    })
}
