//! `gauntlet-manager`: reads the configuration, starts telemetry, starts the manager, serves until a signal, and drains.

use std::process::ExitCode;

use anyhow::Context as _;
use gauntlet_manager::{Config, Manager, StartError};
use gauntlet_startup::{EX_USAGE, ShutdownSignals, exit_on_second_signal, protect_memory};
use gauntlet_telemetry::{Env, Settings, Telemetry};

fn main() -> ExitCode {
    gauntlet_manager::supervise_if_requested();
    if let Err(error) = protect_memory() {
        eprintln!("error: cannot protect the memory of this process: {error}");
        return ExitCode::FAILURE;
    }
    let config = match Config::from_command_line() {
        Ok(config) => config,
        Err(error) => return gauntlet_startup::print_parse_error(&error).into(),
    };
    let settings = Settings {
        log_filter: config.log_level.clone(),
        ..Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug()
    };
    if let Err(error) = exit_on_second_signal() {
        eprintln!("error: cannot listen for signals: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Telemetry starts inside the runtime to measure it. LOG_LEVEL has been read with the flags, which override it.
    let entered = runtime.enter();
    let telemetry = match Telemetry::start(&settings, &Env::process().without("LOG_LEVEL")) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return EX_USAGE.into();
        }
    };
    drop(entered);
    let result = runtime.block_on(serve(config, &telemetry));
    if let Err(error) = &result {
        tracing::error!("{error:#}");
    }
    if let Err(error) = telemetry.shutdown() {
        eprintln!("warning: {error}");
    }
    // Don't wait for blocking calls: recovery finishes their work at the next start.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(StartError::Config(_)) => EX_USAGE.into(),
        Err(StartError::Failed(_)) => ExitCode::FAILURE,
    }
}

async fn serve(config: Config, telemetry: &Telemetry) -> Result<(), StartError> {
    let mut shutdown = ShutdownSignals::listen().context("cannot listen for signals")?;
    let manager = Manager::start(config, telemetry).await?;
    shutdown.recv().await;
    manager.stop().await;
    Ok(())
}
