//! `gauntlet-janitor`: deletes expired instances.

use std::process::ExitCode;

use clap::Parser as _;
use gauntlet_janitor::{Config, run};
use gauntlet_startup::{EX_USAGE, ShutdownSignals, exit_on_second_signal, print_parse_error, protect_memory};
use gauntlet_telemetry::{Env, Settings, Telemetry};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    if let Err(error) = protect_memory() {
        eprintln!("error: cannot protect the memory of this process: {error}");
        return ExitCode::FAILURE;
    }
    let config = match Config::try_parse() {
        Ok(config) => config,
        Err(error) => return print_parse_error(&error).into(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run_observed(&config))
}

/// Runs the janitor with telemetry, until it is done or a signal stops it.
async fn run_observed(config: &Config) -> ExitCode {
    let settings = Settings {
        log_filter: config.log_level.clone(),
        ..Settings::new("gauntlet-janitor", env!("CARGO_PKG_VERSION"))
    };
    // A flag may have overridden LOG_LEVEL.
    let telemetry = match Telemetry::start(&settings, &Env::process().without("LOG_LEVEL")) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return EX_USAGE.into();
        }
    };
    let stop = CancellationToken::new();
    let code = match cancel_on_signal(stop.clone()) {
        Ok(listener) => {
            let result = run(config, telemetry.instruments(), stop).await;
            listener.abort();
            match result {
                Ok(_) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("Nothing was deleted: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Err(error) => {
            tracing::error!("Cannot listen for signals: {error}");
            ExitCode::FAILURE
        }
    };
    if let Err(error) = telemetry.shutdown() {
        eprintln!("warning: {error}");
    }
    code
}

/// Cancels `stop` at the first SIGTERM or SIGINT. From the second one on, each ends the process at once.
fn cancel_on_signal(stop: CancellationToken) -> std::io::Result<JoinHandle<()>> {
    exit_on_second_signal()?;
    let mut shutdown = ShutdownSignals::listen()?;
    Ok(tokio::spawn(async move {
        shutdown.recv().await;
        tracing::info!("Stopping once the deletions under way have ended; a second signal stops at once");
        stop.cancel();
    }))
}
