//! The machine that instances run on, shared by all managers, with the fencing of the process backend: each instance's directory is
//! locked by one manager at a time and remembers the latest order, also once the instance is gone.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use gauntlet_domain::{
    Additional, ChallengeId, Error, Identity, LaunchPlan, LaunchRequest, Outputs, Pinned, Placement, PortSpec,
    PreparedScenario, ProvisionedInstance, Provisioner, Result, Scenarios,
};
use tokio::time::sleep;

use super::{
    coverage::{Event, Fault, Step},
    process::Process,
    world::{State, World},
};

const PATIENCE: Duration = Duration::from_secs(10);

type Key = (ChallengeId, Identity);

/// What the directories hold.
#[derive(Default)]
pub struct Homes {
    homes: BTreeMap<Key, Home>,
    locks: u64,
}

/// One directory.
#[derive(Debug, Default)]
struct Home {
    generation: u64,
    there: bool,
    /// What runs: the digest and the values it was rendered with.
    running: Option<Content>,
    /// The number of the lock, and the life of the manager that has it.
    locked: Option<(u64, u64)>,
}

/// What an instance was rendered from.
pub type Content = (String, Additional);

impl Homes {
    /// Ends the locks of a life that has ended.
    pub fn free(&mut self, life: u64) {
        for home in self.homes.values_mut() {
            if home.locked.is_some_and(|(_, by)| by == life) {
                home.locked = None;
            }
        }
    }

    /// What is there, running or not.
    pub fn there(&self) -> impl Iterator<Item = (&ChallengeId, &Identity, Option<&Content>)> {
        self.homes.iter().filter(|(_, home)| home.there).map(|((c, i), home)| (c, i, home.running.as_ref()))
    }

    /// Ends one running instance by itself.
    pub fn end(&mut self, nth: u64) -> Option<Identity> {
        let count = self.homes.values().filter(|home| home.running.is_some()).count() as u64;
        let nth = usize::try_from(nth.checked_rem(count)?).unwrap();
        let ((_, identity), home) = self.homes.iter_mut().filter(|(_, home)| home.running.is_some()).nth(nth)?;
        home.running = None;
        Some(identity.clone())
    }
}

/// A directory's lock.
struct Lock {
    world: Arc<World>,
    key: Key,
    number: u64,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(home) = self.world.lock().homes.homes.get_mut(&self.key)
            && home.locked.is_some_and(|(number, _)| number == self.number)
        {
            home.locked = None;
        }
    }
}

/// One manager's provisioner.
pub struct Machine(pub Arc<Process>);

impl Machine {
    /// Locks a directory and records the order; what is older than the order recorded is refused.
    async fn enter(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<Arc<Lock>> {
        let (process, world) = (&self.0, &self.0.world);
        let key = (challenge.clone(), identity.clone());
        let began = world.now();
        loop {
            process.gate().await;
            let locked = {
                let now = world.now();
                let mut state = world.lock();
                let number = state.homes.locks + 1;
                let home = state.homes.homes.entry(key.clone()).or_default();
                if home.locked.is_none() {
                    if home.generation > generation {
                        let there = home.generation;
                        state.count(Event::StaleOrder);
                        state.note(
                            now,
                            &process.name,
                            format_args!("order {generation} on {identity} refused ({there})"),
                        );
                        return Err(Error::Fenced(format!("instance {identity}: {generation} is older than {there}")));
                    }
                    home.locked = Some((number, process.life));
                    state.homes.locks = number;
                    Some(Arc::new(Lock { world: world.clone(), key: key.clone(), number }))
                } else {
                    None
                }
            };
            if let Some(lock) = locked {
                self.step(&lock, Step::Order, move |home| home.generation = generation).await?;
                return Ok(lock);
            }
            if world.now() - began > PATIENCE {
                return Err(Error::Busy { what: format!("directory of {identity}"), waited_ms: 10_000, ahead: 1 });
            }
            sleep(Duration::from_millis(40)).await;
        }
    }

    /// One step of work on a locked directory, which is done to its end also if its caller goes away.
    async fn step(&self, lock: &Arc<Lock>, what: Step, change: impl FnOnce(&mut Home) + Send + 'static) -> Result<()> {
        let (process, lock) = (self.0.clone(), lock.clone());
        let step = tokio::spawn(async move {
            let world = &process.world;
            let (pause, fault) = {
                let mut state = world.lock();
                let fault = state.fault(what);
                if let Some(fault) = fault {
                    state.note(world.now(), &process.name, format_args!("{fault:?} at {what:?} {}", lock.key.1));
                }
                (state.latency(), fault)
            };
            let failed = || Err(Error::Provision { step: what.name(), detail: "injected".to_owned() });
            let long = Duration::from_millis(world.between(500, 25_000));
            match fault {
                Some(Fault::ErrorBefore) => return failed(),
                Some(Fault::AbortBefore) => process.kill("before a step on the machine"),
                Some(Fault::HangBefore) => process.freeze(long, "before a step on the machine"),
                _ => {}
            }
            sleep(pause).await;
            process.gate().await;
            {
                let now = world.now();
                let mut state = world.lock();
                let State { homes, checks, .. } = &mut *state;
                let home = homes.homes.entry(lock.key.clone()).or_default();
                let ran = home.running.is_some();
                change(home);
                let (started, generation) = (home.running.is_some() && !ran, home.generation);
                let checked = if started { checks.started(homes, &lock.key.0, &lock.key.1) } else { Ok(()) };
                state.note(now, &process.name, format_args!("{what:?} {} by order {generation}", lock.key.1));
                drop(state);
                world.check(checked);
            }
            match fault {
                Some(Fault::LostAnswer) => return failed(),
                Some(Fault::AbortAfter) => process.kill("after a step on the machine"),
                Some(Fault::HangAfter) => process.freeze(long, "after a step on the machine"),
                _ => {}
            }
            process.gate().await;
            Ok(())
        });
        step.await.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
    }

    async fn bring(&self, request: &LaunchRequest, replace: bool) -> Result<Outputs> {
        let lock = self.enter(&request.challenge, &request.identity, request.generation).await?;
        let content = (request.plan.command.concat(), request.plan.env.clone());
        let runs = {
            let mut state = self.0.world.lock();
            state.homes.homes.entry(lock.key.clone()).or_default().running.is_some()
        };
        if replace || !runs {
            self.step(&lock, Step::Stop, |home| home.running = None).await?;
            self.step(&lock, Step::Start, move |home| (home.there, home.running) = (true, Some(content))).await?;
        }
        let ready = self.0.world.between(20, 1500);
        sleep(Duration::from_millis(ready)).await;
        self.0.gate().await;
        let never = {
            let mut state = self.0.world.lock();
            state.faulty && rand::RngExt::random_ratio(&mut state.rng, 1, 25)
        };
        if never {
            self.0.world.lock().count(Event::NeverReady);
            self.step(&lock, Step::Stop, |home| home.running = None).await?;
            return Err(Error::Provision { step: "ready", detail: "injected: never ready".to_owned() });
        }
        Ok(Outputs { connection_info: request.identity.to_string(), flags: vec![request.identity.to_string()] })
    }
}

#[async_trait]
impl Provisioner for Machine {
    fn name(&self) -> &'static str {
        "simulated"
    }

    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        _: &[PortSpec],
    ) -> Result<Placement> {
        let lock = self.enter(challenge, identity, generation).await?;
        self.step(&lock, Step::Allocate, |home| home.there = true).await?;
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.bring(request, false).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.bring(request, true).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let lock = self.enter(challenge, identity, generation).await?;
        self.step(&lock, Step::Stop, |home| home.running = None).await?;
        self.step(&lock, Step::TakeDown, |home| home.there = false).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        self.0.gate().await;
        let state = self.0.world.lock();
        let there = state.homes.homes.iter().filter(|(_, home)| home.there);
        Ok(there
            .map(|((challenge, identity), home)| ProvisionedInstance {
                challenge: challenge.clone(),
                identity: identity.clone(),
                generation: home.generation,
                alive: home.running.is_some(),
            })
            .collect())
    }
}

/// Scenarios whose digest is their reference.
pub struct Catalogue;

#[async_trait]
impl Scenarios for Catalogue {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        Ok(Pinned { reference: reference.to_owned(), digest: reference.to_owned() })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, prepared: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        let command = vec![prepared.scenario.digest.clone()];
        Ok(LaunchPlan { command, env: prepared.additional.clone(), ..LaunchPlan::default() })
    }
}
