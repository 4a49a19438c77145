//! Three managers and three etcd members under load, one fault after the other; after each round everything is compared with everything.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    cluster::{Between, Cluster, LEASE_TTL, length_of_log, said_since},
    load::{Client, Driver, Kind, Ledger, Reply, Stopping, Updater, come_and_go, race},
    network::Side,
    scenario::{quick, slow},
};
use crate::harness::eventually;

/// How long the storm lasts, in minutes; without it, one round of each kind of fault.
const MINUTES: &str = "GAUNTLET_FAULTS_MINUTES";
/// What the choice of faults follows from.
const SEED: &str = "GAUNTLET_FAULTS_SEED";

const MANAGERS: usize = 3;
const MEMBERS: usize = 3;
const DRIVERS: usize = 4;
/// Load before a fault, and after it.
const CALM: Duration = Duration::from_millis(700);
/// What lasts outlives a lease.
const LASTING: Duration = Duration::from_millis(LEASE_TTL.as_millis() as u64 + 1000);
/// The challenges that stay.
const STAY: [&str; 4] = ["plain", "pooled", "shifting", "slow"];

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
}

struct Storm {
    cluster: Cluster,
    ledger: Ledger,
    urls: Vec<String>,
    drivers: Vec<Driver>,
    updater: Updater,
    rng: SmallRng,
    injected: BTreeMap<Fault, usize>,
    /// Managers that were paused in the middle of their work, and those whose commit was then seen refused.
    pauses: (usize, usize),
    rounds: usize,
    begun: Instant,
}

impl Storm {
    fn new(seed: u64) -> Storm {
        let begun = Instant::now();
        let cluster = Cluster::start(MEMBERS, &Between::Namespaces, &[]).with_managers(MANAGERS);
        let urls: Vec<String> = cluster.managers.iter().map(|manager| manager.url.clone()).collect();
        let drivers = (0..DRIVERS).map(|at| Driver::new(&format!("driver-{at}"), &urls, seed + at as u64)).collect();
        let manager = &cluster.managers[0];
        manager.create_challenge("plain", &quick(), &json!({ "timeout": "600s" }));
        manager.create_challenge("pooled", &quick(), &json!({ "timeout": "600s", "min": "2", "max": "20" }));
        manager.create_challenge("shifting", &quick(), &json!({ "additional": { "motd": "none" } }));
        manager.create_challenge("slow", &slow(), &json!({}));
        for source in ["a", "b"] {
            manager.create_instance("shifting", source).ok();
        }
        Storm {
            updater: Updater::new(&urls),
            rng: SmallRng::seed_from_u64(seed),
            ledger: Ledger::default(),
            injected: BTreeMap::new(),
            pauses: (0, 0),
            rounds: 0,
            cluster,
            urls,
            drivers,
            begun,
        }
    }

    /// Load, faults, load, rest; then all promises are looked at.
    fn round(&mut self, faults: &[Fault]) {
        let Storm { cluster, ledger, urls, drivers, updater, rng, injected, pauses, rounds, begun } = self;
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
            for fault in faults {
                eprintln!("{:5.1} s, round {round}: {fault:?}", begun.elapsed().as_secs_f64());
                *injected.entry(*fault).or_default() += 1;
                if *fault == Fault::ManagerPaused {
                    pauses.0 += 1;
                    pauses.1 += usize::from(pause(cluster, rng.random_range(0..MANAGERS), round));
                } else {
                    inject(cluster, *fault, rng);
                }
            }
            std::thread::sleep(CALM);
            drop(stopping);
        });
        let census = self.cluster.at_rest();
        for driver in &mut self.drivers {
            driver.hold(&self.ledger);
        }
        self.updater.hold(&self.ledger);
        for seat in self.drivers.iter().flat_map(Driver::promised) {
            if !census.contains_key(&seat) {
                self.ledger.broken(Kind::Lost, format_args!("{seat}: promised, and not stored"));
            }
        }
        self.tidy(census.keys());
        eprintln!(
            "{:5.1} s, round {round}: at rest with {} instances, {} operations acknowledged so far",
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
        for challenge in self.cluster.managers[0].get("/api/v1/challenge").lines() {
            let id = challenge["id"].as_str().unwrap().to_owned();
            if !STAY.contains(&id.as_str()) {
                self.gone(&mut client, &format!("/api/v1/challenge/{id}"));
            }
        }
    }

    fn gone(&self, client: &mut Client, path: &str) {
        match client.ask("DELETE", path, &Value::Null) {
            Reply::Said(200 | 404, _) => {}
            Reply::Said(status, body) => self.ledger.broken(Kind::Odd, format_args!("{path}: {status} {body}")),
            Reply::Nothing(why) => self.ledger.broken(Kind::Odd, format_args!("{path}: {why}")),
        }
    }

    /// Everything is deleted and nothing is left; then the report.
    fn end(mut self) {
        let mut client = Client::new(&self.urls, 0);
        for id in STAY {
            self.gone(&mut client, &format!("/api/v1/challenge/{id}"));
        }
        assert!(self.cluster.at_rest().is_empty(), "all was deleted");
        for manager in &mut self.cluster.managers {
            assert!(manager.process.is_running());
        }
        println!("{self}");
        self.ledger.assert_kept();
        assert_eq!(self.pauses.0, self.pauses.1, "each pause is seen refused by its fence");
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<String> = self.injected.iter().map(|(fault, times)| format!("{times} {fault:?}")).collect();
        let how = if matches!(self.cluster.network, Some(Ok(_))) { "network namespaces" } else { "stopped members" };
        write!(
            f,
            "faults: {} injected in {:.0} s ({}; partitions by {how}); {}; orphans: 0; pauses refused by their fence: {} of {}",
            self.injected.values().sum::<usize>(),
            self.begun.elapsed().as_secs_f64(),
            kinds.join(", "),
            self.ledger,
            self.pauses.1,
            self.pauses.0,
        )
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
            cluster.cut(at, sides);
            std::thread::sleep(LASTING);
            cluster.heal(at, sides);
        }
    }
}

/// Pauses a manager that is bringing an instance up until another owns what it owned. Back again, it must not commit: its caller is told so,
/// and the instance is the other's work. Answers whether all that was seen.
fn pause(cluster: &Cluster, victim: usize, round: usize) -> bool {
    let manager = &cluster.managers[victim];
    let (name, source) = (format!("m{}", victim + 1), format!("paused-{round}"));
    let answer = std::thread::scope(|scope| {
        let caller = scope.spawn(|| Client::new(std::slice::from_ref(&manager.url), 0).create("slow", &source));
        eventually("the instance is being brought up", || match cluster.owner("slow", &source)? {
            Some(owner) if owner == name => Ok(()),
            other => Err(format!("{other:?} owns it")),
        });
        let length = length_of_log(manager);
        manager.process.signal(Signal::STOP);
        eventually("its lease has run out", || match cluster.owner("slow", &source)? {
            Some(owner) if owner == name => Err("it owns it still".to_owned()),
            _ => Ok(()),
        });
        manager.process.signal(Signal::CONT);
        eventually("its commit is refused by the fence", || {
            let said = said_since(manager, length);
            if said.contains("FENCED") { Ok(()) } else { Err(said) }
        });
        caller.join().unwrap()
    });
    let refused = match answer {
        Reply::Said(503, body) => body.to_string().contains("FENCED"),
        Reply::Said(..) | Reply::Nothing(_) => false,
    };
    let mut others = Client::new(&[cluster.managers[(victim + 1) % MANAGERS].url.clone()], 0);
    eventually("another manager finishes it", || {
        match others.ask("GET", &format!("/api/v1/instance/slow/{source}"), &Value::Null) {
            Reply::Said(200, _) => Ok(()),
            Reply::Said(status, body) => Err(format!("{status} {body}")),
            Reply::Nothing(why) => Err(why),
        }
    });
    refused
}

#[test]
fn nothing_acknowledged_is_lost_nothing_is_doubled_and_nothing_is_left_over() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (minutes, seed) = (number(MINUTES), number(SEED).unwrap_or_else(|| rand::random::<u32>().into()));
    eprintln!("{SEED}={seed}");
    let mut storm = Storm::new(seed);
    match minutes {
        None => Fault::IN_CI.into_iter().for_each(|faults| storm.round(faults)),
        Some(minutes) => {
            let ends = Instant::now() + Duration::from_secs(60 * minutes);
            while Instant::now() < ends {
                let many = storm.rng.random_range(1..=3);
                let faults: Vec<Fault> = Fault::ALL.sample(&mut storm.rng, many).copied().collect();
                storm.round(&faults);
            }
        }
    }
    storm.end();
}
