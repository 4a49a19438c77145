//! `gauntlet-manager`: trace, configure, build, serve, drain.

use std::{
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

use gauntlet_domain::Error;
use gauntlet_manager::{Config, Manager};
use gauntlet_telemetry::{Env, Settings, Telemetry};
use tokio::signal::unix::{SignalKind, signal};

/// A flag or variable is wrong: EX_USAGE of sysexits.h.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    gauntlet_manager::supervise_if_requested();
    let config = Config::parse_or_exit();
    let settings = Settings {
        log_filter: config.log_level.clone(),
        ..Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug()
    };
    if let Err(error) = end_at_the_second_signal() {
        eprintln!("error: signals cannot be listened for: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Within the runtime, so that telemetry measures it.
    let entered = runtime.enter();
    let telemetry = match Telemetry::start(&settings, &environment()) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return USAGE.into();
        }
    };
    drop(entered);
    let code = runtime.block_on(serve(config, &telemetry));
    if let Err(error) = &code {
        tracing::error!("{error:#}");
    }
    if let Err(error) = telemetry.shutdown() {
        eprintln!("warning: {error}");
    }
    // A blocking call under way must not hold up the exit: what it does is on record.
    runtime.shutdown_background();
    match code {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if matches!(error.downcast_ref(), Some(Error::Invalid { .. })) => USAGE.into(),
        Err(_) => ExitCode::FAILURE,
    }
}

/// From the second SIGTERM or SIGINT on, each does what it does to any process, whatever is under way.
fn end_at_the_second_signal() -> std::io::Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SignalKind::terminate(), SignalKind::interrupt()].map(|kind| kind.as_raw_value()) {
        // In this order: the first signal finds the flag unset.
        signal_hook::flag::register_conditional_default(signal, asked.clone())?;
        signal_hook::flag::register(signal, asked.clone())?;
    }
    Ok(())
}

/// The environment without LOG_LEVEL, over which a flag may have gone.
fn environment() -> Env {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name != "LOG_LEVEL")
        .collect()
}

async fn serve(config: Config, telemetry: &Telemetry) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let manager = Manager::start(config, telemetry).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    manager.stop().await;
    Ok(())
}
