//! Whether the manager can serve: asked of the store, told over grpc.health.v1 and `/healthcheck`.

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

/// Between two questions.
const EVERY: Duration = Duration::from_secs(2);
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// After a start: how long health waits, once the store answers, for the first look at what the run before left.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);

/// Whom to ask.
pub(crate) struct Asked {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) instances: Arc<Claimed>,
    /// Whether the first reconcile pass is over: before it, what is handed out may not run.
    pub(crate) settled: watch::Receiver<bool>,
}

/// Asks every two seconds, and once before this answers, until the tasks stop; then health is `Stopping` at once.
pub(crate) async fn watch(tasks: &Tasks, mut asked: Asked, reporter: HealthReporter) -> watch::Receiver<Health> {
    let (sender, receiver) = watch::channel(Health::Starting);
    let mut answered = None;
    tell(&reporter, &sender, asked.health(&mut answered).await).await;
    tasks.spawn("health", |stop| async move {
        loop {
            let settling = !*asked.settled.borrow();
            tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = asked.settled.changed(), if settling => {}
                () = tokio::time::sleep(EVERY) => {}
            }
            let health = tokio::select! {
                () = stop.cancelled() => break,
                health = asked.health(&mut answered) => health,
            };
            tell(&reporter, &sender, health).await;
        }
        tell(&reporter, &sender, Health::Stopping).await;
    });
    receiver
}

impl Asked {
    /// `answered` is when it was first well.
    async fn health(&self, answered: &mut Option<Instant>) -> Health {
        match ask(self.store.as_ref(), &self.instances).await {
            Health::Serving if !*self.settled.borrow() => {
                let waited = answered.get_or_insert_with(Instant::now).elapsed();
                if waited < SETTLE_WITHIN { Health::Starting } else { Health::Serving }
            }
            health => health,
        }
    }
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
            Health::Failing { why } => tracing::error!(why, "cannot serve: calls fail"),
            other => tracing::info!(health = ?other, "health changed"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use gauntlet_coordination::Coordination;
    use gauntlet_provision::process::{self, Process};

    use super::*;
    use crate::backends::Backend;

    #[tokio::test]
    async fn it_serves_half_a_minute_after_the_store_answered_whatever_the_first_look_comes_to() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap());
        let processes = Process::new(process::Config::new(dir.path().join("instances"))).unwrap();
        let instances = Arc::new(Claimed::new(processes, Backend::Embedded(store.clone())));
        let (_never, settled) = watch::channel(false);
        let asked = Asked { store, instances, settled };
        let mut answered = None;
        assert_eq!(asked.health(&mut answered).await, Health::Starting);
        assert!(answered.is_some());
        let mut before = Some(Instant::now() - Duration::from_secs(30));
        assert_eq!(asked.health(&mut before).await, Health::Serving);
    }

    #[tokio::test]
    async fn it_serves_once_what_is_left_has_been_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap());
        let processes = Process::new(process::Config::new(dir.path().join("instances"))).unwrap();
        let instances = Arc::new(Claimed::new(processes, Backend::Embedded(store.clone())));
        let (settled, receiver) = watch::channel(false);
        let (reporter, _service) = tonic_health::server::health_reporter();
        let tasks = Tasks::default();
        let mut health = super::watch(&tasks, Asked { store, instances, settled: receiver }, reporter).await;
        assert_ne!(*health.borrow(), Health::Serving);
        settled.send_replace(true);
        let soon = Duration::from_secs(60);
        tokio::time::timeout(soon, health.wait_for(|health| *health == Health::Serving)).await.unwrap().unwrap();
        tasks.drain(soon).await;
        assert_eq!(*health.borrow(), Health::Stopping);
    }
}
