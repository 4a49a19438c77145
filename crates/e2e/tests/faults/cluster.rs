//! Real managers on a real etcd cluster, and faults that can be injected into them.

use std::{process::Command, time::Duration};

use gauntlet_coordination::{
    Etcd, EtcdConfig,
    kv::{Get, KeyRange, Kv as _},
};
use gauntlet_stack::{Process, Ready, Spec, Tool, Tools, http, ports::Reserved};
use gauntlet_telemetry::{Instruments, db::Database};
use gauntlet_testing::processes::KillInstances;
use serde_json::{Value, json};

use super::{
    census,
    load::{Broken, Kind},
    network::{Network, Side},
    scenario::write_scenarios,
};
use crate::harness::{Backend, Manager, POLL, World, eventually};

/// The TTL of replicas' leases.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(3);

/// The network between the members and their clients.
pub(super) enum Between {
    /// Loopback, on which connections cannot be cut.
    Loopback,
    /// One network namespace for each member. Falls back to loopback, with a loud message, where namespaces cannot be created.
    Namespaces,
}

/// One member of the etcd cluster.
pub(super) struct Member {
    pub(super) process: Process,
    pub(super) url: String,
    _reserved: Vec<Reserved>,
}

/// Fields are dropped in this order: managers, then the instances, which would outlive them, then the store and the network.
pub(super) struct Cluster {
    pub(super) managers: Vec<Manager>,
    _instances: KillInstances,
    pub(super) members: Vec<Member>,
    /// The network by which members can be cut off, or why there is none.
    pub(super) network: Result<Network, String>,
    pub(super) store: Etcd,
    pub(super) world: World,
}

impl Cluster {
    /// Starts a cluster of that size, with additional arguments for each member, and waits until it is ready. It has no managers yet.
    pub(super) fn start(size: usize, between: &Between, more: &[&str]) -> Cluster {
        let world = World::bare(Backend::Embedded);
        write_scenarios(&world);
        let network = match between {
            Between::Loopback => Err("members are on loopback".to_owned()),
            Between::Namespaces => Network::of(size, &world.path("")).inspect_err(|why| {
                eprintln!(
                    "\n*** NO NETWORK NAMESPACES HERE: {why}\n*** No member can be cut off: members are stopped (SIGSTOP) instead. As \
                     root, with iproute2 and util-linux installed, partitions are real.\n"
                );
            }),
        };
        let members = members(&world, network.as_ref().ok(), size, more);
        let urls = members.iter().map(|member| member.url.clone());
        let config = EtcdConfig { deadline: Duration::from_secs(4), ..EtcdConfig::new(urls) };
        let store = Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap();
        let instances = KillInstances(world.path("data/process/instances"));
        Cluster { managers: Vec::new(), _instances: instances, members, network, store, world }
    }

    /// Starts managers `m1`, `m2` and so on. Each has another member first in its endpoints, which it uses while that member answers.
    pub(super) fn with_managers(self, count: usize) -> Cluster {
        self.with_managers_of(count, &[])
    }

    /// The same with additional environment variables.
    pub(super) fn with_managers_of(mut self, count: usize, more: &[(&str, &str)]) -> Cluster {
        let (world, members) = (&self.world, &self.members);
        let start = |at: usize| {
            let endpoints = (at..at + members.len()).map(|member| members[member % members.len()].url.as_str());
            let mut environment = vec![
                ("ETCD_ENDPOINTS", endpoints.collect::<Vec<_>>().join(",")),
                ("LEASE_TTL", format!("{}s", LEASE_TTL.as_secs())),
                ("RECONCILE_EVERY", "1s".to_owned()),
            ];
            environment.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
            world.manager_with(&format!("m{}", at + 1), &environment)
        };
        self.managers = std::thread::scope(|scope| {
            let starting: Vec<_> = (0..count).map(|at| scope.spawn(move || start(at))).collect();
            starting.into_iter().map(|manager| manager.join().unwrap()).collect()
        });
        self
    }

    /// Waits until the cluster has a leader, and returns it.
    pub(super) fn leader(&self) -> usize {
        eventually("the cluster has a leader", || {
            let leads = |member: &Member| {
                let status = post(&member.url, "/v3/maintenance/status", &json!({})).ok()?;
                (status["leader"] == status["header"]["member_id"]).then_some(())
            };
            self.members
                .iter()
                .position(|member| leads(member).is_some())
                .ok_or_else(|| "no member is the leader".to_owned())
        })
    }

    /// Returns a member that is not the leader.
    pub(super) fn follower(&self) -> usize {
        (self.leader() + 1) % self.members.len()
    }

    /// Returns the keys and values below the key prefix `gauntlet/{words}`.
    pub(super) fn stored(&self, words: &str) -> Result<Vec<(String, Vec<u8>)>, String> {
        let range = KeyRange::between(format!("gauntlet/{words} "), format!("gauntlet/{words}!"));
        let page = self.store.page(Get { range, limit: 0, keys_only: false }, None);
        let page = self.world.runtime.block_on(page).map_err(|error| error.to_string())?;
        Ok(page.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect())
    }

    /// Returns the replica that owns an instance now.
    pub(super) fn owner(&self, challenge: &str, source: &str) -> Result<Option<String>, String> {
        let wanted = format!("gauntlet/live owners {challenge} s {source}");
        let live = self.stored("live owners")?;
        let owner = live.into_iter().find(|(key, _)| *key == wanted);
        Ok(owner.and_then(|(_, value)| {
            serde_json::from_slice::<Value>(&value).ok()?["replica"].as_str().map(str::to_owned)
        }))
    }

    /// Whether that replica owns the instance and has started a process of it.
    pub(super) fn at_work(&self, replica: &str, challenge: &str, source: &str) -> Result<bool, String> {
        if self.owner(challenge, source)?.as_deref() != Some(replica) {
            return Ok(false);
        }
        let stored = self.stored(&format!("instances {challenge} s"))?;
        let record = stored.into_iter().find(|(key, _)| key.ends_with(&format!(" {source}")));
        let identity = record.and_then(|(_, value)| {
            serde_json::from_slice::<Value>(&value).ok()?["identity"].as_str().map(str::to_owned)
        });
        Ok(identity.is_some_and(|identity| census::runs(&self.world.path("data/process/instances"), &identity)))
    }

    /// Fails if a manager is not healthy.
    pub(super) fn all_healthy(&self) -> Result<(), String> {
        match self.managers.iter().find(|manager| !http::answers(&format!("{}/healthcheck", manager.url))) {
            None => Ok(()),
            Some(manager) => Err(format!("{} is not healthy", manager.url)),
        }
    }

    /// Waits until no work is under way and exactly the stored instances run, several times in a row.
    ///
    /// # Errors
    /// The last difference, when the cluster does not settle.
    pub(super) fn settle(&self) -> Result<census::Census, Broken> {
        const IN_A_ROW: usize = 3;
        let dir = self.world.path("data/process/instances");
        let odd = |why| Broken(Kind::Odd, why);
        let look = || {
            self.all_healthy().map_err(odd)?;
            for words in ["working", "live", "rollouts"] {
                if let [(key, _), ..] = self.stored(words).map_err(odd)?.as_slice() {
                    return Err(odd(format!("under way: {key}")));
                }
            }
            census::take(&dir, &self.stored("instances").map_err(odd)?)
        };
        let mut before = 0;
        POLL.try_until_blocking(|| match look() {
            Ok(census) if before + 1 == IN_A_ROW => Ok(census),
            Ok(_) => {
                before += 1;
                Err(odd("settled, but not for long enough".to_owned()))
            }
            Err(why) => {
                before = 0;
                Err(why)
            }
        })
    }

    /// Prints the work still under way and the end of each manager's log.
    pub(super) fn explain(&self) {
        for words in ["working", "live", "rollouts"] {
            for (key, value) in self.stored(words).unwrap_or_default() {
                eprintln!("{key}: {}", String::from_utf8_lossy(&value));
            }
        }
        for manager in &self.managers {
            let said = said_since(manager, 0);
            let said: Vec<&str> = said.lines().rev().take(60).collect();
            eprintln!("{}:", manager.url);
            said.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
    }

    /// As [`Cluster::settle`], but panics when the cluster does not settle.
    pub(super) fn at_rest(&self) -> census::Census {
        self.settle().unwrap_or_else(|why| panic!("not settled: {why:?}"))
    }

    /// Runs etcd's command line against the cluster.
    pub(super) fn etcdctl(&self, arguments: &[&str]) -> String {
        let endpoints: Vec<&str> = self.members.iter().map(|member| member.url.as_str()).collect();
        let output = Command::new(Tools::from_env().require(Tool::Etcdctl).unwrap())
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", endpoints.join(",")))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "etcdctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Returns what was appended to a manager's log since it had that length.
pub(super) fn said_since(manager: &Manager, length: usize) -> String {
    let log = std::fs::read(manager.process.log()).unwrap();
    String::from_utf8_lossy(&log[length.min(log.len())..]).into_owned()
}

pub(super) fn length_of_log(manager: &Manager) -> usize {
    std::fs::metadata(manager.process.log()).map_or(0, |log| log.len() as usize)
}

/// Posts to etcd's JSON gateway.
pub(super) fn post(url: &str, path: &str, body: &Value) -> Result<Value, String> {
    let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(2))).proxy(None).build();
    let mut answer =
        config.new_agent().post(format!("{url}{path}")).send(body.to_string()).map_err(|error| error.to_string())?;
    let text = answer.body_mut().read_to_string().map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

fn members(world: &World, network: Option<&Network>, size: usize, more: &[&str]) -> Vec<Member> {
    let etcd = Tools::from_env().require(Tool::Etcd).unwrap();
    let mut planned = Vec::new();
    for at in 0..size {
        planned.push(match network {
            Some(network) => {
                let address = |side| network.address(at, side);
                (format!("{}:2379", address(Side::Clients)), format!("{}:2380", address(Side::Peers)), Vec::new())
            }
            None => {
                let (client, peer) = (Reserved::any().unwrap(), Reserved::any().unwrap());
                let address = |port: &Reserved| format!("127.0.0.1:{}", port.number());
                (address(&client), address(&peer), vec![client, peer])
            }
        });
    }
    let peers: Vec<String> =
        planned.iter().enumerate().map(|(at, (_, peer, _))| format!("m{at}=http://{peer}")).collect();
    let start = |(at, (client, peer, reserved)): (usize, (String, String, Vec<Reserved>))| {
        let dir = world.path(&format!("etcd-{at}"));
        std::fs::create_dir_all(&dir).unwrap();
        let url = format!("http://{client}");
        // A member is ready only once a majority has started, so readiness is checked below.
        let mut spec = Spec::new(&format!("etcd m{at}"), &etcd, dir.join("etcd.log"), Ready::Spawned);
        for argument in [
            format!("--name=m{at}"),
            format!("--data-dir={}", dir.join("data").display()),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
            format!("--initial-cluster={}", peers.join(",")),
            "--logger=zap".to_owned(),
            // Loopback is fast, so short timeouts are stable enough.
            "--heartbeat-interval=100".to_owned(),
            "--election-timeout=1000".to_owned(),
        ] {
            spec = spec.arg(argument);
        }
        for argument in more {
            spec = spec.arg(*argument);
        }
        if let Some(network) = network {
            spec = network.enter(at, spec);
        }
        Member { process: Process::run(spec).unwrap(), url, _reserved: reserved }
    };
    let members: Vec<Member> = planned.into_iter().enumerate().map(start).collect();
    for member in &members {
        eventually("etcd is ready", || {
            if http::answers(&format!("{}/health", member.url)) { Ok(()) } else { Err(member.url.clone()) }
        });
    }
    members
}
