//! `gauntlet dev`: manager and janitor in one process, an example challenge or two, a few players, and a live view.

mod players;
mod screen;

use std::{fs::OpenOptions, io::IsTerminal as _, net::Ipv4Addr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use gauntlet_manager::Manager;
use gauntlet_telemetry::{Env, Settings, Telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long the players, the janitor and the screen may take to end.
const END_WITHIN: Duration = Duration::from_secs(10);
/// How often the janitor sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Run everything in this process: manager, janitor, example challenges and players that use them.
///
/// State and instances are kept below --data: the next run goes on with them. Ctrl-C ends every process that was started.
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
    /// The directory of example scenarios: each NAME/scenario is registered as challenge NAME.
    #[arg(long, value_name = "DIR")]
    examples_dir: Option<PathBuf>,
    /// Where the examples' programs are.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// The port of the API.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    port: u16,
    /// The port of the debug page.
    #[arg(long, default_value_t = 8081)]
    debug_port: u16,
    /// Only the manager and the janitor: no example challenge, no players.
    #[arg(long)]
    bare: bool,
    /// A file whose lines are shown beside the live view.
    #[arg(long, env = "GAUNTLET_DEV_NOTICES", hide = true)]
    notices: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// One file.
    Embedded,
    /// A real etcd.
    Etcd,
}

impl Dev {
    /// Runs until SIGINT or SIGTERM.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let live = std::io::stdout().is_terminal();
        std::fs::create_dir_all(&self.data).with_context(|| format!("cannot make {}", self.data.display()))?;
        let log = self.data.join("gauntlet.log");
        let to_log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        if live {
            // The terminal belongs to the live view.
            rustix::stdio::dup2_stderr(&to_log).context("redirect the log")?;
        }
        let settings = Settings::new("gauntlet-manager", env!("CARGO_PKG_VERSION")).with_debug();
        let telemetry = Telemetry::start(&settings, &environment()).map_err(|error| {
            println!("error: {error}");
            error
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(self.serve(&telemetry, live, &log));
        if let Err(error) = telemetry.shutdown() {
            println!("warning: {error}");
        }
        result.map(|()| ExitCode::SUCCESS)
    }

    async fn serve(&self, telemetry: &Telemetry, live: bool, log: &std::path::Path) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let manager = Manager::start(self.manager()?, telemetry).await?;
        let url = format!("http://127.0.0.1:{}", manager.api.port());

        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let janitor = gauntlet_janitor::Config {
            every: Some(SWEEP_EVERY),
            ..gauntlet_janitor::Config::new(url.parse().map_err(anyhow::Error::msg)?)
        };
        let (instruments, ending) = (telemetry.instruments().clone(), stop.clone());
        tasks.spawn(async move {
            if let Err(error) = gauntlet_janitor::run(&janitor, &instruments, ending).await {
                tracing::error!(%error, "the janitor ended");
            }
        });
        let mut hints = vec![format!("the log: {}", log.display())];
        if let (false, Some(examples)) = (self.bare, &self.examples_dir) {
            let challenges = players::register(&url, examples).await?;
            hints.extend(challenges.iter().map(|challenge| format!("registered: challenge {challenge}")));
            tasks.spawn(players::play(url.clone(), challenges, stop.clone()));
        }
        let screen = screen::Screen {
            debug: telemetry.debug().clone(),
            api: url,
            page: manager.debug.map(|address| format!("http://127.0.0.1:{}/", address.port())),
            hints,
            notices: self.notices.clone(),
            live,
        };
        tasks.spawn(screen.show(stop.clone()));

        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.cancel();
        tasks.close();
        let _ = tokio::time::timeout(END_WITHIN, tasks.wait()).await;
        println!("ending: players, janitor, manager, instances; a second Ctrl-C ends at once");
        let data = self.data.clone();
        let ended = async {
            let halted = manager.stop_with_instances().await?;
            println!("ended {halted} instances; {} keeps what is stored", data.display());
            Ok(())
        };
        tokio::select! {
            ended = ended => ended,
            _ = interrupt.recv() => anyhow::bail!("ended at once: instances may still run"),
        }
    }

    fn manager(&self) -> Result<gauntlet_manager::Config> {
        let mut config = gauntlet_manager::Config::from_environment()?;
        config.bind = Ipv4Addr::LOCALHOST.into();
        config.port = self.port;
        config.debug_address = gauntlet_manager::DebugAddress(Some((Ipv4Addr::LOCALHOST, self.debug_port).into()));
        config.dir.clone_from(&self.data);
        config.etcd_endpoints = if self.backend == Backend::Etcd { self.etcd_endpoints.clone() } else { Vec::new() };
        config.oci_insecure = true;
        config.scenario_root =
            self.examples_dir.as_ref().map(std::fs::canonicalize).transpose().context("--examples-dir")?;
        config.instance_path.extend(self.bin_dir.as_ref().map(std::fs::canonicalize).transpose().context("--bin-dir")?);
        config.drain = Duration::from_secs(5);
        Ok(config)
    }
}

fn environment() -> Env {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
