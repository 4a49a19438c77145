//! `gauntlet-janitor`: deletes what has expired.

use std::process::ExitCode;

use clap::Parser as _;
use gauntlet_janitor::{Config, run};
use gauntlet_telemetry::{Env, Settings, Telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A flag or variable is wrong: EX_USAGE of sysexits.h.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let config = match Config::try_parse() {
        Ok(config) => config,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // Nobody to tell when even that fails.
            let _ = error.print();
            return code.into();
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(sweep(&config))
}

async fn sweep(config: &Config) -> ExitCode {
    let settings = Settings {
        log_filter: config.log_level.clone(),
        ..Settings::new("gauntlet-janitor", env!("CARGO_PKG_VERSION"))
    };
    let telemetry = match Telemetry::start(&settings, &environment()) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return USAGE.into();
        }
    };
    let stop = CancellationToken::new();
    let code = match on_signal(stop.clone()) {
        Ok(listener) => {
            let result = run(config, telemetry.instruments(), stop).await;
            listener.abort();
            match result {
                Ok(_) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("Nothing done: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Err(error) => {
            tracing::error!("Signals cannot be listened for: {error}");
            ExitCode::FAILURE
        }
    };
    if let Err(error) = telemetry.shutdown() {
        eprintln!("warning: {error}");
    }
    code
}

/// The environment without LOG_LEVEL, over which a flag may have gone.
fn environment() -> Env {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name != "LOG_LEVEL")
        .collect()
}

/// Cancels `stop` at SIGTERM or SIGINT.
fn on_signal(stop: CancellationToken) -> std::io::Result<tokio::task::JoinHandle<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.cancel();
    }))
}
