//! The manager: gRPC, REST and background work on top of the use cases. This is the composition root, which chooses the adapter of each port.

mod audit;
mod authorize;
mod backends;
mod call;
mod caller;
mod claimed;
mod config;
mod connections;
mod deadline;
mod eviction;
mod exits;
#[cfg(test)]
mod fixture;
mod gauges;
mod grpc;
mod health;
mod listen;
mod observed;
mod operations;
mod origin;
mod password;
mod peer;
mod pools;
mod reconciler;
mod refusal;
mod registries;
mod report;
mod rest;
mod server;
mod signals;
mod status;
mod tasks;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use authorize::{Authorizer, Credentials};
use axum::Router;
use claimed::Claimed;
pub use config::{AccessConfig, Config, DebugAddress, KeySource, Oidc, Openness};
use connections::Port;
use gauntlet_domain::{Error, Gauntlet, Provisioner as _, Settings};
pub use gauntlet_provision::process::supervisor::run_if_requested as supervise_if_requested;
use gauntlet_telemetry::Telemetry;
use listen::Listener;
use observed::{CountedFacts, ObservedProvisioner, ObservedScenarios, SignallingFacts, observed_store};
use operations::Operations;
use reconciler::Reconciler;
pub use registries::Registries;
#[cfg(feature = "fuzzing")]
pub use rest::fuzzing;
use signals::Signals;
use tasks::Tasks;
use tokio::sync::watch;

/// Why a manager did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A flag or a variable has a value that cannot be used; the text names it and the fix.
    #[error("{0:#}")]
    Config(anyhow::Error),
    /// The data directory, the store or a port cannot be used; the text says what to do.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { .. } => Self::Config(error.into()),
            error => Self::Failed(error.into()),
        }
    }
}

/// How long the store may take to release the locks of this replica at shutdown.
const STORE_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// A running manager. Stop it with [`Manager::stop`]: dropping it leaves its tasks running.
pub struct Manager {
    /// The addresses of the API, in the order of the flags, with the actual port where the configured one is 0. Unix sockets are left out.
    pub api: Vec<SocketAddr>,
    /// The address of the debug page, unless it is off.
    pub debug: Option<SocketAddr>,
    config: Config,
    tasks: Tasks,
    backend: backends::Backend,
    instances: Arc<Claimed>,
    health: watch::Receiver<rest::Health>,
}

impl Manager {
    /// Builds the manager, starts its tasks and listens. If etcd does not respond it starts all the same, and calls fail until etcd does.
    ///
    /// # Errors
    /// The configuration is invalid, the data directory, the store or a port cannot be used, or the data directory holds the instances of
    /// another store.
    pub async fn start(config: Config, telemetry: &Telemetry) -> Result<Self, StartError> {
        let replica = config.replica.clone().unwrap_or_else(backends::replica_name);
        tracing::info!(%replica, dir = %config.dir.display(), etcd = config.etcd_endpoints.join(","), "starting");
        let instruments = telemetry.instruments();
        let tasks = Tasks::default();
        let listeners = config.listeners().map_err(|problem| Error::Invalid { field: "--listen", problem })?;

        let credentials = Arc::new(Credentials::load(&config.access)?);
        let library = backends::scenarios(&config, instruments)?;
        let processes = backends::provisioner(&config)?.with_facts(Arc::new(CountedFacts(instruments.clone())));
        let backend = backends::store(&config, replica.clone(), instruments).await?;
        let instances = Arc::new(Claimed::new(processes, backend.clone()));
        match instances.claim().await {
            Err(error @ Error::Unavailable { .. }) => {
                tracing::warn!(%error, "the store does not respond; calls fail until it does")
            }
            claimed => claimed?,
        }
        let provisioner = ObservedProvisioner::new(instances.clone(), instruments.clone());
        let scenarios = ObservedScenarios::new(Arc::new(library.clone()), instances.name(), instruments.clone());
        let store = observed_store(backend.store(), instruments.clone());

        let settings = Settings { lock_timeout: config.lock_timeout, pool_max: config.pool_max, ..Settings::default() };
        let signals = Signals::default();
        let reconciler = Reconciler::new(signals.clone());
        let facts = SignallingFacts { inner: Arc::new(CountedFacts(instruments.clone())), signals: signals.clone() };
        let facts = Arc::new(facts);
        let gauntlet = Gauntlet::new(store.clone(), Arc::new(provisioner), Arc::new(scenarios), facts, settings);

        gauges::register(telemetry.gauges(), backend.store());
        telemetry.debug().add_panel("locks", backend.waits());
        let about =
            serde_json::json!({ "replica": replica, "store": store.backend(), "version": env!("CARGO_PKG_VERSION") });
        telemetry.debug().add_panel("manager", move || about.clone());
        let bound = listen::bind(&tasks, listeners, config.listen.tls_files()).await?;
        let page = listen::bind_page(config.debug_address.0).await?;
        let handlers =
            grpc::Handlers::new(Operations::new(gauntlet.clone(), tasks.clone(), signals.clone(), config.changes()));
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let checks =
            health::Checks { store: backend.store(), instances: instances.clone(), recovered: reconciler.recovered() };
        let health = health::start(&tasks, checks, reporter).await;
        let rest = rest::router(handlers.clone()).merge(rest::health::router(health.clone()));
        credentials.start(&tasks);
        let openness = (config.access.health_access, config.access.reflection_access);
        let authorizer = Authorizer::new(credentials, openness, config.access.limits(instruments));
        let router = server::api(handlers, rest, health_service, authorizer, instruments)?;
        let port = |name, router: &Router, listener: &Listener| Port {
            name,
            limits: config.limits(),
            policy: listener.policy,
            exposed: listener.is_exposed(),
            router: server::with_cors(router.clone(), &config.listen.allow_origin),
            is_exempt: server::is_health_check,
            refuse: server::refuse,
            origins: config.listen.origins(&listener.endpoint),
            refusals: instruments.server.clone(),
        };
        let mut api = Vec::new();
        for (listener, socket) in bound {
            api.extend(socket.address());
            server::serve(&tasks, socket, port("api", &router, &listener));
        }
        let mut debug = None;
        if let Some((listener, socket)) = page {
            debug = socket.address();
            server::serve(&tasks, socket, port("debug page", &telemetry.debug().router(), &listener));
        }
        eviction::start(&tasks, library, backend.store(), config.scenario_keep);
        // The watch starts before the first reconcile pass: an exit between the two would be missed.
        match instances.exits() {
            Ok(exits) => exits::start(&tasks, &gauntlet, &signals, exits),
            Err(error) => {
                tracing::warn!(%error, "cannot watch for exits of instances; only the reconciler restarts them")
            }
        }
        signals.pools().start(&tasks, &gauntlet);
        reconciler.start(&tasks, &gauntlet, config.reconcile_every);
        let page_url = debug.map(|page| format!("http://{page}/"));
        tracing::info!(page = page_url, store = store.backend(), "serving");
        Ok(Self { api, debug, config, tasks, backend, instances, health })
    }

    /// Waits until the manager is healthy: the store responds and the first reconcile pass is complete. It serves calls before that, but instances
    /// of the previous run may be down. Doesn't return while the store does not respond.
    pub async fn serving(&self) {
        // Fails only if the health task has ended, as it does at shutdown.
        let _ = self.health.clone().wait_for(|health| *health == rest::Health::Serving).await;
    }

    /// Stops listening, waits for running calls for the configured time, and releases the locks of this replica. Instances keep running.
    pub async fn stop(self) {
        tracing::info!(within = ?self.config.drain, "stopping: waiting for running calls to finish; a second signal exits at once");
        let running = self.tasks.drain(self.config.drain).await;
        if running > 0 {
            tracing::warn!(left = running, after = ?self.config.drain, "calls were still running; recovery finishes their work at the next start");
        }
        if tokio::time::timeout(STORE_SHUTDOWN_TIMEOUT, self.backend.shutdown()).await.is_err() {
            tracing::warn!(
                "the store did not shut down in time; the locks of this replica are released when its lease expires"
            );
        }
    }

    /// Stops the manager and the instances of this machine, and returns how many were running. The next start restarts them.
    pub async fn stop_with_instances(self) -> anyhow::Result<usize> {
        let instances = self.instances();
        self.stop().await;
        instances.halt().await
    }

    /// The instances of this machine, to be stopped also while [`Manager::stop`] runs.
    pub fn instances(&self) -> Instances {
        Instances(self.instances.clone())
    }
}

/// The instances of one machine, whose supervisors outlive the manager.
pub struct Instances(Arc<Claimed>);

impl Instances {
    /// Stops all instances concurrently, waits until they have exited, and returns how many were running. The next start restarts them.
    ///
    /// # Cancel safety
    /// If the future is dropped, the supervisors that have been told continue to stop their instances.
    pub async fn halt(&self) -> anyhow::Result<usize> {
        Ok(self.0.halt().await?)
    }
}
