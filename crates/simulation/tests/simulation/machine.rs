//! The machine that runs instances, shared by all managers, with the fencing of the process backend: one manager at a time locks an instance's
//! directory, which records the highest generation even after the instance is removed.

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

const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

type Key = (ChallengeId, Identity);

/// All instance directories.
#[derive(Default)]
pub struct Directories {
    by_key: BTreeMap<Key, Directory>,
    locks: u64,
}

/// An instance directory.
#[derive(Debug, Default)]
struct Directory {
    generation: u64,
    exists: bool,
    /// The content of the instance, if it runs.
    running: Option<Content>,
    /// The number of the lock, and the life of the manager that holds it.
    locked: Option<(u64, u64)>,
}

/// The digest and the template values that an instance was rendered from.
pub type Content = (String, Additional);

impl Directories {
    /// Releases the locks of a life that has ended.
    pub fn release_locks(&mut self, life: u64) {
        for directory in self.by_key.values_mut() {
            if directory.locked.is_some_and(|(_, by)| by == life) {
                directory.locked = None;
            }
        }
    }

    /// Returns the instances that have resources, running or not.
    pub fn existing(&self) -> impl Iterator<Item = (&ChallengeId, &Identity, Option<&Content>)> {
        self.by_key
            .iter()
            .filter(|(_, directory)| directory.exists)
            .map(|((c, i), directory)| (c, i, directory.running.as_ref()))
    }

    /// Makes a running instance exit by itself.
    pub fn exit(&mut self, nth: u64) -> Option<Identity> {
        let count = self.by_key.values().filter(|directory| directory.running.is_some()).count() as u64;
        let nth = usize::try_from(nth.checked_rem(count)?).unwrap();
        let ((_, identity), directory) =
            self.by_key.iter_mut().filter(|(_, directory)| directory.running.is_some()).nth(nth)?;
        directory.running = None;
        Some(identity.clone())
    }
}

/// The lock of a directory.
struct Lock {
    world: Arc<World>,
    key: Key,
    number: u64,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(directory) = self.world.lock().directories.by_key.get_mut(&self.key)
            && directory.locked.is_some_and(|(number, _)| number == self.number)
        {
            directory.locked = None;
        }
    }
}

/// The provisioner of one manager.
pub struct Machine(pub Arc<Process>);

impl Machine {
    /// Locks a directory and records the generation. Refuses a generation below the recorded one.
    async fn lock_directory(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<Arc<Lock>> {
        let (process, world) = (&self.0, &self.0.world);
        let key = (challenge.clone(), identity.clone());
        let began = world.now();
        loop {
            process.wait_until_running().await;
            let locked = {
                let now = world.now();
                let mut state = world.lock();
                let number = state.directories.locks + 1;
                let directory = state.directories.by_key.entry(key.clone()).or_default();
                if directory.locked.is_none() {
                    if directory.generation > generation {
                        let there = directory.generation;
                        state.count(Event::StaleGeneration);
                        state.log(
                            now,
                            &process.name,
                            format_args!("generation {generation} for {identity} refused ({there})"),
                        );
                        return Err(Error::Fenced(format!("instance {identity}: {generation} is older than {there}")));
                    }
                    directory.locked = Some((number, process.life));
                    state.directories.locks = number;
                    Some(Arc::new(Lock { world: world.clone(), key: key.clone(), number }))
                } else {
                    None
                }
            };
            if let Some(lock) = locked {
                self.step(&lock, Step::LockDirectory, move |directory| directory.generation = generation).await?;
                return Ok(lock);
            }
            if world.now() - began > LOCK_TIMEOUT {
                return Err(Error::Busy { what: format!("directory of {identity}"), waited_ms: 10_000, ahead: 1 });
            }
            sleep(Duration::from_millis(40)).await;
        }
    }

    /// Runs one step on a locked directory. The step completes even if its caller is dropped.
    async fn step(
        &self,
        lock: &Arc<Lock>,
        what: Step,
        change: impl FnOnce(&mut Directory) + Send + 'static,
    ) -> Result<()> {
        let (process, lock) = (self.0.clone(), lock.clone());
        let step = tokio::spawn(async move {
            let world = &process.world;
            let (pause, fault) = {
                let mut state = world.lock();
                let fault = state.fault(what);
                if let Some(fault) = fault {
                    state.log(world.now(), &process.name, format_args!("{fault:?} at {what:?} {}", lock.key.1));
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
            process.wait_until_running().await;
            {
                let now = world.now();
                let mut state = world.lock();
                let State { directories, checks, .. } = &mut *state;
                let directory = directories.by_key.entry(lock.key.clone()).or_default();
                let ran = directory.running.is_some();
                change(directory);
                let (started, generation) = (directory.running.is_some() && !ran, directory.generation);
                let checked = if started { checks.check_start(directories, &lock.key.0, &lock.key.1) } else { Ok(()) };
                state.log(now, &process.name, format_args!("{what:?} {} by generation {generation}", lock.key.1));
                drop(state);
                world.check(checked);
            }
            match fault {
                Some(Fault::LostAnswer) => return failed(),
                Some(Fault::AbortAfter) => process.kill("after a step on the machine"),
                Some(Fault::HangAfter) => process.freeze(long, "after a step on the machine"),
                _ => {}
            }
            process.wait_until_running().await;
            Ok(())
        });
        step.await.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
    }

    async fn launch(&self, request: &LaunchRequest, replace: bool) -> Result<Outputs> {
        let lock = self.lock_directory(&request.challenge, &request.identity, request.generation).await?;
        let content = (request.plan.command.concat(), request.plan.env.clone());
        let runs = {
            let mut state = self.0.world.lock();
            state.directories.by_key.entry(lock.key.clone()).or_default().running.is_some()
        };
        if replace || !runs {
            self.step(&lock, Step::Stop, |directory| directory.running = None).await?;
            self.step(&lock, Step::Start, move |directory| {
                (directory.exists, directory.running) = (true, Some(content))
            })
            .await?;
        }
        let ready = self.0.world.between(20, 1500);
        sleep(Duration::from_millis(ready)).await;
        self.0.wait_until_running().await;
        let never = {
            let mut state = self.0.world.lock();
            state.faulty && rand::RngExt::random_ratio(&mut state.rng, 1, 25)
        };
        if never {
            self.0.world.lock().count(Event::NeverReady);
            self.step(&lock, Step::Stop, |directory| directory.running = None).await?;
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
        let lock = self.lock_directory(challenge, identity, generation).await?;
        self.step(&lock, Step::Allocate, |directory| directory.exists = true).await?;
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.launch(request, false).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.launch(request, true).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let lock = self.lock_directory(challenge, identity, generation).await?;
        self.step(&lock, Step::Stop, |directory| directory.running = None).await?;
        self.step(&lock, Step::TakeDown, |directory| directory.exists = false).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        self.0.wait_until_running().await;
        let state = self.0.world.lock();
        let there = state.directories.by_key.iter().filter(|(_, directory)| directory.exists);
        Ok(there
            .map(|((challenge, identity), directory)| ProvisionedInstance {
                challenge: challenge.clone(),
                identity: identity.clone(),
                generation: directory.generation,
                alive: directory.running.is_some(),
            })
            .collect())
    }
}

/// Scenarios whose digest equals their reference.
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
        _: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, prepared: &PreparedScenario, _: &Placement) -> Result<LaunchPlan> {
        let command = vec![prepared.scenario.digest.clone()];
        Ok(LaunchPlan { command, env: prepared.additional.clone(), ..LaunchPlan::default() })
    }
}
