//! `gauntlet-manager`: trace, configure, build, serve, drain.

use std::process::ExitCode;

use gauntlet_domain::Error;
use gauntlet_manager::{Config, Manager};
use gauntlet_startup::{EX_USAGE, ShutdownSignals, exit_on_second_signal};
use gauntlet_telemetry::{Env, Settings, Telemetry};

fn main() -> ExitCode {
    gauntlet_manager::supervise_if_requested();
    let config = match Config::from_command_line() {
        Ok(config) => config,
        Err(error) => return gauntlet_startup::print_parse_error(&error).into(),
    };
    let settings = Settings {
        log_filter: config.log_level.clone(),
        ..Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug()
    };
    if let Err(error) = exit_on_second_signal() {
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
    // Within the runtime, so that telemetry measures it. A flag may have overridden LOG_LEVEL.
    let entered = runtime.enter();
    let telemetry = match Telemetry::start(&settings, &Env::process().without("LOG_LEVEL")) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return EX_USAGE.into();
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
        Err(error) if matches!(error.downcast_ref(), Some(Error::Invalid { .. })) => EX_USAGE.into(),
        Err(_) => ExitCode::FAILURE,
    }
}

async fn serve(config: Config, telemetry: &Telemetry) -> anyhow::Result<()> {
    let mut shutdown = ShutdownSignals::listen()?;
    let manager = Manager::start(config, telemetry).await?;
    shutdown.recv().await;
    manager.stop().await;
    Ok(())
}
