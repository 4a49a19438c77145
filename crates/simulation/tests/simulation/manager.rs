//! One life of a manager: the use cases over a coordination of its own, and background tasks.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use gauntlet_coordination::Coordination;
use gauntlet_domain::{Call, ChallengeId, Entropy, Error, Gauntlet, Layered, Settings};
use gauntlet_testing::fakes::IgnoredFacts;
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::SmallRng};
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

use super::{
    PREFIX,
    coverage::Event,
    machine::{Catalogue, Machine},
    network::Client,
    observer::ObservedLocks,
    process::Process,
    world::World,
};

pub const LEASE: Duration = Duration::from_secs(10);
const RECONCILE: Duration = Duration::from_secs(4);

pub struct Manager {
    pub process: Arc<Process>,
    pub gauntlet: Gauntlet,
    pub store: Arc<Coordination<Client>>,
    chance: Arc<Chance>,
    reconcile: Notify,
    pools: mpsc::UnboundedSender<ChallengeId>,
}

struct Chance(Mutex<SmallRng>);

impl Entropy for Chance {
    fn next_u64(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next_u64()
    }
}

impl Manager {
    pub fn start(world: &Arc<World>, name: &str, life: u64) -> Arc<Self> {
        let process = Process::new(world, name, life);
        let (store, background) =
            Coordination::with_background(Client(process.clone()), PREFIX, LEASE, name.to_owned());
        tokio::spawn(process.clone().run_while_running(background));
        let settings = Settings {
            lock_timeout: Duration::from_secs(8),
            concurrency: 4,
            retry_initial_delay: Duration::from_secs(1),
            retry_max_delay: Duration::from_secs(10),
            ..Settings::default()
        };
        let machine = Arc::new(Machine(process.clone()));
        let store = Arc::new(store);
        let observed = Arc::new(Layered::new(ObservedLocks(process.clone()), store.clone()));
        let gauntlet = Gauntlet::new(observed, machine, Arc::new(Catalogue), Arc::new(IgnoredFacts), settings);
        let seed = world.lock().rng.random();
        let (pools, mut pool_requests) = mpsc::unbounded_channel();
        let manager = Arc::new(Self {
            process,
            gauntlet,
            store,
            chance: Arc::new(Chance(Mutex::new(SmallRng::seed_from_u64(seed)))),
            reconcile: Notify::new(),
            pools,
        });
        world.log(name, format_args!("starts, life {life}"));
        let reconciler = manager.clone();
        tokio::spawn(manager.process.clone().run_while_running(async move {
            loop {
                reconciler.process.wait_until_running().await;
                let call = reconciler.call();
                let done = reconciler.gauntlet.reconcile(&call).await;
                for id in done.iter().flat_map(|done| &done.pools) {
                    let _ = reconciler.pools.send(id.clone());
                }
                if let Ok(done) = done
                    && done.recovered + done.resumed + done.restarted + done.orphans_removed + done.failures.len() > 0
                {
                    let failures: Vec<_> = done.failures.iter().map(Error::code).collect();
                    let counts = (done.recovered, done.resumed, done.restarted, done.orphans_removed);
                    let world = &reconciler.process.world;
                    world.log(&reconciler.process.name, format_args!("reconciled {counts:?} {failures:?}"));
                    let coverage = &mut world.lock().coverage;
                    for (event, count) in [
                        (Event::Recovered, done.recovered),
                        (Event::Resumed, done.resumed),
                        (Event::Restarted, done.restarted),
                        (Event::Orphan, done.orphans_removed),
                    ] {
                        coverage.event(event, count as u64);
                    }
                }
                let pause = RECONCILE.mul_f64(reconciler.process.world.between(75, 125) as f64 / 100.0);
                let _ = timeout(pause, reconciler.reconcile.notified()).await;
                // Coalesces bursts of signals.
                sleep(Duration::from_millis(100)).await;
            }
        }));
        let pool_manager = manager.clone();
        tokio::spawn(manager.process.clone().run_while_running(async move {
            while let Some(id) = pool_requests.recv().await {
                pool_manager.process.wait_until_running().await;
                let _ = gauntlet_testing::maintain_pool(&pool_manager.gauntlet, &pool_manager.call(), &id).await;
            }
        }));
        manager
    }

    /// Returns the context of a call made now.
    pub fn call(&self) -> Call {
        Call {
            now: self.process.world.timestamp(),
            traceparent: None,
            entropy: self.chance.clone(),
            clock: self.process.clone(),
        }
    }

    /// Maintains the pool or, after a fault, reconciles, as the manager's operations do after a use case.
    pub fn after<T>(&self, result: &Result<T, Error>, pool: Option<&ChallengeId>) {
        match (result, pool) {
            (Ok(_), Some(id)) => drop(self.pools.send(id.clone())),
            (Err(error), _) if error.is_fault() => self.reconcile.notify_one(),
            _ => {}
        }
    }
}
