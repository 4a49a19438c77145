//! Managers on a cluster of etcd members, all real, and what can be done to them.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use gauntlet_coordination::{
    Etcd, EtcdConfig,
    kv::{Get, Keys, Kv as _},
};
use gauntlet_stack::{Process, Ready, Spec, Tool, Tools, http, ports::Reserved};
use gauntlet_telemetry::{Instruments, db::Database};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    census,
    network::{Network, Side},
    scenario::write_scenarios,
};
use crate::harness::{Backend, Manager, World, eventually};

/// How long a replica that went silent keeps what it owns.
pub(super) const LEASE_TTL: Duration = Duration::from_secs(3);

/// How members reach each other, and are reached.
pub(super) enum Between {
    /// On loopback, where nothing can be cut.
    Loopback,
    /// Each in a network namespace; where those cannot be made, on loopback, with members stopped instead of cut off. Said loudly.
    Namespaces,
}

/// One member of the etcd cluster.
pub(super) struct Member {
    pub(super) process: Process,
    pub(super) url: String,
    _reserved: Vec<Reserved>,
}

/// Dropped in this order: managers, then the instances that would outlive them, then what they stood on.
pub(super) struct Cluster {
    pub(super) managers: Vec<Manager>,
    _instances: census::Instances,
    pub(super) members: Vec<Member>,
    /// Why there is none, where there should be one.
    pub(super) network: Option<Result<Network, String>>,
    pub(super) store: Etcd,
    pub(super) world: World,
    patience: AtomicUsize,
}

impl Cluster {
    /// A cluster of that size with more arguments for each member, ready; no manager yet.
    pub(super) fn start(size: usize, between: &Between, more: &[&str]) -> Cluster {
        let world = World::bare(Backend::Embedded);
        write_scenarios(&world);
        let network = match between {
            Between::Loopback => None,
            Between::Namespaces => Some(Network::of(size, &world.path(""))),
        };
        if let Some(Err(why)) = &network {
            eprintln!(
                "\n*** NO NETWORK NAMESPACES HERE: {why}\n*** Partitions are played by stopping members (SIGSTOP) instead. As root, with \
                 iproute2 and util-linux installed, they are real.\n"
            );
        }
        let members = members(&world, network.as_ref().and_then(|network| network.as_ref().ok()), size, more);
        let urls = members.iter().map(|member| member.url.clone());
        let config = EtcdConfig { deadline: Duration::from_secs(4), ..EtcdConfig::new(urls) };
        let store = Etcd::new(&config, Database::etcd(&Instruments::noop())).unwrap();
        let instances = census::Instances(world.path("data/process/instances"));
        Cluster {
            managers: Vec::new(),
            _instances: instances,
            members,
            network,
            store,
            world,
            patience: AtomicUsize::new(0),
        }
    }

    /// Starts more managers: `m1`, `m2` and so on.
    pub(super) fn with_managers(mut self, count: usize) -> Cluster {
        let endpoints: Vec<&str> = self.members.iter().map(|member| member.url.as_str()).collect();
        let environment = [
            ("ETCD_ENDPOINTS", endpoints.join(",")),
            ("LEASE_TTL", format!("{}s", LEASE_TTL.as_secs())),
            ("RECONCILE_EVERY", "1s".to_owned()),
        ];
        for _ in 0..count {
            let name = format!("m{}", self.managers.len() + 1);
            self.managers.push(self.world.manager_with(&name, &environment));
        }
        self
    }

    /// The member that leads, once there is one.
    pub(super) fn leader(&self) -> usize {
        eventually("a member leads", || {
            let leads = |member: &Member| {
                let status = post(&member.url, "/v3/maintenance/status", &json!({})).ok()?;
                (status["leader"] == status["header"]["member_id"]).then_some(())
            };
            self.members.iter().position(|member| leads(member).is_some()).ok_or_else(|| "none leads".to_owned())
        })
    }

    /// A member that does not lead.
    pub(super) fn follower(&self) -> usize {
        (self.leader() + 1) % self.members.len()
    }

    /// Cuts a member off. Without a network it is stopped: then it is cut off from everybody.
    pub(super) fn cut(&self, member: usize, sides: &[Side]) {
        match &self.network {
            Some(Ok(network)) => sides.iter().for_each(|side| network.cut(member, *side)),
            _ => self.members[member].process.signal(Signal::STOP),
        }
    }

    pub(super) fn heal(&self, member: usize, sides: &[Side]) {
        match &self.network {
            Some(Ok(network)) => sides.iter().for_each(|side| network.heal(member, *side)),
            _ => self.members[member].process.signal(Signal::CONT),
        }
    }

    /// What is stored under these words of a key, and not in a lease's way: keys and values.
    pub(super) fn stored(&self, words: &str) -> Result<Vec<(String, Vec<u8>)>, String> {
        let keys = Keys::between(format!("gauntlet/{words} "), format!("gauntlet/{words}!"));
        let page = self.store.page(Get { keys, limit: 0, keys_only: false }, None);
        let page = self.world.runtime.block_on(page).map_err(|error| error.to_string())?;
        Ok(page.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect())
    }

    /// The replica that owns an instance now.
    pub(super) fn owner(&self, challenge: &str, source: &str) -> Result<Option<String>, String> {
        let wanted = format!("gauntlet/live owners {challenge} s {source}");
        let live = self.stored("live owners")?;
        let owner = live.into_iter().find(|(key, _)| *key == wanted);
        Ok(owner.and_then(|(_, value)| {
            serde_json::from_slice::<Value>(&value).ok()?["replica"].as_str().map(str::to_owned)
        }))
    }

    /// Whether every manager says that it is well.
    pub(super) fn all_well(&self) -> Result<(), String> {
        match self.managers.iter().find(|manager| !http::answers(&format!("{}/healthcheck", manager.url))) {
            None => Ok(()),
            Some(manager) => Err(format!("{} is not well", manager.url)),
        }
    }

    /// Waits until nothing is under way and what runs is exactly what is stored, twice in a row.
    pub(super) fn at_rest(&self) -> census::Census {
        let dir = self.world.path("data/process/instances");
        self.patience.store(0, Ordering::Relaxed);
        eventually("all is at rest", || {
            let look = || {
                self.all_well()?;
                for words in ["working", "live", "rollouts"] {
                    if let [(key, _), ..] = self.stored(words)?.as_slice() {
                        return Err(format!("under way: {key}"));
                    }
                }
                census::take(&dir, &self.stored("instances")?)
            };
            match look() {
                Ok(census) if self.patience.fetch_add(1, Ordering::Relaxed) >= 2 => Ok(census),
                Ok(_) => Err("not for long enough".to_owned()),
                Err(why) => {
                    self.patience.store(0, Ordering::Relaxed);
                    Err(why)
                }
            }
        })
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

/// What a manager's log has said since it had that length.
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
        // They are ready when a majority is there: asked below, when all are started.
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
            // On loopback and a disk that is shared with everything else, elections need not be slow to be stable.
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
