//! A network of namespaces, in which cluster members can be partitioned from each other, from their clients, or from both.
//!
//! Each member has its own namespace with two interfaces, one for clients and one for peers. They are attached to two bridges in a switch
//! namespace. A partition detaches an interface, so packets are dropped silently. The kernel removes a namespace and its interfaces with the
//! last process in it, so nothing is left behind even if the test is killed.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gauntlet_stack::{Process, Ready, Spec, Tool, Tools, ports::Reserved};

/// The other end of a member's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Clients,
    Peers,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::Clients, Side::Peers];

    fn letter(self) -> char {
        match self {
            Side::Clients => 'c',
            Side::Peers => 'p',
        }
    }
}

/// The namespaces. Addresses are from the range reserved for network tests (RFC 2544).
pub(super) struct Network {
    switch: Process,
    members: Vec<Process>,
    third_octet: u8,
}

impl Network {
    /// Creates the namespaces. Needs root, `ip`, `unshare` and `nsenter`.
    ///
    /// # Errors
    /// What is missing or failed.
    pub(super) fn create(size: usize, dir: &Path) -> Result<Network, String> {
        // A reserved port number is unique on this machine, so tests that run at the same time rarely share addresses.
        let reserved = Reserved::any().map_err(|error| error.to_string())?;
        let (third_octet, name) = ((reserved.number() % 251) as u8, format!("gauntlet{}", reserved.number()));
        let switch = spawn_namespace("switch", dir)?;
        let members = (0..size).map(|at| spawn_namespace(&format!("m{at}"), dir)).collect::<Result<Vec<_>, _>>()?;
        let network = Network { switch, members, third_octet };
        for bridge in ["clients", "peers"] {
            network.ip(&format!("link add {bridge} type bridge"))?;
            network.ip(&format!("link set {bridge} up"))?;
        }
        for at in 0..size {
            for side in Side::BOTH {
                let (letter, member) = (side.letter(), pid(&network.members[at])?);
                network.ip(&format!("link add {letter}{at} type veth peer name {letter} netns {member}"))?;
                network.attach(at, side)?;
                network.ip(&format!("link set {letter}{at} up"))?;
                let address = network.address(at, side);
                ip_in(&network.members[at], &format!("address add {address}/24 dev {letter}"))?;
                ip_in(&network.members[at], &format!("link set {letter} up"))?;
            }
            ip_in(&network.members[at], "link set lo up")?;
        }
        // Connects the namespace of the test to the members' client side.
        let init = std::process::id();
        network.ip(&format!("link add here type veth peer name {name} netns {init}"))?;
        network.ip("link set here master clients")?;
        network.ip("link set here up")?;
        run(&ip()?, &format!("address add 198.18.{third_octet}.254/24 dev {name}"))?;
        run(&ip()?, &format!("link set {name} up"))?;
        Ok(network)
    }

    pub(super) fn address(&self, member: usize, side: Side) -> String {
        let second = if side == Side::Clients { 18 } else { 19 };
        format!("198.{second}.{}.{}", self.third_octet, member + 1)
    }

    /// Returns the spec, changed to run in a member's namespace.
    pub(super) fn in_namespace(&self, member: usize, spec: Spec) -> Spec {
        let pid = pid(&self.members[member]).unwrap();
        let mut args: Vec<_> = ["-t", &pid.to_string(), "-n", "--"].map(Into::into).into();
        args.push(spec.program.clone().into_os_string());
        args.extend(spec.args);
        Spec { program: "nsenter".into(), args, ..spec }
    }

    pub(super) fn disconnect(&self, member: usize, side: Side) {
        self.ip(&format!("link set {}{member} nomaster", side.letter())).unwrap();
    }

    pub(super) fn reconnect(&self, member: usize, side: Side) {
        self.attach(member, side).unwrap();
    }

    fn attach(&self, member: usize, side: Side) -> Result<(), String> {
        let bridge = if side == Side::Clients { "clients" } else { "peers" };
        self.ip(&format!("link set {}{member} master {bridge}", side.letter()))
    }

    fn ip(&self, arguments: &str) -> Result<(), String> {
        ip_in(&self.switch, arguments)
    }
}

/// Starts an idle process in a new network namespace.
fn spawn_namespace(name: &str, dir: &Path) -> Result<Process, String> {
    let mut spec = Spec::new(&format!("namespace {name}"), "unshare", dir.join("network.log"), Ready::Spawned)
        .arg("-n")
        .arg("sleep")
        .arg("infinity");
    spec.stop_within = Duration::from_millis(200);
    let log = spec.log.clone();
    let mut process = Process::run(spec).map_err(|error| {
        // The output of `unshare` gives the cause.
        let output = std::fs::read_to_string(log).unwrap_or_default();
        output.lines().next_back().map_or_else(|| error.to_string(), str::to_owned)
    })?;
    let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let (own, pid) = (link("self"), pid(&process)?.to_string());
    while process.is_running() {
        if link(&pid).is_some_and(|other| Some(other) != own) {
            return Ok(process);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!("`unshare -n`: {}", std::fs::read_to_string(process.log()).unwrap_or_default().trim()))
}

fn pid(process: &Process) -> Result<u32, String> {
    process.id().ok_or_else(|| "the process of a namespace has exited".to_owned())
}

fn ip_in(namespace: &Process, arguments: &str) -> Result<(), String> {
    run("nsenter", &format!("-t {} -n {} {arguments}", pid(namespace)?, ip()?))
}

/// Returns the path of `ip`.
fn ip() -> Result<String, String> {
    let ip = Tools::from_env().require(Tool::Ip).map_err(|error| error.to_string())?;
    Ok(ip.display().to_string())
}

fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program).args(arguments.split(' ')).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`{program} {arguments}`: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
