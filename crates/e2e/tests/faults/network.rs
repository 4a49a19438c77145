//! A network of namespaces, in which members of a cluster can be cut off: from each other, from their clients, or from both.
//!
//! Each member has a namespace of its own with two interfaces, one for clients and one for peers, plugged into two bridges in a namespace
//! between them. To cut is to unplug: what is sent is lost, and nobody is told. A namespace lives as long as a process in it, and with it go
//! its interfaces, so that nothing is left however the test ends.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gauntlet_stack::{Process, Ready, Spec, Tool, Tools, ports::Reserved};

/// What a member can be cut off from.
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

/// The namespaces. The addresses are of the range that is set aside for tests of networks (RFC 2544).
pub(super) struct Network {
    switch: Process,
    members: Vec<Process>,
    third: u8,
}

impl Network {
    /// Needs root, and `ip`, `unshare` and `nsenter`; the error says what is missing.
    pub(super) fn of(size: usize, dir: &Path) -> Result<Network, String> {
        // Its number is nobody else's on this machine for now: so are the addresses made of it.
        let reserved = Reserved::any().map_err(|error| error.to_string())?;
        let (third, name) = ((reserved.number() % 251) as u8, format!("gauntlet{}", reserved.number()));
        let switch = namespace("switch", dir)?;
        let members = (0..size).map(|at| namespace(&format!("m{at}"), dir)).collect::<Result<Vec<_>, _>>()?;
        let network = Network { switch, members, third };
        for bridge in ["clients", "peers"] {
            network.ip(&format!("link add {bridge} type bridge"))?;
            network.ip(&format!("link set {bridge} up"))?;
        }
        for at in 0..size {
            for side in Side::BOTH {
                let (letter, member) = (side.letter(), pid(&network.members[at])?);
                network.ip(&format!("link add {letter}{at} type veth peer name {letter} netns {member}"))?;
                network.plug(at, side)?;
                network.ip(&format!("link set {letter}{at} up"))?;
                let address = network.address(at, side);
                within(&network.members[at], &format!("address add {address}/24 dev {letter}"))?;
                within(&network.members[at], &format!("link set {letter} up"))?;
            }
            within(&network.members[at], "link set lo up")?;
        }
        // The way from here to the members' client side.
        let init = std::process::id();
        network.ip(&format!("link add here type veth peer name {name} netns {init}"))?;
        network.ip("link set here master clients")?;
        network.ip("link set here up")?;
        run(&ip()?, &format!("address add 198.18.{third}.254/24 dev {name}"))?;
        run(&ip()?, &format!("link set {name} up"))?;
        Ok(network)
    }

    pub(super) fn address(&self, member: usize, side: Side) -> String {
        let second = if side == Side::Clients { 18 } else { 19 };
        format!("198.{second}.{}.{}", self.third, member + 1)
    }

    /// Runs what the spec says in a member's namespace.
    pub(super) fn enter(&self, member: usize, spec: Spec) -> Spec {
        let pid = pid(&self.members[member]).unwrap();
        let mut args: Vec<_> = ["-t", &pid.to_string(), "-n", "--"].map(Into::into).into();
        args.push(spec.program.clone().into_os_string());
        args.extend(spec.args);
        Spec { program: "nsenter".into(), args, ..spec }
    }

    pub(super) fn cut(&self, member: usize, side: Side) {
        self.ip(&format!("link set {}{member} nomaster", side.letter())).unwrap();
    }

    pub(super) fn heal(&self, member: usize, side: Side) {
        self.plug(member, side).unwrap();
    }

    fn plug(&self, member: usize, side: Side) -> Result<(), String> {
        let bridge = if side == Side::Clients { "clients" } else { "peers" };
        self.ip(&format!("link set {}{member} master {bridge}", side.letter()))
    }

    fn ip(&self, arguments: &str) -> Result<(), String> {
        within(&self.switch, arguments)
    }
}

/// A process that does nothing in a namespace of its own.
fn namespace(name: &str, dir: &Path) -> Result<Process, String> {
    let mut spec = Spec::new(&format!("namespace {name}"), "unshare", dir.join("network.log"), Ready::Spawned)
        .arg("-n")
        .arg("sleep")
        .arg("infinity");
    spec.stop_within = Duration::from_millis(200);
    let log = spec.log.clone();
    let mut process = Process::run(spec).map_err(|error| {
        // What it says itself says it best.
        let said = std::fs::read_to_string(log).unwrap_or_default();
        said.lines().next_back().map_or_else(|| error.to_string(), str::to_owned)
    })?;
    let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let (ours, pid) = (link("self"), pid(&process)?.to_string());
    while process.is_running() {
        if link(&pid).is_some_and(|its| Some(its) != ours) {
            return Ok(process);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!("`unshare -n`: {}", std::fs::read_to_string(process.log()).unwrap_or_default().trim()))
}

fn pid(process: &Process) -> Result<u32, String> {
    process.id().ok_or_else(|| "a namespace is gone".to_owned())
}

fn within(namespace: &Process, arguments: &str) -> Result<(), String> {
    run("nsenter", &format!("-t {} -n {} {arguments}", pid(namespace)?, ip()?))
}

/// Where it is.
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
