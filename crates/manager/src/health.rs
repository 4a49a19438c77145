//! Checks whether the manager can serve, and publishes it over grpc.health.v1 and `/healthcheck`.

use std::{sync::Arc, time::Duration};

use gauntlet_api::{
    extension::sweeper_server::SweeperServer,
    v1::{
        challenge::challenge_store_server::ChallengeStoreServer,
        instance::instance_manager_server::InstanceManagerServer,
    },
};
use gauntlet_domain::{Error, Store};
use tokio::{sync::watch, time::Instant};
use tonic::server::NamedService;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{claimed::Claimed, grpc::Handlers, rest::Health, tasks::Tasks};

/// The pause between two checks.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long a check may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long the manager may stay `Starting` for the first reconcile pass, counted from the first successful check.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the health of the manager depends on.
pub(crate) struct Checks {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) instances: Arc<Claimed>,
    /// Whether the first reconcile pass is complete. Before that, instances of the previous run may be down.
    pub(crate) recovered: watch::Receiver<bool>,
}

/// Checks once, then every [`INTERVAL`] in a task, until the tasks stop; health is `Stopping` from then on.
pub(crate) async fn start(tasks: &Tasks, mut checks: Checks, reporter: HealthReporter) -> watch::Receiver<Health> {
    let (sender, receiver) = watch::channel(Health::Starting);
    let mut first_success = None;
    publish(&reporter, &sender, checks.health(&mut first_success).await).await;
    tasks.spawn("health", |stop| async move {
        loop {
            let recovering = !*checks.recovered.borrow();
            tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = checks.recovered.changed(), if recovering => {}
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let health = tokio::select! {
                () = stop.cancelled() => break,
                health = checks.health(&mut first_success) => health,
            };
            publish(&reporter, &sender, health).await;
        }
        publish(&reporter, &sender, Health::Stopping).await;
    });
    receiver
}

impl Checks {
    /// Checks store and instances. `first_success` keeps the time of the first successful check.
    async fn health(&self, first_success: &mut Option<Instant>) -> Health {
        match check(self.store.as_ref(), &self.instances).await {
            Health::Serving if !*self.recovered.borrow() => {
                let waited = first_success.get_or_insert_with(Instant::now).elapsed();
                if waited < RECOVERY_TIMEOUT { Health::Starting } else { Health::Serving }
            }
            health => health,
        }
    }
}

async fn check(store: &dyn Store, instances: &Claimed) -> Health {
    let check = async {
        store.ping().await?;
        instances.claim().await
    };
    match tokio::time::timeout(TIMEOUT, check).await {
        Ok(Ok(())) => Health::Serving,
        Ok(Err(error @ Error::Provision { .. })) => {
            tracing::error!(%error, "cannot use the data directory");
            Health::Failing { why: "its data directory cannot be used".to_owned() }
        }
        Ok(Err(_)) | Err(_) => Health::Failing { why: format!("{} does not answer", store.backend()) },
    }
}

async fn publish(reporter: &HealthReporter, sender: &watch::Sender<Health>, health: Health) {
    let serving = if health == Health::Serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    let services = [
        "",
        ChallengeStoreServer::<Handlers>::NAME,
        InstanceManagerServer::<Handlers>::NAME,
        SweeperServer::<Handlers>::NAME,
    ];
    for service in services {
        reporter.set_service_status(service, serving).await;
    }
    let changed = sender.send_if_modified(|current| {
        let changed = *current != health;
        if changed {
            *current = health.clone();
        }
        changed
    });
    if changed {
        match health {
            Health::Failing { why } => tracing::error!(why, "unhealthy: calls fail"),
            other => tracing::info!(health = ?other, "health changed"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use std::path::Path;

    use gauntlet_coordination::{Coordination, Embedded};
    use gauntlet_provision::process::{self, Process};
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
        health_server::HealthServer,
    };

    use super::*;
    use crate::backends::Backend;

    async fn on(dir: &Path) -> (Arc<Coordination<Embedded>>, Arc<Claimed>) {
        let store = Arc::new(Coordination::embedded(&dir.join("store"), "replica".into()).await.unwrap());
        let processes = Process::new(process::Config::new(dir.join("instances"))).unwrap();
        let instances = Claimed::new(processes, Backend::Embedded(store.clone()));
        (store, Arc::new(instances))
    }

    /// The status of all services over grpc.health.v1, which must be the same.
    async fn reported<H: tonic_health::pb::health_server::Health>(
        grpc: &mut HealthClient<HealthServer<H>>,
    ) -> ServingStatus {
        let mut statuses = Vec::new();
        for service in ["", "api.v1.challenge.ChallengeStore", "api.v1.instance.InstanceManager", "gauntlet.v1.Sweeper"]
        {
            let request = HealthCheckRequest { service: service.to_owned() };
            statuses.push(grpc.check(request).await.unwrap().into_inner().status());
        }
        statuses.dedup();
        assert_eq!(statuses.len(), 1, "{statuses:?}");
        statuses[0]
    }

    #[tokio::test]
    async fn serves_after_the_recovery_timeout_without_a_reconcile_pass() {
        let dir = tempfile::tempdir().unwrap();
        let (store, instances) = on(dir.path()).await;
        let (_never, recovered) = watch::channel(false);
        let checks = Checks { store, instances, recovered };
        let mut first_success = None;
        assert_eq!(checks.health(&mut first_success).await, Health::Starting);
        assert!(first_success.is_some());
        let mut earlier = Some(Instant::now() - Duration::from_secs(30));
        assert_eq!(checks.health(&mut earlier).await, Health::Serving);
    }

    #[tokio::test]
    async fn serves_once_the_first_reconcile_pass_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let (store, instances) = on(dir.path()).await;
        let (recovered, receiver) = watch::channel(false);
        let (reporter, service) = tonic_health::server::health_reporter();
        let mut grpc = HealthClient::new(service);
        let tasks = Tasks::default();
        let mut health = start(&tasks, Checks { store, instances, recovered: receiver }, reporter).await;
        assert_ne!(*health.borrow(), Health::Serving);
        assert_eq!(reported(&mut grpc).await, ServingStatus::NotServing);
        recovered.send_replace(true);
        let soon = Duration::from_secs(60);
        tokio::time::timeout(soon, health.wait_for(|health| *health == Health::Serving)).await.unwrap().unwrap();
        assert_eq!(reported(&mut grpc).await, ServingStatus::Serving);
        tasks.drain(soon).await;
        assert_eq!(*health.borrow(), Health::Stopping);
        assert_eq!(reported(&mut grpc).await, ServingStatus::NotServing);
    }
}
