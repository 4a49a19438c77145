//! `gauntlet dev`: manager and janitor in one process, with example challenges, simulated players and a live view.

mod data_dir;
mod players;
mod screen;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use gauntlet_manager::Manager;
use gauntlet_startup::{EX_USAGE, ShutdownSignals};
use gauntlet_telemetry::{Env, ExportStart, Settings, Telemetry};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{data_dir::DataDir, screen::Screen};

/// How long the players, the janitor and the screen may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(6);
/// After the second signal: how long to wait for the instances to stop.
const HALT_TIMEOUT: Duration = Duration::from_secs(1);
/// The exit code that shells report for a process ended by SIGINT.
const INTERRUPTED: i32 = 130;
/// How long calls under way may take to end at shutdown.
const DRAIN: Duration = Duration::from_secs(5);
/// How long to wait until the instances of the previous run answer.
const READY_TIMEOUT: Duration = Duration::from_secs(15);
/// How often to check for the file that starts the export of telemetry.
const EXPORT_POLL: Duration = Duration::from_millis(500);
/// How often the janitor sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Run everything in one process: manager, janitor, example challenges and simulated players.
///
/// The live view on the terminal is also served as a page at the debug port. State and instances are kept below --data, and the next run
/// continues with them. Ctrl-C stops every process that was started. A second Ctrl-C cancels the calls under way, tells every instance to
/// stop, and exits without waiting. Settings without a flag here are read from the environment variables of gauntlet-manager. Telemetry is
/// exported only if OTEL_EXPORTER_OTLP_ENDPOINT is set.
#[derive(Debug, Clone, Args)]
pub(crate) struct Dev {
    /// The directory for state, scenarios, instances and the log.
    #[arg(long, default_value = "gauntlet-dev", value_name = "DIR")]
    data: PathBuf,
    /// The store: a file below --data, or the etcd of --etcd-endpoints.
    #[arg(long, value_enum, default_value_t = Backend::Embedded)]
    backend: Backend,
    /// The addresses of etcd, comma-separated.
    #[arg(
        long,
        env = "ETCD_ENDPOINTS",
        value_delimiter = ',',
        required_if_eq("backend", "etcd"),
        value_name = "URL,..."
    )]
    etcd_endpoints: Vec<String>,
    /// A directory of scenarios: each NAME/scenario in it is registered as challenge NAME. The built-in examples by default.
    #[arg(long, value_name = "DIR")]
    scenarios: Option<PathBuf>,
    /// A directory to search for the programs of scenarios, before the directory of this program and PATH.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// The port of the API; 0 picks a free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    port: u16,
    /// The port of the debug page; 0 picks a free one.
    #[arg(long, default_value_t = 8081, value_name = "PORT")]
    debug_port: u16,
    /// Start only the manager and the janitor, without challenges and players.
    #[arg(long)]
    bare: bool,
    /// A file whose lines are shown on the screen as they are appended.
    #[arg(long, env = "GAUNTLET_DEV_NOTICES", hide = true)]
    notices: Option<PathBuf>,
    /// Telemetry is exported once this file exists.
    #[arg(long, env = "GAUNTLET_DEV_EXPORT_AFTER", hide = true, value_name = "FILE")]
    export_after: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// One file.
    Embedded,
    /// A real etcd.
    Etcd,
}

impl Dev {
    /// Runs until SIGINT, SIGTERM or SIGHUP, and returns the exit code.
    pub(crate) fn run(&self) -> ExitCode {
        let result = match self.manager_config() {
            Ok(config) => self.prepare(config),
            Err(error) => {
                // clap's texts begin with "error:".
                print_line(error.to_string().trim_end());
                return EX_USAGE.into();
            }
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_line(&format!("error: {error:#}"));
                ExitCode::FAILURE
            }
        }
    }

    /// Makes every check that is possible before anything starts, then serves.
    fn prepare(&self, mut config: gauntlet_manager::Config) -> Result<()> {
        let data_dir = DataDir::lock(&self.data)?;
        data_dir::check_port(self.port, "--port")?;
        data_dir::check_port(self.debug_port, "--debug-port")?;
        // Instances belong to one store, so each backend has its own directory.
        config.dir = match self.backend {
            Backend::Embedded => data_dir.path().to_owned(),
            Backend::Etcd => data_dir.path().join("on-etcd"),
        };
        let scenarios = self.scenarios(&data_dir)?;
        config.scenario_root.clone_from(&scenarios);

        let live = std::io::stdout().is_terminal();
        let mut hints = Vec::new();
        if live {
            // The terminal belongs to the live view.
            let (path, file) = data_dir.create_log()?;
            rustix::stdio::dup2_stderr(&file).context("cannot redirect the log")?;
            hints.push(format!("log             {}", path.display()));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let telemetry = {
            // Within the runtime, so that telemetry measures it.
            let _entered = runtime.enter();
            let mut settings = Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug();
            if self.export_after.is_some() {
                settings = settings.with_export_held();
            }
            Telemetry::start(&settings, &telemetry_environment(std::env::vars_os().filter_map(as_text)))?
        };
        let result = runtime.block_on(self.serve(config, &telemetry, live, hints, scenarios));
        if let Err(error) = telemetry.shutdown() {
            print_line(&format!("warning: {error}"));
        }
        result
    }

    /// Returns the directory whose scenarios are registered, if any.
    fn scenarios(&self, data_dir: &DataDir) -> Result<Option<PathBuf>> {
        if let Some(scenarios) = &self.scenarios {
            let absolute = scenarios.canonicalize();
            return absolute.map(Some).with_context(|| format!("cannot read --scenarios {}", scenarios.display()));
        }
        if self.bare {
            return Ok(None);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path: Vec<_> =
            self.programs.clone().into_iter().chain(beside()).chain(std::env::split_paths(&path)).collect();
        data_dir.write_examples(&path)
    }

    async fn serve(
        &self,
        config: gauntlet_manager::Config,
        telemetry: &Telemetry,
        live: bool,
        mut hints: Vec<String>,
        scenarios: Option<PathBuf>,
    ) -> Result<()> {
        let mut shutdown = ShutdownSignals::listen_with_hangup().context("cannot listen for signals")?;
        let data = config.dir.clone();
        let manager = Manager::start(config, telemetry).await?;
        let url = url(&manager);
        let instances = manager.instances();

        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        if let Some(file) = self.export_after.clone() {
            tasks.spawn(start_export(telemetry.export_start().clone(), file, stop.clone()));
        }
        let started = tokio::select! {
            started = self.start(&manager, telemetry, scenarios.as_deref(), &mut hints, &stop, &tasks) => started.map(|()| true),
            () = shutdown.recv() => Ok(false),
        };
        if let Ok(true) = started {
            let page = manager.debug.map(|address| format!("http://127.0.0.1:{}/", address.port()));
            let screen = Screen::new(telemetry.debug().clone(), &url, page, &hints, self.notices.clone(), live);
            tasks.spawn(screen.show(stop.clone()));
            shutdown.recv().await;
        }
        print_line("\nstopping the API, then the instances; press Ctrl-C again to exit at once");
        stop.cancel();
        tasks.close();
        let shutdown_all = async {
            if tokio::time::timeout(STOP_TIMEOUT, tasks.wait()).await.is_err() {
                tracing::warn!("shutdown timed out: players, janitor or screen still running");
            }
            manager.stop_with_instances().await
        };
        let halted = tokio::select! {
            halted = shutdown_all => halted?,
            () = shutdown.recv() => {
                // The supervisors stop their instances also after this process has exited.
                let halted = tokio::time::timeout(HALT_TIMEOUT, instances.halt()).await;
                print_line(match halted {
                    Ok(Ok(_)) => "exited at once: calls under way were cancelled, and all instances have stopped",
                    _ => "exited at once: calls under way were cancelled, and the instances are still stopping",
                });
                std::process::exit(INTERRUPTED);
            }
        };
        print_line(&format!(
            "stopped {halted} instances; the state is kept in {}, and the next run starts them again",
            data.display()
        ));
        started.map(drop)
    }

    /// Starts the janitor and, unless `--bare` is set, registers the challenges and starts the players.
    async fn start(
        &self,
        manager: &Manager,
        telemetry: &Telemetry,
        scenarios: Option<&Path>,
        hints: &mut Vec<String>,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<()> {
        let url = url(manager);
        let janitor = gauntlet_janitor::Config {
            every: Some(SWEEP_INTERVAL),
            ..gauntlet_janitor::Config::new(url.parse().map_err(anyhow::Error::msg)?)
        };
        // Players should not be given an instance that does not run yet.
        if tokio::time::timeout(READY_TIMEOUT, manager.serving()).await.is_err() {
            tracing::warn!("some instances of the previous run are not ready yet");
        }
        let (instruments, stopped) = (telemetry.instruments().clone(), stop.clone());
        tasks.spawn(async move {
            if let Err(error) = gauntlet_janitor::run(&janitor, &instruments, stopped).await {
                tracing::error!(%error, "the janitor failed");
            }
        });
        if self.bare {
            return Ok(());
        }
        let Some(scenarios) = scenarios else {
            hints.push(
                "no challenges   the programs of the examples were not found; pass their directory with --programs"
                    .into(),
            );
            return Ok(());
        };
        let mut challenges = Vec::new();
        for registered in players::register(&url, scenarios).await? {
            match registered {
                Ok(challenge) => challenges.push(challenge),
                Err(error) => hints.push(format!("not registered  {error}")),
            }
        }
        hints.push(format!("challenges      {}", challenges.join(", ")));
        if challenges.iter().any(|challenge| challenge == "flaky") {
            hints.push(
                "                flaky fails about every third time on purpose, so that there are failures to look at"
                    .into(),
            );
        }
        tasks.spawn(players::play(url, challenges, stop.clone()));
        Ok(())
    }

    /// Returns the manager's configuration: its environment, overridden by the flags of this command.
    fn manager_config(&self) -> Result<gauntlet_manager::Config, clap::Error> {
        let mut config = gauntlet_manager::Config::from_environment()?;
        config.listen_on((Ipv4Addr::LOCALHOST, self.port).into());
        config.debug_address = gauntlet_manager::DebugAddress(Some((Ipv4Addr::LOCALHOST, self.debug_port).into()));
        config.etcd_endpoints = if self.backend == Backend::Etcd { self.etcd_endpoints.clone() } else { Vec::new() };
        // The players and the janitor of this command have no credentials.
        config.access.without_authentication();
        config.registries.oci_insecure = true;
        config.instance_path.splice(0..0, self.programs.clone().into_iter().chain(beside()));
        config.drain = DRAIN;
        Ok(config)
    }
}

/// The directory of this program, which the examples' programs are built into.
fn beside() -> Option<PathBuf> {
    std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()))
}

/// Starts the export of telemetry once the file exists.
async fn start_export(export: ExportStart, file: PathBuf, stop: CancellationToken) {
    while !file.exists() {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EXPORT_POLL) => {}
        }
    }
    export.start();
}

/// The URL of the API.
fn url(manager: &Manager) -> String {
    format!("http://127.0.0.1:{}", manager.api.first().map_or(0, SocketAddr::port))
}

/// Prints a line to standard output. A closed terminal is not an error.
fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn as_text((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

/// Returns the environment for telemetry: logs for people by default, and no exporter for a signal without an endpoint.
fn telemetry_environment(variables: impl Iterator<Item = (String, String)>) -> Env {
    let mut all: BTreeMap<String, String> = variables.collect();
    all.entry("LOG_FORMAT".to_owned()).or_insert_with(|| "human".to_owned());
    for signal in ["TRACES", "METRICS", "LOGS"] {
        let endpoints = ["OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")];
        if !endpoints.iter().any(|name| all.get(name).is_some_and(|endpoint| !endpoint.is_empty())) {
            all.entry(format!("OTEL_{signal}_EXPORTER")).or_insert_with(|| "none".to_owned());
        }
    }
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_without_an_endpoint_are_not_exported() {
        let exporters = |variables: &[(&str, &str)]| {
            let env =
                telemetry_environment(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
            ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"]
                .map(|name| env.get(name).unwrap_or("otlp").to_owned())
        };
        assert_eq!(exporters(&[]), ["none", "none", "none"]);
        assert_eq!(exporters(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), ["none", "none", "none"]);
        assert_eq!(exporters(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317")]), ["otlp", "otlp", "otlp"]);
        let traces_only = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4317")];
        assert_eq!(exporters(&traces_only), ["otlp", "none", "none"]);
        assert_eq!(exporters(&[("OTEL_METRICS_EXPORTER", "prometheus")]), ["none", "prometheus", "none"]);
    }
}
