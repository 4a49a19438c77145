//! The manager: gRPC, REST and background work over the ports. This is the composition root: what stands behind each port is decided here.

mod backends;
mod call;
mod claimed;
mod config;
mod connections;
mod deadline;
mod ends;
mod errors;
mod eviction;
#[cfg(test)]
mod fixture;
mod gauges;
mod grpc;
mod health;
mod observed;
mod operations;
mod pools;
mod reconciler;
mod rest;
mod server;
mod signals;
mod status;
mod tasks;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use claimed::Claimed;
pub use config::{Config, DebugAddress, Secret};
use connections::Port;
use gauntlet_domain::{Error, Gauntlet, Provisioner as _, Settings, Store};
pub use gauntlet_provision::process::shim::run_if_requested as supervise_if_requested;
use gauntlet_telemetry::Telemetry;
use observed::{CountedFacts, ObservedProvisioner, ObservedScenarios, ObservedStore, SignallingFacts};
use operations::Operations;
use reconciler::Reconciler;
use signals::Signals;
use tasks::Tasks;
use tokio::sync::watch;

/// Why a manager did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A flag or a variable has a value that cannot be used; the text names it and the fix.
    #[error("{0}")]
    Config(Error),
    /// The data directory, the store or a port cannot be used; the text says what to do.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { .. } => Self::Config(error),
            error => Self::Failed(error.into()),
        }
    }
}

/// How long the store may take to give up what this replica owns.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// A running manager. Ends with [`Manager::stop`]; dropping it leaves its tasks to the runtime.
pub struct Manager {
    /// Where the API listens: the port is the chosen one when 0 was asked for.
    pub api: SocketAddr,
    /// Where the debug page listens, if it does.
    pub debug: Option<SocketAddr>,
    config: Config,
    tasks: Tasks,
    backend: backends::Backend,
    instances: Arc<Claimed>,
    health: watch::Receiver<rest::Health>,
}

impl Manager {
    /// Puts everything together and listens. Fails, with what to do about it, if the data directory, the store or a port cannot be had, or if
    /// the data directory holds the instances of another store. An etcd that does not answer is no failure: calls fail until it does.
    pub async fn start(config: Config, telemetry: &Telemetry) -> Result<Self, StartError> {
        let replica = config.replica.clone().unwrap_or_else(backends::replica_name);
        tracing::info!(%replica, dir = %config.dir.display(), etcd = config.etcd_endpoints.join(","), "starting");
        let instruments = telemetry.instruments();
        let tasks = Tasks::default();

        let library = backends::scenarios(&config)?;
        let processes = backends::provisioner(&config)?;
        let backend = backends::store(&config, replica.clone(), instruments).await?;
        let instances = Arc::new(Claimed::new(processes, backend.clone()));
        match instances.claim().await {
            Err(error @ Error::Unavailable { .. }) => tracing::warn!(%error, "calls fail until the store answers"),
            claimed => claimed?,
        }
        let provisioner = ObservedProvisioner::new(instances.clone(), instruments.clone());
        let scenarios = ObservedScenarios::new(Arc::new(library.clone()), instances.name(), instruments.clone());
        let store: Arc<dyn Store> = Arc::new(ObservedStore::new(backend.store(), instruments.clone()));

        let settings = Settings { patience: config.lock_timeout, pool_max: config.pool_max, ..Settings::default() };
        let signals = Signals::default();
        let reconciler = Reconciler::new(signals.clone());
        let facts = SignallingFacts { inner: Arc::new(CountedFacts(instruments.clone())), signals: signals.clone() };
        let facts = Arc::new(facts);
        let gauntlet = Gauntlet::new(store.clone(), Arc::new(provisioner), Arc::new(scenarios), facts, settings);

        gauges::register(telemetry.gauges(), backend.store());
        telemetry.debug().add_panel("locks", backend.waits());
        let who =
            serde_json::json!({ "replica": replica, "store": store.backend(), "version": env!("CARGO_PKG_VERSION") });
        telemetry.debug().panel("manager", move || who.clone());
        let handlers = grpc::Handlers::new(Operations::new(gauntlet.clone(), tasks.clone(), signals.clone()));
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let asked =
            health::Asked { store: backend.store(), instances: instances.clone(), settled: reconciler.settled() };
        let health = health::watch(&tasks, asked, reporter).await;
        let rest = rest::router(handlers.clone()).merge(rest::health::router(health.clone()));
        let port = |name, router| Port {
            name,
            limits: config.limits(),
            router,
            is_exempt: server::is_health_check,
            overloaded: server::overloaded,
            refusals: instruments.server.clone(),
        };
        let router = server::api(handlers, rest, health_service, instruments)?;
        let address = SocketAddr::new(config.bind, config.port);
        let api = server::serve(&tasks, address, port("api", router)).await?;
        let page = match config.debug_address.0 {
            Some(address) => {
                Some(server::serve(&tasks, address, port("debug page", telemetry.debug().router())).await?)
            }
            None => None,
        };
        eviction::start(&tasks, library, backend.store(), config.scenario_keep);
        // Before the first pass looks: what ends between the two is seen by one of them.
        match instances.ends() {
            Ok(watched) => ends::start(&tasks, &gauntlet, &signals, watched),
            Err(error) => tracing::warn!(%error, "instances that end are brought up again by the reconciler alone"),
        }
        signals.pools().start(&tasks, &gauntlet);
        reconciler.start(&tasks, &gauntlet, config.reconcile_every);
        let shown = page.map(|page| format!("http://{page}/"));
        tracing::info!(%api, page = shown, store = store.backend(), "listening");
        Ok(Self { api, debug: page, config, tasks, backend, instances, health })
    }

    /// Waits until health says that it serves: the store answers, and what the run before left has been looked at. Calls are answered before
    /// that, but an instance that is handed out may not run yet. Does not end while the store does not answer.
    pub async fn serving(&self) {
        // Whoever tells health ends with the manager.
        let _ = self.health.clone().wait_for(|health| *health == rest::Health::Serving).await;
    }

    /// Stops listening, lets calls under way end (for as long as the configuration says), and gives up what this replica owns. Instances go
    /// on.
    pub async fn stop(self) {
        tracing::info!(within = ?self.config.drain, "stopping: no new calls, those under way end; a second signal ends at once");
        let left = self.tasks.drain(self.config.drain).await;
        if left > 0 {
            tracing::warn!(left, after = ?self.config.drain, "calls were still under way: what they left is recovered at the next start");
        }
        if tokio::time::timeout(STORE_WITHIN, self.backend.shutdown()).await.is_err() {
            tracing::warn!("the store did not shut down in time: what is owned goes with its lease");
        }
    }

    /// Stops, and ends the instances of this machine too; the next start brings them back. Answers how many were running.
    pub async fn stop_with_instances(self) -> anyhow::Result<usize> {
        let instances = self.instances();
        self.stop().await;
        instances.halt().await
    }

    /// The instances of this machine, which can be ended also while the manager stops.
    pub fn instances(&self) -> Instances {
        Instances(self.instances.clone())
    }
}

/// The instances of one machine.
pub struct Instances(Arc<Claimed>);

impl Instances {
    /// Tells the supervisor of each instance to end it, all at once, and waits until they have; the next start brings them back. Answers how
    /// many were running. A supervisor that has been told goes on if this is dropped.
    pub async fn halt(&self) -> anyhow::Result<usize> {
        Ok(self.0.halt().await?)
    }
}
