//! Three managers and three etcd members under load, with one fault after another. Each round ends with a comparison of the acknowledged
//! operations, the store and the running processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use gauntlet_stack::process::spawn_bound;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use rustix::process::Signal;
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use super::{
    cluster::{Cluster, LEASE_TTL, NetworkMode, log_length, log_since},
    load::{Client, Driver, Kind, Ledger, Reply, StopOnDrop, Updater, Violation, create_and_delete_challenges, race},
    network::Side,
    scenario::{Gate, gated_scenario, quick_scenario},
};
use crate::harness::{Backend, Manager, POLL, SOON, World};

/// The minutes that the storm lasts, unless SIGINT ends it. Without this variable it runs the rounds of [`Fault::IN_CI`].
const MINUTES: &str = "GAUNTLET_FAULTS_MINUTES";
/// The seed for the choice of faults.
const SEED: &str = "GAUNTLET_FAULTS_SEED";
/// The names of the faults to inject, separated by commas. Without [`MINUTES`], one round injects each of them.
const ONLY: &str = "GAUNTLET_FAULTS_ONLY";

const STORM: &str = "faults::storm::random_faults_lose_duplicate_and_leak_nothing";
const MANAGERS: usize = 3;
const MEMBERS: usize = 3;
/// Clients that use all managers in turn. In addition, each manager has a client of its own.
const ROAMING: usize = 2;
/// How long clients run before the first fault and after the last one.
const LOAD_PERIOD: Duration = Duration::from_millis(1200);
/// The duration of pauses and partitions, longer than a lease.
const FAULT_DURATION: Duration = Duration::from_millis(LEASE_TTL.as_millis() as u64 + 1000);
/// The challenges that exist until the end.
const PERMANENT_CHALLENGES: [&str; 4] = ["plain", "pooled", "shifting", "gated"];

/// An injected fault. The names are used by `cargo xtask faults --only` and in the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// Killed with SIGKILL and restarted.
    ManagerKilled,
    /// Paused for longer than its lease while it provisions an instance.
    ManagerPaused,
    /// Killed with SIGKILL and restarted.
    LeaderKilled,
    FollowerKilled,
    /// Paused for longer than a lease.
    LeaderPaused,
    FollowerPaused,
    /// Partitioned from its peers while it leads. Clients still reach it.
    LeaderCutFromPeers,
    /// Partitioned from clients. Peers still reach it.
    MemberCutFromClients,
    /// Partitioned from peers and clients.
    MemberCutOff,
}

impl Fault {
    const ALL: [Fault; 9] = [
        Fault::ManagerKilled,
        Fault::ManagerPaused,
        Fault::LeaderKilled,
        Fault::FollowerKilled,
        Fault::LeaderPaused,
        Fault::FollowerPaused,
        Fault::LeaderCutFromPeers,
        Fault::MemberCutFromClients,
        Fault::MemberCutOff,
    ];
    /// The rounds that CI runs.
    const IN_CI: [&[Fault]; 4] = [
        &[Fault::ManagerKilled, Fault::ManagerPaused],
        &[Fault::FollowerKilled, Fault::LeaderKilled],
        &[Fault::LeaderPaused],
        &[Fault::LeaderCutFromPeers, Fault::MemberCutFromClients],
    ];

    /// Parses a list of names separated by commas. An empty list means all faults.
    fn parse_list(names: &str) -> Vec<Fault> {
        let name = |name: &str| {
            let fault = Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == name);
            fault.unwrap_or_else(|| panic!("{name:?} is not a fault; use one of {:?}", Fault::ALL))
        };
        if names.is_empty() { Fault::ALL.to_vec() } else { names.split(',').map(name).collect() }
    }

    /// Returns the fault to inject instead if members cannot be partitioned.
    fn without_network(self) -> Fault {
        match self {
            Fault::LeaderCutFromPeers => Fault::LeaderPaused,
            Fault::MemberCutFromClients | Fault::MemberCutOff => Fault::FollowerPaused,
            other => other,
        }
    }
}

struct Storm {
    cluster: Cluster,
    ledger: Ledger,
    urls: Vec<String>,
    drivers: Vec<Driver>,
    updater: Updater,
    rng: SmallRng,
    injected: BTreeMap<Fault, usize>,
    /// The faults that this machine does not support.
    skipped: BTreeSet<Fault>,
    /// How often a manager was paused during an operation.
    pauses: usize,
    /// How often the commit after such a pause was rejected.
    rejected_commits: usize,
    rounds: usize,
    started: Instant,
}

impl Storm {
    fn new(seed: u64) -> Storm {
        let started = Instant::now();
        // A call to an unreachable member fails early, so the client soon continues.
        let environment = [("ETCD_DEADLINE", "1500ms")];
        let cluster =
            Cluster::start(MEMBERS, &NetworkMode::Namespaces, &[]).with_managers_and_env(MANAGERS, &environment);
        let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
        let known = (0..ROAMING).map(|_| &urls[..]).chain(urls.iter().map(std::slice::from_ref)).enumerate();
        let drivers = known.map(|(at, known)| Driver::new(&format!("driver-{at}"), known, seed + at as u64)).collect();
        let manager = &cluster.managers[0];
        manager.create_challenge("plain", &quick_scenario(), &json!({ "timeout": "600s" }));
        manager.create_challenge("pooled", &quick_scenario(), &json!({ "timeout": "600s", "min": "2", "max": "20" }));
        manager.create_challenge("shifting", &quick_scenario(), &json!({ "additional": { "motd": "none" } }));
        manager.create_challenge("gated", &gated_scenario(), &json!({}));
        for source in ["a", "b"] {
            manager.create_instance("shifting", source).ok();
        }
        Storm {
            updater: Updater::new(&urls),
            rng: SmallRng::seed_from_u64(seed),
            ledger: Ledger::default(),
            injected: BTreeMap::new(),
            skipped: BTreeSet::new(),
            pauses: 0,
            rejected_commits: 0,
            rounds: 0,
            cluster,
            urls,
            drivers,
            started,
        }
    }

    /// Runs clients, injects the faults, waits until the cluster settles, and then checks every guarantee.
    fn run_round(&mut self, faults: &[Fault], interrupted: &AtomicBool) {
        let Storm {
            cluster,
            ledger,
            urls,
            drivers,
            updater,
            rng,
            injected,
            skipped,
            pauses,
            rejected_commits,
            rounds,
            started,
        } = self;
        *rounds += 1;
        let round = *rounds;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (ledger, stop, urls) = (&*ledger, &stop, &*urls);
            // Stops the clients even if a fault panics.
            let stop_on_drop = StopOnDrop(stop);
            for driver in &mut *drivers {
                scope.spawn(move || driver.drive(ledger, stop));
            }
            scope.spawn(|| updater.drive(ledger, stop));
            scope.spawn(move || race(urls, ledger, stop, round));
            scope.spawn(move || create_and_delete_challenges(urls, ledger, stop, round));
            std::thread::sleep(LOAD_PERIOD);
            for planned in faults {
                if interrupted.load(Ordering::Relaxed) {
                    break;
                }
                let fault = if cluster.network.is_ok() { *planned } else { planned.without_network() };
                if fault != *planned {
                    skipped.insert(*planned);
                }
                eprintln!("{:6.1} s, round {round}: {fault:?}", started.elapsed().as_secs_f64());
                *injected.entry(fault).or_default() += 1;
                if fault == Fault::ManagerPaused {
                    *pauses += 1;
                    match pause_manager(cluster, rng.random_range(0..MANAGERS), round) {
                        Ok(()) => *rejected_commits += 1,
                        Err(why) => ledger.report(Kind::Unexpected, format_args!("pause of a manager: {why}")),
                    }
                } else {
                    inject(cluster, fault, rng);
                }
            }
            std::thread::sleep(LOAD_PERIOD);
            drop(stop_on_drop);
        });
        let census = match self.cluster.settle() {
            Ok(census) => census,
            Err(Violation(kind, what)) => {
                self.cluster.print_diagnostics();
                return self.ledger.report(kind, what);
            }
        };
        for driver in &self.drivers {
            driver.verify(&self.ledger, &self.urls);
        }
        self.updater.verify(&self.ledger);
        for instance in self.drivers.iter().flat_map(Driver::expected_keys) {
            if !census.contains_key(&instance) {
                self.ledger.report(Kind::Lost, format_args!("{instance}: acknowledged, but not stored"));
            }
        }
        self.delete_unexpected(census.keys());
        eprintln!(
            "{:6.1} s, round {round}: settled with {} instances; {} operations acknowledged so far",
            self.started.elapsed().as_secs_f64(),
            census.len(),
            self.ledger.acknowledged()
        );
    }

    /// Deletes the instances and challenges that no client expects, because the outcome of a call was unknown.
    fn delete_unexpected<'a>(&mut self, instances: impl Iterator<Item = &'a String>) {
        let expected: Vec<String> = self.drivers.iter().flat_map(Driver::expected_keys).collect();
        let mut client = Client::new(&self.urls, 0);
        for instance in instances {
            let Some((challenge, source)) = instance.split_once(" s ") else { continue };
            if challenge != "shifting" && PERMANENT_CHALLENGES.contains(&challenge) && !expected.contains(instance) {
                self.delete(&mut client, &format!("/api/v1/instance/{challenge}/{source}"));
            }
        }
        match self.cluster.stored("challenges") {
            Ok(challenges) => {
                for (key, _) in challenges {
                    let id = key.trim_start_matches("gauntlet/challenges ");
                    if !PERMANENT_CHALLENGES.contains(&id) {
                        self.delete(&mut client, &format!("/api/v1/challenge/{id}"));
                    }
                }
            }
            Err(why) => self.ledger.report(Kind::Unexpected, why),
        }
    }

    fn delete(&self, client: &mut Client, path: &str) {
        match client.call_until_available("DELETE", path, &Value::Null) {
            Ok((200 | 404, _)) => {}
            Ok((status, body)) => self.ledger.report(Kind::Unexpected, format_args!("{path}: {status} {body}")),
            Err(why) => self.ledger.report(Kind::Unexpected, format_args!("{path}: {why}")),
        }
    }

    /// Deletes everything, checks that nothing is left, and prints the report.
    fn finish(mut self) {
        if self.ledger.has_no_violations() {
            let mut client = Client::new(&self.urls, 0);
            for id in PERMANENT_CHALLENGES {
                self.delete(&mut client, &format!("/api/v1/challenge/{id}"));
            }
            match self.cluster.settle() {
                Ok(census) if census.is_empty() => {}
                Ok(census) => {
                    self.ledger.report(Kind::Orphan, format_args!("left after everything was deleted: {census:?}"))
                }
                Err(Violation(kind, what)) => self.ledger.report(kind, what),
            }
        }
        for manager in &mut self.cluster.managers {
            if !manager.process.is_running() {
                self.ledger.report(Kind::Unexpected, format_args!("{} has exited unexpectedly", manager.url));
            }
        }
        println!("{self}");
        self.ledger.assert_no_violations();
        assert_eq!(self.pauses, self.rejected_commits, "a commit after a pause was not rejected");
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, seconds) = (self.injected.values().sum::<usize>(), self.started.elapsed().as_secs_f64());
        writeln!(f, "faults: {all} injected in {} rounds, {seconds:.0} s", self.rounds)?;
        for (fault, times) in &self.injected {
            writeln!(f, "  {:<22} {times:>5}", format!("{fault:?}"))?;
        }
        match &self.cluster.network {
            Ok(_) => writeln!(f, "partitions: with network namespaces")?,
            Err(why) if self.skipped.is_empty() => writeln!(f, "partitions: none ({why})")?,
            Err(why) => writeln!(f, "partitions: none ({why}): {:?} left out, members stopped instead", self.skipped)?,
        }
        writeln!(f, "{}", self.ledger)?;
        write!(
            f,
            "managers paused during an operation: {}; late commits rejected: {}",
            self.pauses, self.rejected_commits
        )
    }
}

fn inject(cluster: &mut Cluster, fault: Fault, rng: &mut SmallRng) {
    let random_member = rng.random_range(0..MEMBERS);
    match fault {
        Fault::ManagerKilled => {
            let process = &mut cluster.managers[rng.random_range(0..MANAGERS)].process;
            process.kill().unwrap();
            process.start().unwrap();
        }
        Fault::ManagerPaused => {}
        Fault::LeaderKilled | Fault::FollowerKilled => {
            let at = if fault == Fault::LeaderKilled { cluster.leader() } else { cluster.follower() };
            let process = &mut cluster.members[at].process;
            process.kill().unwrap();
            std::thread::sleep(LOAD_PERIOD);
            process.start().unwrap();
        }
        Fault::LeaderPaused | Fault::FollowerPaused => {
            let at = if fault == Fault::LeaderPaused { cluster.leader() } else { cluster.follower() };
            cluster.members[at].process.signal(Signal::STOP);
            std::thread::sleep(FAULT_DURATION);
            cluster.members[at].process.signal(Signal::CONT);
        }
        Fault::LeaderCutFromPeers | Fault::MemberCutFromClients | Fault::MemberCutOff => {
            let (at, sides) = match fault {
                Fault::LeaderCutFromPeers => (cluster.leader(), &Side::BOTH[1..]),
                Fault::MemberCutFromClients => (random_member, &Side::BOTH[..1]),
                _ => (random_member, &Side::BOTH[..]),
            };
            // `Fault::without_network` replaces these faults if there is no network.
            let Ok(network) = &cluster.network else { return };
            sides.iter().for_each(|side| network.disconnect(at, *side));
            std::thread::sleep(FAULT_DURATION);
            sides.iter().for_each(|side| network.reconnect(at, *side));
        }
    }
}

/// A paused manager; continues it when dropped.
struct Paused<'a>(&'a Manager);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.process.signal(Signal::CONT);
    }
}

/// Pauses a manager while it provisions an instance, until another manager owns the instance. Then the first manager's commit must be
/// rejected, its caller must get FENCED, and the other manager must finish the instance.
///
/// # Errors
/// The expectation that was not met.
fn pause_manager(cluster: &Cluster, victim: usize, round: usize) -> Result<(), String> {
    let (manager, name) = (&cluster.managers[victim], format!("m{}", victim + 1));
    let new = |manager: &Manager| Client::new(std::slice::from_ref(&manager.url), 0);
    let gate = Gate::of(&cluster.world);
    let (source, answer) = std::thread::scope(|scope| {
        let closed = gate.close();
        let mut tries = 0;
        // During an election a call may fail before it starts any work. Such a call proves nothing, so try another.
        let (source, caller) = POLL.try_until_blocking(|| {
            tries += 1;
            let source = format!("paused-{round}-{tries}");
            let caller = scope.spawn({
                let source = source.clone();
                move || new(manager).with_deadline(2 * SOON).create("gated", &source)
            });
            while !cluster.is_provisioning(&name, "gated", &source).unwrap_or(false) {
                if caller.is_finished() {
                    return Err("no instance is being provisioned".to_owned());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok((source, caller))
        })?;
        let length = log_length(manager);
        manager.process.signal(Signal::STOP);
        let paused = Paused(manager);
        POLL.try_until_blocking(|| match cluster.owner("gated", &source)? {
            Some(owner) if owner != name => Ok(()),
            owner => Err(format!("no other manager took over the instance; its owner is {owner:?}")),
        })?;
        // Opens the gate before the manager continues, so that it tries to commit at once.
        drop((closed, paused));
        POLL.try_until_blocking(|| {
            if log_since(manager, length).contains("FENCED") { Ok(()) } else { Err("its log does not contain FENCED") }
        })?;
        Ok::<_, String>((source, caller.join().unwrap()))
    })?;
    match answer {
        Reply::Response(503, body) if body.to_string().contains("FENCED") => {}
        Reply::Response(status, body) => return Err(format!("its caller got {status} {body}")),
        Reply::NoResponse(why) => return Err(format!("its caller got no answer: {why}")),
    }
    let mut other = new(&cluster.managers[(victim + 1) % MANAGERS]);
    POLL.try_until_blocking(|| match other.call("GET", &format!("/api/v1/instance/gated/{source}"), &Value::Null) {
        Reply::Response(200, _) => Ok(()),
        Reply::Response(status, body) => Err(format!("no manager finished the instance: {status} {body}")),
        Reply::NoResponse(why) => Err(format!("no manager finished the instance: {why}")),
    })
}

#[test]
fn random_faults_lose_duplicate_and_leak_nothing() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (minutes, seed) = (number(MINUTES), number(SEED).unwrap_or_else(|| rand::random::<u32>().into()));
    let only = std::env::var(ONLY).unwrap_or_default();
    let choice = Fault::parse_list(&only);
    eprintln!("{SEED}={seed}");
    let interrupted = Arc::new(AtomicBool::new(false));
    match minutes {
        None => {
            let mut storm = Storm::new(seed);
            let rounds = if only.is_empty() { &Fault::IN_CI[..] } else { &[&choice[..]] };
            for faults in rounds {
                storm.run_round(faults, &interrupted);
            }
            storm.finish();
        }
        Some(minutes) => {
            // The first SIGINT stops after the round; the second exits at once.
            signal_hook::flag::register_conditional_shutdown(SIGINT, 130, interrupted.clone()).unwrap();
            signal_hook::flag::register(SIGINT, interrupted.clone()).unwrap();
            let mut storm = Storm::new(seed);
            let deadline = Instant::now() + Duration::from_secs(60 * minutes);
            while Instant::now() < deadline && !interrupted.load(Ordering::Relaxed) && storm.ledger.has_no_violations()
            {
                let count = storm.rng.random_range(1..=3);
                let faults: Vec<Fault> = choice.sample(&mut storm.rng, count).copied().collect();
                storm.run_round(&faults, &interrupted);
            }
            storm.finish();
        }
    }
}

/// Most containers lack the privilege to create network namespaces. There the storm stops members instead, and reports it.
#[test]
fn members_are_stopped_where_namespaces_are_unavailable() {
    let world = World::bare(Backend::Embedded);
    let test_binary = std::env::current_exe().unwrap();
    let mut storm = if rustix::process::geteuid().is_root() {
        let mut unprivileged = Command::new("setpriv");
        unprivileged.arg("--bounding-set=-sys_admin,-net_admin").arg(test_binary);
        unprivileged
    } else {
        Command::new(test_binary)
    };
    let log = world.path("storm.log");
    let output = File::create(&log).unwrap();
    storm.args(["--exact", "--nocapture", STORM]).env(ONLY, "MemberCutFromClients").env_remove(MINUTES);
    storm.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    let status = spawn_bound(storm).unwrap().wait().unwrap();
    let output = std::fs::read_to_string(log).unwrap();
    assert!(status.success(), "{output}");
    for part in [
        "NETWORK NAMESPACES ARE UNAVAILABLE",
        "{MemberCutFromClients} left out",
        "FollowerPaused",
        "lost: 0; duplicated: 0; orphans: 0",
    ] {
        assert!(output.contains(part), "{part}:\n{output}");
    }
}
