//! `gauntlet-janitor`: deletes what has expired.

use std::{
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

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

/// Cancels `stop` at SIGTERM or SIGINT; from the second one on, each does what it does to any process.
fn on_signal(stop: CancellationToken) -> std::io::Result<tokio::task::JoinHandle<()>> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SignalKind::terminate(), SignalKind::interrupt()].map(|kind| kind.as_raw_value()) {
        // In this order: the first signal finds the flag unset.
        signal_hook::flag::register_conditional_default(signal, asked.clone())?;
        signal_hook::flag::register(signal, asked.clone())?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("Stopping: deletions under way may end; a second signal ends at once");
        stop.cancel();
    }))
}
