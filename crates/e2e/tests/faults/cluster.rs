//! Real managers on a real etcd cluster. Tests inject faults into both.

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
    load::{Kind, Violation},
    network::{Network, Side},
    scenario::{instance_path, write_scenarios},
};
use crate::harness::{Backend, Manager, POLL, World, eventually};

/// The TTL of replicas' leases.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(3);

/// How the members are connected to each other and to their clients.
pub(super) enum NetworkMode {
    /// Over loopback, where members cannot be partitioned.
    Loopback,
    /// With one network namespace for each member. Falls back to loopback with a warning if namespaces cannot be created.
    Namespaces,
}

/// One member of the etcd cluster.
pub(super) struct Member {
    pub(super) process: Process,
    pub(super) url: String,
    _reserved: Vec<Reserved>,
}

/// Fields are dropped in order: the managers, then their instances, which would outlive them, then the store and the network.
pub(super) struct Cluster {
    pub(super) managers: Vec<Manager>,
    _instances: KillInstances,
    pub(super) members: Vec<Member>,
    /// The network in which members can be partitioned, or the reason why it is unavailable.
    pub(super) network: Result<Network, String>,
    pub(super) store: Etcd,
    pub(super) world: World,
}

impl Cluster {
    /// Starts a cluster of `size` members with additional arguments, and waits until it is ready. It has no managers yet.
    pub(super) fn start(size: usize, mode: &NetworkMode, extra_args: &[&str]) -> Cluster {
        let world = World::bare(Backend::Embedded);
        write_scenarios(&world);
        let network = match mode {
            NetworkMode::Loopback => Err("members are on loopback".to_owned()),
            NetworkMode::Namespaces => Network::create(size, &world.path("")).inspect_err(|why| {
                eprintln!(
                    "\n*** NETWORK NAMESPACES ARE UNAVAILABLE: {why}\n*** Members are stopped (SIGSTOP) instead of partitioned. To test real \
                     partitions, run as root with iproute2 and util-linux installed.\n"
                );
            }),
        };
        let members = members(&world, network.as_ref().ok(), size, extra_args);
        let urls = members.iter().map(|member| member.url.clone());
        let config = EtcdConfig { deadline: Duration::from_secs(4), ..EtcdConfig::new(urls) };
        let store = Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap();
        let instances = KillInstances(world.path("data/process/instances"));
        Cluster { managers: Vec::new(), _instances: instances, members, network, store, world }
    }

    /// Starts managers `m1`, `m2` and so on. Each lists a different member first in its endpoints, and uses it while it answers.
    pub(super) fn with_managers(self, count: usize) -> Cluster {
        self.with_managers_and_env(count, &[])
    }

    /// Starts managers with additional environment variables.
    pub(super) fn with_managers_and_env(mut self, count: usize, extra_env: &[(&str, &str)]) -> Cluster {
        let (world, members) = (&self.world, &self.members);
        let start = |at: usize| {
            let endpoints = (at..at + members.len()).map(|member| members[member % members.len()].url.as_str());
            let mut environment = vec![
                ("ETCD_ENDPOINTS", endpoints.collect::<Vec<_>>().join(",")),
                ("LEASE_TTL", format!("{}s", LEASE_TTL.as_secs())),
                ("RECONCILE_EVERY", "1s".to_owned()),
                ("INSTANCE_PATH", instance_path(world)),
            ];
            environment.extend(extra_env.iter().map(|(name, value)| (*name, (*value).to_owned())));
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

    /// Returns the keys and values with the key prefix `gauntlet/{prefix} `.
    pub(super) fn stored(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, String> {
        let range = KeyRange::between(format!("gauntlet/{prefix} "), format!("gauntlet/{prefix}!"));
        let page = self.store.page(Get { range, limit: 0, keys_only: false }, None);
        let page = self.world.runtime.block_on(page).map_err(|error| error.to_string())?;
        Ok(page.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect())
    }

    /// Returns the replica that owns the instance, if any.
    pub(super) fn owner(&self, challenge: &str, source: &str) -> Result<Option<String>, String> {
        let wanted = format!("gauntlet/live owners {challenge} s {source}");
        let live = self.stored("live owners")?;
        let owner = live.into_iter().find(|(key, _)| *key == wanted);
        Ok(owner.and_then(|(_, value)| {
            serde_json::from_slice::<Value>(&value).ok()?["replica"].as_str().map(str::to_owned)
        }))
    }

    /// Whether the replica owns the instance and has started its process.
    pub(super) fn is_provisioning(&self, replica: &str, challenge: &str, source: &str) -> Result<bool, String> {
        if self.owner(challenge, source)?.as_deref() != Some(replica) {
            return Ok(false);
        }
        let stored = self.stored(&format!("instances {challenge} s"))?;
        let record = stored.into_iter().find(|(key, _)| key.ends_with(&format!(" {source}")));
        let identity = record.and_then(|(_, value)| {
            serde_json::from_slice::<Value>(&value).ok()?["identity"].as_str().map(str::to_owned)
        });
        Ok(identity.is_some_and(|identity| census::is_running(&self.world.path("data/process/instances"), &identity)))
    }

    /// Checks that every manager is healthy.
    pub(super) fn check_health(&self) -> Result<(), String> {
        match self.managers.iter().find(|manager| !http::answers(&format!("{}/healthcheck", manager.url))) {
            None => Ok(()),
            Some(manager) => Err(format!("{} is not healthy", manager.url)),
        }
    }

    /// Waits until no operation is in progress and exactly the stored instances run, for several consecutive checks.
    ///
    /// # Errors
    /// The last violation, if the cluster does not settle.
    pub(super) fn settle(&self) -> Result<census::Census, Violation> {
        const CONSECUTIVE_CHECKS: usize = 3;
        let dir = self.world.path("data/process/instances");
        let unexpected = |why| Violation(Kind::Unexpected, why);
        let check = || {
            self.check_health().map_err(unexpected)?;
            for prefix in ["working", "live", "rollouts"] {
                if let [(key, _), ..] = self.stored(prefix).map_err(unexpected)?.as_slice() {
                    return Err(unexpected(format!("in progress: {key}")));
                }
            }
            census::take_census(&dir, &self.stored("instances").map_err(unexpected)?)
        };
        let mut passed = 0;
        POLL.try_until_blocking(|| match check() {
            Ok(census) if passed + 1 == CONSECUTIVE_CHECKS => Ok(census),
            Ok(_) => {
                passed += 1;
                Err(unexpected("settled only a moment ago".to_owned()))
            }
            Err(why) => {
                passed = 0;
                Err(why)
            }
        })
    }

    /// Prints the operations in progress and the end of each manager's log.
    pub(super) fn print_diagnostics(&self) {
        for prefix in ["working", "live", "rollouts"] {
            for (key, value) in self.stored(prefix).unwrap_or_default() {
                eprintln!("{key}: {}", String::from_utf8_lossy(&value));
            }
        }
        for manager in &self.managers {
            let log = log_since(manager, 0);
            let lines: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("{}:", manager.url);
            lines.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
    }

    /// Waits as [`Cluster::settle`] does, and panics if the cluster does not settle.
    pub(super) fn assert_settled(&self) -> census::Census {
        self.settle().unwrap_or_else(|why| panic!("not settled: {why:?}"))
    }

    /// Runs `etcdctl` against the cluster.
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

/// Returns the part of a manager's log after its first `length` bytes.
pub(super) fn log_since(manager: &Manager, length: usize) -> String {
    let log = std::fs::read(manager.process.log()).unwrap();
    String::from_utf8_lossy(&log[length.min(log.len())..]).into_owned()
}

/// Returns the length of a manager's log in bytes.
pub(super) fn log_length(manager: &Manager) -> usize {
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

fn members(world: &World, network: Option<&Network>, size: usize, extra_args: &[&str]) -> Vec<Member> {
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
        for argument in extra_args {
            spec = spec.arg(*argument);
        }
        if let Some(network) = network {
            spec = network.in_namespace(at, spec);
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
