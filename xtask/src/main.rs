//! The developer commands of Gauntlet: `cargo xtask --help`.

mod bench;
mod cargo_tool;
mod chaos;
mod clean_room;
mod command;
mod console;
mod deny;
mod dev;
mod doctor;
mod faults;
mod fuzz;
mod guarantees;
mod lock;
mod mutants;
mod protoc;
mod reproducible;
mod runner;
mod sbom;
mod setup;
mod stack;
mod test;
mod test_binary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of Gauntlet: run it, test it, and run the observability stack
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build and run Gauntlet on this machine: manager, janitor, example challenges and the observability stack
    Dev(dev::Dev),
    /// Run every check and every test, after installing what they need
    Test(test::Test),
    /// Run the simulation: managers, etcd and machines with injected faults, reproducible by seed
    Chaos(chaos::Chaos),
    /// Inject faults into real managers and a real etcd cluster under load, and check that no promise is broken
    #[command(after_help = faults::HELP)]
    Faults(faults::Faults),
    /// Introduce known coordination bugs into a copy of the checkout, and check that a test detects each
    Mutants(mutants::Mutants),
    /// Search for inputs that break the decoders of what strangers, registries and authors send
    Fuzz(fuzz::Fuzz),
    /// Check licences, sources and advisories of the crates that Gauntlet is built from
    Deny(deny::Deny),
    /// Write a software bill of materials for each binary
    Sbom(sbom::Sbom),
    /// Build the release binaries twice, in different directories, and compare them
    Reproducible(reproducible::Reproducible),
    /// Run benchmarks
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Start, stop or check the observability stack: collector, Jaeger, Prometheus, Alertmanager
    #[command(subcommand)]
    Stack(stack::Command),
    /// Run the README's commands on a minimal Debian, as a newcomer would
    CleanRoom(clean_room::CleanRoom),
    /// Show which tools are installed, which are missing, and how to get them
    Doctor,
    /// Prepare this checkout for plain `cargo build` and for editors; every other command does this too
    Setup(setup::Setup),
}

fn main() -> ExitCode {
    // `doctor` starts this program again to find out how instances can be isolated.
    gauntlet_sandbox::run_if_requested();
    let command = Arguments::parse().command;
    let outcome = protoc::install().and_then(|()| match command {
        Command::Dev(dev) => dev.run(),
        Command::Test(test) => test.run(),
        Command::Chaos(chaos) => chaos.run(),
        Command::Faults(faults) => faults.run(),
        Command::Mutants(mutants) => mutants.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Deny(deny) => deny.run(),
        Command::Sbom(sbom) => sbom.run(),
        Command::Reproducible(reproducible) => reproducible.run(),
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
