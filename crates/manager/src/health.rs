//! Whether the manager can serve: asked of the store, told over grpc.health.v1 and `/healthcheck`.

use std::{sync::Arc, time::Duration};

use gauntlet_api::v1::{
    challenge::challenge_store_server::ChallengeStoreServer, instance::instance_manager_server::InstanceManagerServer,
};
use gauntlet_domain::{Error, Store};
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{claimed::Claimed, grpc::Handlers, rest::Health, tasks::Tasks};

/// Between two questions.
const EVERY: Duration = Duration::from_secs(2);
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// Asks the store every two seconds, and once before this answers, until the tasks stop; then health is `Stopping` at once.
pub(crate) async fn watch(
    tasks: &Tasks,
    store: Arc<dyn Store>,
    instances: Arc<Claimed>,
    reporter: HealthReporter,
) -> watch::Receiver<Health> {
    let (sender, receiver) = watch::channel(Health::Starting);
    tell(&reporter, &sender, ask(store.as_ref(), &instances).await).await;
    tasks.background("health", |stop| async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(EVERY) => {
                    tell(&reporter, &sender, ask(store.as_ref(), &instances).await).await;
                }
            }
        }
        tell(&reporter, &sender, Health::Stopping).await;
    });
    receiver
}

async fn ask(store: &dyn Store, instances: &Claimed) -> Health {
    let asked = async {
        store.ping().await?;
        instances.claim().await
    };
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(())) => Health::Serving,
        Ok(Err(error @ Error::Provision { .. })) => {
            tracing::error!(%error, "the data directory cannot be used");
            Health::Failing { why: "its data directory cannot be used".to_owned() }
        }
        Ok(Err(_)) | Err(_) => Health::Failing { why: format!("{} does not answer", store.backend()) },
    }
}

async fn tell(reporter: &HealthReporter, sender: &watch::Sender<Health>, health: Health) {
    let serving = if health == Health::Serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", ChallengeStoreServer::<Handlers>::NAME, InstanceManagerServer::<Handlers>::NAME] {
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
            Health::Failing { why } => tracing::error!(why, "cannot serve: calls fail"),
            other => tracing::info!(health = ?other, "health changed"),
        }
    }
}
