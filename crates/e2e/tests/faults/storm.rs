//! Three managers and three etcd members under load, one fault after the other; after each round everything is compared with everything.

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
    cluster::{Between, Cluster, LEASE_TTL, length_of_log, said_since},
    load::{Broken, Client, Driver, Kind, Ledger, Reply, Stopping, Updater, come_and_go, race},
    network::Side,
    scenario::{Gate, gated, quick},
};
use crate::harness::{Backend, Manager, POLL, SOON, World};

/// How long the storm lasts, in minutes, unless it is interrupted (SIGINT); without it, one round of each kind of fault.
const MINUTES: &str = "GAUNTLET_FAULTS_MINUTES";
/// What the choice of faults follows from.
const SEED: &str = "GAUNTLET_FAULTS_SEED";
/// The faults to choose among, by name; one round of these when no time is set.
const ONLY: &str = "GAUNTLET_FAULTS_ONLY";

const STORM: &str = "faults::storm::random_faults_lose_duplicate_and_leak_nothing";
const MANAGERS: usize = 3;
const MEMBERS: usize = 3;
/// Clients that go from manager to manager; beside them each manager has one that stays.
const ROAMING: usize = 2;
/// Load before a fault, and after it.
const CALM: Duration = Duration::from_millis(1200);
/// What lasts outlives a lease.
const LASTING: Duration = Duration::from_millis(LEASE_TTL.as_millis() as u64 + 1000);
/// The challenges that stay.
const STAY: [&str; 4] = ["plain", "pooled", "shifting", "gated"];

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// kill -9, and started again.
    ManagerKilled,
    /// Stopped while it brings an instance up, for longer than its lease.
    ManagerPaused,
    /// kill -9, and started again.
    LeaderKilled,
    FollowerKilled,
    /// Stopped for longer than a lease, then continued.
    LeaderPaused,
    FollowerPaused,
    /// It leads, and does not hear the others; clients reach it.
    LeaderCutFromPeers,
    /// Its peers reach it, clients do not.
    MemberCutFromClients,
    /// Nobody reaches it.
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
    /// One round of each line.
    const IN_CI: [&[Fault]; 4] = [
        &[Fault::ManagerKilled, Fault::ManagerPaused],
        &[Fault::FollowerKilled, Fault::LeaderKilled],
        &[Fault::LeaderPaused],
        &[Fault::LeaderCutFromPeers, Fault::MemberCutFromClients],
    ];

    /// Those of that name; all if none is named.
    fn named(names: &str) -> Vec<Fault> {
        let name = |name: &str| {
            let fault = Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == name);
            fault.unwrap_or_else(|| panic!("{name:?} is no fault; there are {:?}", Fault::ALL))
        };
        if names.is_empty() { Fault::ALL.to_vec() } else { names.split(',').map(name).collect() }
    }

    /// What comes nearest to it where nothing can be cut.
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
    /// What cannot be had here.
    left_out: BTreeSet<Fault>,
    /// Managers that were paused in the middle of their work, and those whose commit was then seen refused.
    pauses: (usize, usize),
    rounds: usize,
    begun: Instant,
}

impl Storm {
    fn new(seed: u64) -> Storm {
        let begun = Instant::now();
        // Who asks a member that is gone is free again soon.
        let environment = [("ETCD_DEADLINE", "1500ms")];
        let cluster = Cluster::start(MEMBERS, &Between::Namespaces, &[]).with_managers_of(MANAGERS, &environment);
        let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
        let known = (0..ROAMING).map(|_| &urls[..]).chain(urls.iter().map(std::slice::from_ref)).enumerate();
        let drivers = known.map(|(at, known)| Driver::new(&format!("driver-{at}"), known, seed + at as u64)).collect();
        let manager = &cluster.managers[0];
        manager.create_challenge("plain", &quick(), &json!({ "timeout": "600s" }));
        manager.create_challenge("pooled", &quick(), &json!({ "timeout": "600s", "min": "2", "max": "20" }));
        manager.create_challenge("shifting", &quick(), &json!({ "additional": { "motd": "none" } }));
        manager.create_challenge("gated", &gated(), &json!({}));
        for source in ["a", "b"] {
            manager.create_instance("shifting", source).ok();
        }
        Storm {
            updater: Updater::new(&urls),
            rng: SmallRng::seed_from_u64(seed),
            ledger: Ledger::default(),
            injected: BTreeMap::new(),
            left_out: BTreeSet::new(),
            pauses: (0, 0),
            rounds: 0,
            cluster,
            urls,
            drivers,
            begun,
        }
    }

    /// Load, faults, load, rest; then all promises are looked at.
    fn round(&mut self, faults: &[Fault], interrupted: &AtomicBool) {
        let Storm { cluster, ledger, urls, drivers, updater, rng, injected, left_out, pauses, rounds, begun } = self;
        *rounds += 1;
        let round = *rounds;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (ledger, stop, urls) = (&*ledger, &stop, &*urls);
            // However this ends, the clients do too.
            let stopping = Stopping(stop);
            for driver in &mut *drivers {
                scope.spawn(move || driver.drive(ledger, stop));
            }
            scope.spawn(|| updater.drive(ledger, stop));
            scope.spawn(move || race(urls, ledger, stop, round));
            scope.spawn(move || come_and_go(urls, ledger, stop, round));
            std::thread::sleep(CALM);
            for planned in faults {
                if interrupted.load(Ordering::Relaxed) {
                    break;
                }
                let fault = if cluster.network.is_ok() { *planned } else { planned.without_network() };
                if fault != *planned {
                    left_out.insert(*planned);
                }
                eprintln!("{:6.1} s, round {round}: {fault:?}", begun.elapsed().as_secs_f64());
                *injected.entry(fault).or_default() += 1;
                if fault == Fault::ManagerPaused {
                    pauses.0 += 1;
                    match pause(cluster, rng.random_range(0..MANAGERS), round) {
                        Ok(()) => pauses.1 += 1,
                        Err(why) => ledger.broken(Kind::Odd, format_args!("a pause: {why}")),
                    }
                } else {
                    inject(cluster, fault, rng);
                }
            }
            std::thread::sleep(CALM);
            drop(stopping);
        });
        let census = match self.cluster.settle() {
            Ok(census) => census,
            Err(Broken(kind, what)) => {
                self.cluster.explain();
                return self.ledger.broken(kind, what);
            }
        };
        for driver in &self.drivers {
            driver.hold(&self.ledger, &self.urls);
        }
        self.updater.hold(&self.ledger);
        for seat in self.drivers.iter().flat_map(Driver::promised) {
            if !census.contains_key(&seat) {
                self.ledger.broken(Kind::Lost, format_args!("{seat}: promised, and not stored"));
            }
        }
        self.tidy(census.keys());
        eprintln!(
            "{:6.1} s, round {round}: at rest with {} instances; {} operations acknowledged so far, nothing lost",
            self.begun.elapsed().as_secs_f64(),
            census.len(),
            self.ledger.acknowledged()
        );
    }

    /// Takes down what nobody counts on any more: what the outcome of which was not known.
    fn tidy<'a>(&mut self, seats: impl Iterator<Item = &'a String>) {
        let promised: Vec<String> = self.drivers.iter().flat_map(Driver::promised).collect();
        let mut client = Client::new(&self.urls, 0);
        for seat in seats {
            let Some((challenge, source)) = seat.split_once(" s ") else { continue };
            if challenge != "shifting" && STAY.contains(&challenge) && !promised.contains(seat) {
                self.gone(&mut client, &format!("/api/v1/instance/{challenge}/{source}"));
            }
        }
        match self.cluster.stored("challenges") {
            Ok(challenges) => {
                for (key, _) in challenges {
                    let id = key.trim_start_matches("gauntlet/challenges ");
                    if !STAY.contains(&id) {
                        self.gone(&mut client, &format!("/api/v1/challenge/{id}"));
                    }
                }
            }
            Err(why) => self.ledger.broken(Kind::Odd, why),
        }
    }

    fn gone(&self, client: &mut Client, path: &str) {
        match client.insist("DELETE", path, &Value::Null) {
            Ok((200 | 404, _)) => {}
            Ok((status, body)) => self.ledger.broken(Kind::Odd, format_args!("{path}: {status} {body}")),
            Err(why) => self.ledger.broken(Kind::Odd, format_args!("{path}: {why}")),
        }
    }

    /// Everything is deleted and nothing is left; then the report.
    fn end(mut self) {
        if self.ledger.is_kept() {
            let mut client = Client::new(&self.urls, 0);
            for id in STAY {
                self.gone(&mut client, &format!("/api/v1/challenge/{id}"));
            }
            match self.cluster.settle() {
                Ok(census) if census.is_empty() => {}
                Ok(census) => self.ledger.broken(Kind::Orphan, format_args!("all was deleted: {census:?}")),
                Err(Broken(kind, what)) => self.ledger.broken(kind, what),
            }
        }
        for manager in &mut self.cluster.managers {
            if !manager.process.is_running() {
                self.ledger.broken(Kind::Odd, format_args!("{} has ended by itself", manager.url));
            }
        }
        println!("{self}");
        self.ledger.assert_kept();
        assert_eq!(self.pauses.0, self.pauses.1, "each pause is seen refused by its fence");
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, seconds) = (self.injected.values().sum::<usize>(), self.begun.elapsed().as_secs_f64());
        writeln!(f, "faults: {all} injected in {} rounds, {seconds:.0} s", self.rounds)?;
        for (fault, times) in &self.injected {
            writeln!(f, "  {:<22} {times:>5}", format!("{fault:?}"))?;
        }
        match &self.cluster.network {
            Ok(_) => writeln!(f, "partitions: by network namespaces")?,
            Err(why) if self.left_out.is_empty() => writeln!(f, "partitions: none ({why})")?,
            Err(why) => writeln!(f, "partitions: none ({why}): {:?} left out, members stopped instead", self.left_out)?,
        }
        writeln!(f, "{}", self.ledger)?;
        write!(f, "pauses of a manager at work: {}, refused by their fence: {}", self.pauses.0, self.pauses.1)
    }
}

fn inject(cluster: &mut Cluster, fault: Fault, rng: &mut SmallRng) {
    let anyone = rng.random_range(0..MEMBERS);
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
            std::thread::sleep(CALM);
            process.start().unwrap();
        }
        Fault::LeaderPaused | Fault::FollowerPaused => {
            let at = if fault == Fault::LeaderPaused { cluster.leader() } else { cluster.follower() };
            cluster.members[at].process.signal(Signal::STOP);
            std::thread::sleep(LASTING);
            cluster.members[at].process.signal(Signal::CONT);
        }
        Fault::LeaderCutFromPeers | Fault::MemberCutFromClients | Fault::MemberCutOff => {
            let (at, sides) = match fault {
                Fault::LeaderCutFromPeers => (cluster.leader(), &Side::BOTH[1..]),
                Fault::MemberCutFromClients => (anyone, &Side::BOTH[..1]),
                _ => (anyone, &Side::BOTH[..]),
            };
            // Where there is none, these are not chosen.
            let Ok(network) = &cluster.network else { return };
            sides.iter().for_each(|side| network.cut(at, *side));
            std::thread::sleep(LASTING);
            sides.iter().for_each(|side| network.heal(at, *side));
        }
    }
}

/// Continues a manager when it is dropped.
struct Paused<'a>(&'a Manager);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.process.signal(Signal::CONT);
    }
}

/// Pauses a manager in the middle of bringing an instance up, until another manager owns it. Back again it must not commit: its caller is told
/// so, and the instance is the other's work. The error is what of that was not seen.
fn pause(cluster: &Cluster, victim: usize, round: usize) -> Result<(), String> {
    let (manager, name) = (&cluster.managers[victim], format!("m{}", victim + 1));
    let new = |manager: &Manager| Client::new(std::slice::from_ref(&manager.url), 0);
    let gate = Gate::of(&cluster.world);
    let (source, answer) = std::thread::scope(|scope| {
        let closed = gate.close();
        let mut tries = 0;
        // A call that is refused before it has begun, by an etcd that is about to elect, proves nothing: then another is made.
        let (source, caller) = POLL.try_until_blocking(|| {
            tries += 1;
            let source = format!("paused-{round}-{tries}");
            let caller = scope.spawn({
                let source = source.clone();
                move || new(manager).patient(2 * SOON).create("gated", &source)
            });
            while !cluster.at_work(&name, "gated", &source).unwrap_or(false) {
                if caller.is_finished() {
                    return Err("no instance is being brought up".to_owned());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok((source, caller))
        })?;
        let length = length_of_log(manager);
        manager.process.signal(Signal::STOP);
        let paused = Paused(manager);
        POLL.try_until_blocking(|| match cluster.owner("gated", &source)? {
            Some(owner) if owner != name => Ok(()),
            owner => Err(format!("its work was not taken over, but owned by {owner:?}")),
        })?;
        // What it was waiting for is there when it comes back.
        drop((closed, paused));
        POLL.try_until_blocking(|| {
            if said_since(manager, length).contains("FENCED") { Ok(()) } else { Err("no fence in its log") }
        })?;
        Ok::<_, String>((source, caller.join().unwrap()))
    })?;
    match answer {
        Reply::Said(503, body) if body.to_string().contains("FENCED") => {}
        Reply::Said(status, body) => return Err(format!("its caller was told {status} {body}")),
        Reply::Nothing(why) => return Err(format!("its caller was told nothing: {why}")),
    }
    let mut other = new(&cluster.managers[(victim + 1) % MANAGERS]);
    POLL.try_until_blocking(|| match other.ask("GET", &format!("/api/v1/instance/gated/{source}"), &Value::Null) {
        Reply::Said(200, _) => Ok(()),
        Reply::Said(status, body) => Err(format!("nobody finished it: {status} {body}")),
        Reply::Nothing(why) => Err(format!("nobody finished it: {why}")),
    })
}

#[test]
fn random_faults_lose_duplicate_and_leak_nothing() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (minutes, seed) = (number(MINUTES), number(SEED).unwrap_or_else(|| rand::random::<u32>().into()));
    let only = std::env::var(ONLY).unwrap_or_default();
    let choice = Fault::named(&only);
    eprintln!("{SEED}={seed}");
    let interrupted = Arc::new(AtomicBool::new(false));
    match minutes {
        None => {
            let mut storm = Storm::new(seed);
            let rounds = if only.is_empty() { &Fault::IN_CI[..] } else { &[&choice[..]] };
            for faults in rounds {
                storm.round(faults, &interrupted);
            }
            storm.end();
        }
        Some(minutes) => {
            // The first asks for an end, the second is one.
            signal_hook::flag::register_conditional_shutdown(SIGINT, 130, interrupted.clone()).unwrap();
            signal_hook::flag::register(SIGINT, interrupted.clone()).unwrap();
            let mut storm = Storm::new(seed);
            let ends = Instant::now() + Duration::from_secs(60 * minutes);
            while Instant::now() < ends && !interrupted.load(Ordering::Relaxed) && storm.ledger.is_kept() {
                let many = storm.rng.random_range(1..=3);
                let faults: Vec<Fault> = choice.sample(&mut storm.rng, many).copied().collect();
                storm.round(&faults, &interrupted);
            }
            storm.end();
        }
    }
}

/// Without the privilege to make network namespaces, as in most containers, the storm does without partitions, and says so.
#[test]
fn members_are_stopped_where_the_network_cannot_be_cut() {
    let alone = World::bare(Backend::Embedded);
    let this = std::env::current_exe().unwrap();
    let mut storm = if rustix::process::geteuid().is_root() {
        let mut without = Command::new("setpriv");
        without.arg("--bounding-set=-sys_admin,-net_admin").arg(this);
        without
    } else {
        Command::new(this)
    };
    let log = alone.path("storm.log");
    let said = File::create(&log).unwrap();
    storm.args(["--exact", "--nocapture", STORM]).env(ONLY, "MemberCutFromClients").env_remove(MINUTES);
    storm.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said);
    let status = spawn_bound(storm).unwrap().wait().unwrap();
    let said = std::fs::read_to_string(log).unwrap();
    assert!(status.success(), "{said}");
    for part in [
        "NO NETWORK NAMESPACES HERE",
        "{MemberCutFromClients} left out",
        "FollowerPaused",
        "lost: 0; doubled: 0; orphans: 0",
    ] {
        assert!(said.contains(part), "{part}:\n{said}");
    }
}
