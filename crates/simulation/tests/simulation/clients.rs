//! The clients of the managers: players, an administrator and the janitor.

use std::{future::pending, sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Additional, ChallengeId, ChallengeUpdate, Error, Instance, NewChallenge, Result, SourceId, Strategy,
};
use jiff::Timestamp;
use rand::RngExt as _;
use tokio::time::{sleep, timeout};

use super::{Cluster, coverage::Event, manager::Manager, world::World};

/// How long a client waits for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
const SOURCES: [&str; 4] = ["a", "b", "c", "d"];

/// The challenges: id, timeout in seconds, `min` and `max` of the pool.
pub const CHALLENGES: [(&str, Option<u64>, i64, i64); 3] =
    [("plain", Some(30), 0, 0), ("pool", None, 2, 4), ("free", Some(60), 1, 0)];

pub fn id(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

fn source(text: &str) -> SourceId {
    SourceId::new(text).unwrap()
}

/// The outcome of a call.
pub enum Answer<T> {
    Received(Result<T>),
    /// The manager ended, or did not answer in time.
    Lost,
}

/// Calls a use case in a manager, which continues even if the client gives up waiting. `finally` receives whether the call can have no further
/// effect.
async fn call<T: Send + 'static, F>(
    manager: Arc<Manager>,
    what: String,
    work: impl FnOnce(Arc<Manager>) -> F + Send + 'static,
    finally: impl FnOnce(&World, bool) + Send + 'static,
) -> Answer<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
{
    let world = manager.process.world.clone();
    let name = manager.process.name.clone();
    world.lock().count(Event::Operation);
    world.log("client", format_args!("calls {name}: {what}"));
    let (answer, answered) = tokio::sync::oneshot::channel();
    // Breaks the connection of some calls; the manager drops the call at whatever point it has reached.
    let dropped = {
        let mut state = world.lock();
        let drops = state.faulty && state.rng.random_ratio(1, 15);
        drops.then(|| Duration::from_millis(state.rng.random_range(0..2000)))
    };
    tokio::spawn(async move {
        let process = manager.process.clone();
        let gone = async {
            match dropped {
                Some(after) => sleep(after).await,
                None => pending().await,
            }
        };
        let result = tokio::select! {
            biased;
            () = process.ended() => None,
            () = gone => {
                process.world.log(&process.name, "a call is dropped");
                process.world.lock().count(Event::Dropped);
                None
            }
            result = process.clone().run_while_running(async { work(manager).await }) => Some(result),
        };
        finally(
            &process.world,
            result.as_ref().is_some_and(|result| result.as_ref().err().is_none_or(|error| !error.is_fault())),
        );
        let _ = answer.send(result);
    });
    match timeout(CALL_TIMEOUT, answered).await {
        Ok(Ok(Some(result))) => {
            let text = result.as_ref().err().map_or("ok", Error::code);
            world.log("client", format_args!("receives from {name}: {what}: {text}"));
            world.lock().count(if result.is_ok() { Event::Acknowledged } else { Event::Refused });
            Answer::Received(result)
        }
        _ => {
            world.log("client", format_args!("receives nothing from {name}: {what}"));
            world.lock().count(Event::Unanswered);
            Answer::Lost
        }
    }
}

/// Deletes an instance.
pub async fn delete(manager: Arc<Manager>, c: &'static str, s: String) -> Answer<()> {
    delete_instance(manager, c, s, None).await
}

/// Deletes an instance; with `since`, only if it is the expired one that was created then.
async fn delete_instance(manager: Arc<Manager>, c: &'static str, s: String, since: Option<Timestamp>) -> Answer<()> {
    let world = manager.process.world.clone();
    world.lock().checks.begin_delete(c, Some(&s));
    let ending = s.clone();
    call(
        manager,
        format!("delete {c} {s}"),
        move |manager| async move {
            let (call, c, s) = (manager.call(), id(c), source(&s));
            let result = match since {
                None => manager.gauntlet.delete_instance(&call, &c, &s).await,
                Some(since) => manager.gauntlet.delete_expired_instance(&call, &c, &s, since).await.map(drop),
            };
            manager.after(&result, None);
            result
        },
        move |world, sure| world.lock().checks.end_delete(world.now(), c, Some(&ending), sure),
    )
    .await
}

/// Deletes a challenge.
pub async fn delete_challenge(manager: Arc<Manager>, c: &'static str) -> Answer<()> {
    let world = manager.process.world.clone();
    world.lock().checks.begin_delete(c, None);
    call(
        manager,
        format!("delete challenge {c}"),
        move |manager| async move {
            let result = manager.gauntlet.delete_challenge(&manager.call(), &id(c)).await;
            manager.after(&result, None);
            result
        },
        move |world, sure| world.lock().checks.end_delete(world.now(), c, None, sure),
    )
    .await
}

async fn create_challenge(manager: Arc<Manager>, which: usize) {
    let (c, seconds, min, max) = CHALLENGES[which];
    let world = manager.process.world.clone();
    let begun = world.lock().checks.begin_create(world.now(), c, None);
    let new = NewChallenge {
        id: id(c),
        scenario: "v1".to_owned(),
        timeout: seconds.map(Duration::from_secs),
        until: None,
        additional: Additional::new(),
        min,
        max,
    };
    let work = move |manager: Arc<Manager>| async move {
        let result = manager.gauntlet.create_challenge(&manager.call(), new).await;
        manager.after(&result, Some(&id(c)));
        result
    };
    if let Answer::Received(Ok(_)) = call(manager, format!("create challenge {c}"), work, |_, _| {}).await {
        world.lock().checks.acknowledge(begun, c, None);
    }
}

async fn update_challenge(manager: Arc<Manager>, which: usize) {
    let (c, _, min, max) = CHALLENGES[which];
    let world = manager.process.world.clone();
    let strategies = [Strategy::UpdateInPlace, Strategy::BlueGreen, Strategy::Recreate];
    let strategy = strategies[world.between(0, 3) as usize];
    let update = ChallengeUpdate {
        scenario: (!world.chance(3)).then(|| format!("v{}", world.between(1, 9))),
        timeout: world.chance(4).then(|| Some(Duration::from_secs(world.between(20, 60)))),
        min: (min > 0 && world.chance(3)).then(|| world.between(1, 3) as i64),
        max: (max > 0 && world.chance(3)).then(|| world.between(2, 6) as i64),
        additional: world.chance(5).then(|| [("all".to_owned(), world.between(0, 9).to_string())].into()),
        strategy,
        ..ChallengeUpdate::default()
    };
    let what = format!("update {c} {:?} {strategy:?}", update.scenario);
    let work = move |manager: Arc<Manager>| async move {
        let result = manager.gauntlet.update_challenge(&manager.call(), &id(c), update).await;
        manager.after(&result, Some(&id(c)));
        result.map(|_| ())
    };
    call(manager, what, work, |_, _| {}).await;
}

async fn create(manager: Arc<Manager>, c: &'static str, s: &'static str) {
    let world = manager.process.world.clone();
    let begun = world.lock().checks.begin_create(world.now(), c, Some(s));
    let mut own = Additional::new();
    if world.chance(4) {
        own.insert("own".to_owned(), world.between(0, 100).to_string());
    }
    let work = move |manager: Arc<Manager>| async move {
        let result = manager.gauntlet.create_instance(&manager.call(), &id(c), &source(s), own).await;
        manager.after(&result, Some(&id(c)));
        result
    };
    if let Answer::Received(Ok(instance)) = call(manager, format!("create {c} {s}"), work, |_, _| {}).await {
        world.lock().checks.acknowledge(begun, c, Some(s));
        if instance.connection_info != instance.identity.as_str() {
            world.report_violation(format!("1: {c} {s} returns the output of another identity: {instance:?}"));
        }
    }
}

async fn retrieve(manager: Arc<Manager>, c: &'static str, s: &'static str) {
    let world = manager.process.world.clone();
    let guaranteed = |world: &World| world.lock().checks.guaranteed(c, s);
    let before = guaranteed(&world);
    let work = move |manager: Arc<Manager>| async move { manager.gauntlet.retrieve_instance(&id(c), &source(s)).await };
    let answer = call(manager, format!("retrieve {c} {s}"), work, |_, _| {}).await;
    if before.is_some()
        && before == guaranteed(&world)
        && let Answer::Received(Err(error @ (Error::InstanceNotFound(..) | Error::ChallengeNotFound(_)))) = answer
    {
        world.report_violation(format!("5: {c} {s} was acknowledged, and retrieving it fails: {error}"));
    }
}

async fn renew(manager: Arc<Manager>, c: &'static str, s: &'static str) {
    let work = move |manager: Arc<Manager>| async move {
        let result = manager.gauntlet.renew_instance(&manager.call(), &id(c), &source(s)).await;
        manager.after(&result, None);
        result
    };
    call(manager, format!("renew {c} {s}"), work, |_, _| {}).await;
}

/// The calls of the clients in one run, their frequencies and their challenges. Varied mixes reach states that an average run does not.
pub struct Mix {
    pub clients: usize,
    /// The longest pause between two calls, in milliseconds.
    pause: u64,
    /// The relative frequency of each call, in the order of [`client`].
    weights: [u64; 7],
    challenges: Vec<usize>,
    sources: usize,
}

impl Mix {
    pub fn draw(world: &World) -> Self {
        let weights = [45, 17, 10, 12, 7, 4, 5].map(|usual| usual * [0, 1, 1, 4][world.between(0, 4) as usize]);
        let [create, ..] = weights;
        let which = world.between(0, 6) as usize;
        Self {
            clients: world.between(2, 8) as usize,
            pause: [150, 1200][world.between(0, 2) as usize],
            weights: if create == 0 { [45, 17, 10, 12, 7, 4, 5] } else { weights },
            // All challenges, or a single one.
            challenges: if which < CHALLENGES.len() { vec![which] } else { (0..CHALLENGES.len()).collect() },
            sources: world.between(1, SOURCES.len() as u64 + 1) as usize,
        }
    }
}

/// A client that makes random calls until faults end.
pub async fn client(cluster: Arc<Cluster>, mix: Arc<Mix>) {
    let world = cluster.world.clone();
    while world.lock().faulty {
        sleep(Duration::from_millis(world.between(20, mix.pause))).await;
        let manager = cluster.any();
        if manager.process.is_dead() {
            continue;
        }
        let which = mix.challenges[world.between(0, mix.challenges.len() as u64) as usize];
        let (c, s) = (CHALLENGES[which].0, SOURCES[world.between(0, mix.sources as u64) as usize]);
        // Some calls go to a challenge that does not exist.
        let there = world.lock().checks.challenges.contains_key(c);
        if !there && world.chance(3) {
            create_challenge(manager, which).await;
            continue;
        }
        let mut drawn = world.between(0, mix.weights.iter().sum());
        let call = mix.weights.iter().position(|weight| match drawn.checked_sub(*weight) {
            Some(rest) => {
                drawn = rest;
                false
            }
            None => true,
        });
        match call {
            Some(0) => create(manager, c, s).await,
            Some(1) => drop(delete(manager, c, s.to_owned()).await),
            Some(2) => renew(manager, c, s).await,
            Some(3) => retrieve(manager, c, s).await,
            Some(4) => update_challenge(manager, which).await,
            Some(5) => drop(delete_challenge(manager, c).await),
            _ => create_challenge(manager, which).await,
        }
    }
}

/// Deletes expired instances.
pub async fn janitor(cluster: Arc<Cluster>) {
    let world = cluster.world.clone();
    while world.lock().faulty {
        sleep(Duration::from_millis(world.between(3000, 6000))).await;
        let manager = cluster.any();
        let work = |manager: Arc<Manager>| async move {
            manager.gauntlet.query_instances(None).try_collect::<Vec<Instance>>().await
        };
        let Answer::Received(Ok(instances)) = call(manager, "query".to_owned(), work, |_, _| {}).await else {
            continue;
        };
        for instance in instances.into_iter().filter(|instance| instance.is_expired(world.timestamp())) {
            let known = CHALLENGES.iter().find(|(c, ..)| *c == instance.key.challenge.as_str());
            if let (Some((c, ..)), Some(source)) = (known, instance.key.assignment.source()) {
                delete_instance(cluster.any(), c, source.to_string(), Some(instance.since)).await;
            }
        }
    }
}

/// Creates all challenges. Calls may fail; the clients create missing challenges later.
pub async fn prepare(cluster: &Cluster) {
    for which in 0..CHALLENGES.len() {
        create_challenge(cluster.any(), which).await;
    }
}
