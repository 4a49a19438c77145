//! `gauntlet dev`: manager and janitor in one process, example challenges, a few players, and a live view.

mod ground;
mod players;
mod screen;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    net::Ipv4Addr,
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

use self::{ground::Ground, screen::Screen};

/// How long the players, the janitor and the screen may take to end.
const END_WITHIN: Duration = Duration::from_secs(6);
/// When asked a second time: how long telling the instances to end may take.
const TELL_WITHIN: Duration = Duration::from_secs(1);
/// What a process exits with that SIGINT ended, as shells have it.
const AT_ONCE: i32 = 130;
/// How long calls under way may take to end after that.
const DRAIN: Duration = Duration::from_secs(5);
/// How long to wait for instances of the run before.
const SERVES_WITHIN: Duration = Duration::from_secs(15);
/// How often to look for the file that starts export.
const EXPORT_POLL: Duration = Duration::from_millis(500);
/// How often the janitor sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Run everything in this process: manager, janitor, example challenges and players that use them.
///
/// What it shows on the terminal is also a page, at the debug port. State and instances are kept below --data: the next run goes on
/// with them. Ctrl-C ends every process that was started; a second one gives up calls under way, tells every instance to end, and does not wait. What is no flag here is configured by the environment of gauntlet-manager.
/// Nothing is exported unless OTEL_EXPORTER_OTLP_ENDPOINT says where to.
#[derive(Debug, Clone, Args)]
pub(crate) struct Dev {
    /// Where state, scenarios, instances and the log are kept.
    #[arg(long, default_value = "gauntlet-dev", value_name = "DIR")]
    data: PathBuf,
    /// Where state is kept: in a file below --data, or in the etcd of --etcd-endpoints.
    #[arg(long, value_enum, default_value_t = Backend::Embedded)]
    backend: Backend,
    /// etcd, comma-separated.
    #[arg(
        long,
        env = "ETCD_ENDPOINTS",
        value_delimiter = ',',
        required_if_eq("backend", "etcd"),
        value_name = "URL,..."
    )]
    etcd_endpoints: Vec<String>,
    /// A directory of scenarios: each NAME/scenario below it is registered as challenge NAME. The built-in examples unless given.
    #[arg(long, value_name = "DIR")]
    scenarios: Option<PathBuf>,
    /// Where to look for the programs of scenarios, before the directory of this program and PATH.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// The port of the API; 0 picks a free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    port: u16,
    /// The port of the debug page; 0 picks a free one.
    #[arg(long, default_value_t = 8081, value_name = "PORT")]
    debug_port: u16,
    /// Only the manager and the janitor: no challenge is registered, nobody plays.
    #[arg(long)]
    bare: bool,
    /// A file whose lines are shown as they are added.
    #[arg(long, env = "GAUNTLET_DEV_NOTICES", hide = true)]
    notices: Option<PathBuf>,
    /// Nothing is exported before this file exists.
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
    /// Runs until SIGINT, SIGTERM or SIGHUP.
    pub(crate) fn run(&self) -> ExitCode {
        let result = match self.manager() {
            Ok(config) => self.prepare(config),
            Err(error) => {
                // clap's texts say that they are errors.
                tell(error.to_string().trim_end());
                return EX_USAGE.into();
            }
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tell(&format!("error: {error:#}"));
                ExitCode::FAILURE
            }
        }
    }

    /// Checks what can be checked before anything starts, then serves.
    fn prepare(&self, mut config: gauntlet_manager::Config) -> Result<()> {
        let ground = Ground::take(&self.data)?;
        ground::is_free(self.port, "--port")?;
        ground::is_free(self.debug_port, "--debug-port")?;
        // Instances belong to one store: a run on the other backend has its own.
        config.dir = match self.backend {
            Backend::Embedded => ground.data().to_owned(),
            Backend::Etcd => ground.data().join("on-etcd"),
        };
        let scenarios = self.scenarios(&ground)?;
        config.scenario_root.clone_from(&scenarios);

        let live = std::io::stdout().is_terminal();
        let mut hints = Vec::new();
        if live {
            // The terminal belongs to the live view.
            let (path, file) = ground.log()?;
            rustix::stdio::dup2_stderr(&file).context("redirect the log")?;
            hints.push(format!("the log         {}", path.display()));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let telemetry = {
            // Within the runtime, so that telemetry measures it.
            let _entered = runtime.enter();
            let mut settings = Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug();
            if self.export_after.is_some() {
                settings = settings.with_export_held();
            }
            Telemetry::start(&settings, &environment(std::env::vars_os().filter_map(text)))?
        };
        let result = runtime.block_on(self.serve(config, &telemetry, live, hints, scenarios));
        if let Err(error) = telemetry.shutdown() {
            tell(&format!("warning: {error}"));
        }
        result
    }

    /// The directory whose scenarios are registered, if any are.
    fn scenarios(&self, ground: &Ground) -> Result<Option<PathBuf>> {
        if let Some(scenarios) = &self.scenarios {
            let whole = scenarios.canonicalize();
            return whole.map(Some).with_context(|| format!("--scenarios {}", scenarios.display()));
        }
        if self.bare {
            return Ok(None);
        }
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path: Vec<_> =
            self.programs.clone().into_iter().chain(beside).chain(std::env::split_paths(&path)).collect();
        ground.examples(&path)
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
        let began = tokio::select! {
            began = self.begin(&manager, telemetry, scenarios.as_deref(), &mut hints, &stop, &tasks) => began.map(|()| true),
            () = shutdown.recv() => Ok(false),
        };
        if let Ok(true) = began {
            let page = manager.debug.map(|address| format!("http://127.0.0.1:{}/", address.port()));
            let screen = Screen::new(telemetry.debug().clone(), &url, page, &hints, self.notices.clone(), live);
            tasks.spawn(screen.show(stop.clone()));
            shutdown.recv().await;
        }
        tell("\nending: the API, then the instances; Ctrl-C again ends at once");
        stop.cancel();
        tasks.close();
        let ended = async {
            if tokio::time::timeout(END_WITHIN, tasks.wait()).await.is_err() {
                tracing::warn!("players, janitor or screen do not end");
            }
            manager.stop_with_instances().await
        };
        let halted = tokio::select! {
            halted = ended => halted?,
            () = shutdown.recv() => {
                // Their supervisors end them also when this process has gone.
                let told = tokio::time::timeout(TELL_WITHIN, instances.halt()).await;
                tell(match told {
                    Ok(Ok(_)) => "ended at once: calls under way were given up, and every instance has ended",
                    _ => "ended at once: calls under way were given up, and instances were told to end, which takes them a moment",
                });
                std::process::exit(AT_ONCE);
            }
        };
        tell(&format!(
            "ended {halted} instances; {} keeps what is stored, and the next run brings them back",
            data.display()
        ));
        began.map(drop)
    }

    /// Starts the janitor and, unless bare, registers the challenges and lets the players in.
    async fn begin(
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
            every: Some(SWEEP_EVERY),
            ..gauntlet_janitor::Config::new(url.parse().map_err(anyhow::Error::msg)?)
        };
        // So that nobody is handed an instance that does not run yet.
        if tokio::time::timeout(SERVES_WITHIN, manager.serving()).await.is_err() {
            tracing::warn!("instances of the run before take long: some may not answer yet");
        }
        let (instruments, ending) = (telemetry.instruments().clone(), stop.clone());
        tasks.spawn(async move {
            if let Err(error) = gauntlet_janitor::run(&janitor, &instruments, ending).await {
                tracing::error!(%error, "the janitor ended");
            }
        });
        if self.bare {
            return Ok(());
        }
        let Some(scenarios) = scenarios else {
            hints.push(
                "no challenge    the programs of the examples are not here: give their directory with --programs"
                    .into(),
            );
            return Ok(());
        };
        let mut challenges = Vec::new();
        for registered in players::register(&url, scenarios).await? {
            match registered {
                Ok(challenge) => challenges.push(challenge),
                Err(why) => hints.push(format!("not registered  {why}")),
            }
        }
        hints.push(format!("challenges      {}", challenges.join(", ")));
        if challenges.iter().any(|challenge| challenge == "flaky") {
            hints.push(
                "                flaky fails about every third time on purpose, so that there is a failure to look at"
                    .into(),
            );
        }
        tasks.spawn(players::play(url, challenges, stop.clone()));
        Ok(())
    }

    /// The environment of the manager under the flags.
    fn manager(&self) -> Result<gauntlet_manager::Config, clap::Error> {
        let mut config = gauntlet_manager::Config::from_environment()?;
        config.bind = Ipv4Addr::LOCALHOST.into();
        config.port = self.port;
        config.debug_address = gauntlet_manager::DebugAddress(Some((Ipv4Addr::LOCALHOST, self.debug_port).into()));
        config.etcd_endpoints = if self.backend == Backend::Etcd { self.etcd_endpoints.clone() } else { Vec::new() };
        config.oci_insecure = true;
        config.instance_path.splice(0..0, self.programs.clone());
        config.drain = DRAIN;
        Ok(config)
    }
}

/// Starts export once the file exists.
async fn start_export(export: ExportStart, file: PathBuf, stop: CancellationToken) {
    while !file.exists() {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EXPORT_POLL) => {}
        }
    }
    export.start();
}

/// Where the API is.
fn url(manager: &Manager) -> String {
    format!("http://127.0.0.1:{}", manager.api.port())
}

/// Says a line to whoever watches; a terminal that is gone is no reason to fail.
fn tell(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn text((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

/// The environment as telemetry is to see it: lines for people, and no exporter where nobody said that somebody listens.
fn environment(variables: impl Iterator<Item = (String, String)>) -> Env {
    let mut all: BTreeMap<String, String> = variables.collect();
    all.entry("LOG_FORMAT".to_owned()).or_insert_with(|| "human".to_owned());
    for signal in ["TRACES", "METRICS", "LOGS"] {
        let told = ["OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")];
        if !told.iter().any(|name| all.get(name).is_some_and(|endpoint| !endpoint.is_empty())) {
            all.entry(format!("OTEL_{signal}_EXPORTER")).or_insert_with(|| "none".to_owned());
        }
    }
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_exported_unless_somebody_listens() {
        let exporters = |variables: &[(&str, &str)]| {
            let env = environment(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
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
