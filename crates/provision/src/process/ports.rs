//! Which instance has which port of this machine.
//!
//! A reservation is a symbolic link named by the port that leads to the owner's directory: it appears whole or not at all. Reservations
//! change under one lock, so that managers that share the directory never take the same port.
//!
//! Against other programs of the machine a port is held by a socket that is bound to it, from when it is chosen until the instance's
//! program begins: the sockets travel to the process that becomes the program, and are closed by that. From there on the program must bind
//! it itself. Where another was faster, the instance is started again on another port.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use gauntlet_domain::{Error, PortSpec, Protocol, Result};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};

use super::{
    home,
    record::{self, LABEL, Label},
};

/// For how long to wait for others that reserve ports; each takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const STEP: &str = "allocate";

/// The ports of one directory.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    pub(super) dir: PathBuf,
    pub(super) instances: PathBuf,
    pub(super) range: RangeInclusive<u16>,
    pub(super) bind: IpAddr,
}

impl Ports {
    /// Reserves a port for each name, the one it had `before` if it is free, and holds it; if it is `running`, it holds what it had
    /// itself. Blocks.
    pub(super) fn assign(
        &self,
        key: &str,
        specs: &[PortSpec],
        before: &BTreeMap<String, u16>,
        running: bool,
    ) -> Result<(BTreeMap<String, u16>, Held)> {
        let (mut assigned, mut held) = (BTreeMap::new(), Held::default());
        if specs.is_empty() {
            return Ok((assigned, held));
        }
        let _lock = self.lock()?;
        for spec in specs {
            let port = match before.get(&spec.name) {
                Some(port) if running && owner(&self.link(*port)).as_deref() == Some(key) => *port,
                Some(port) if self.take(key, *port, spec.protocol, &mut held)? => *port,
                _ => self.pick(key, spec, &mut held)?,
            };
            assigned.insert(spec.name.clone(), port);
        }
        Ok((assigned, held))
    }

    /// Holds those of the ports that are not held yet; an error names one that another program has. Blocks.
    pub(super) fn hold(&self, specs: &[PortSpec], ports: &BTreeMap<String, u16>, held: &mut Held) -> Result<()> {
        for spec in specs {
            let Some(port) = ports.get(&spec.name).filter(|port| !held.ports.contains(port)) else { continue };
            let added = held.add((self.bind, *port).into(), spec.protocol);
            added.map_err(home::failed(STEP, format!("port {port}")))?;
        }
        Ok(())
    }

    /// One of the ports that another program has, if one does. Blocks.
    pub(super) fn lost(&self, specs: &[PortSpec], ports: &BTreeMap<String, u16>) -> Option<u16> {
        let ports = specs.iter().filter_map(|spec| Some((*ports.get(&spec.name)?, spec.protocol)));
        ports.into_iter().find(|(port, protocol)| in_use((self.bind, *port).into(), *protocol)).map(|(port, _)| port)
    }

    /// One of the ports that is not reserved for that owner, if there is one. Blocks.
    pub(super) fn not_reserved(&self, key: &str, ports: &BTreeMap<String, u16>) -> Option<u16> {
        ports.values().copied().find(|port| owner(&self.link(*port)).as_deref() != Some(key))
    }

    /// Gives back those of that owner's ports that are not kept. Blocks.
    pub(super) fn release(
        &self,
        key: &str,
        before: &BTreeMap<String, u16>,
        keep: &BTreeMap<String, u16>,
    ) -> Result<()> {
        let kept = |port: &u16| keep.values().any(|kept| kept == port);
        for port in before.values().filter(|port| !kept(port)) {
            let link = self.link(*port);
            if owner(&link).as_deref() == Some(key) {
                record::remove(&link).map_err(home::failed(STEP, format!("giving back port {port}")))?;
            }
        }
        Ok(())
    }

    fn pick(&self, key: &str, spec: &PortSpec, held: &mut Held) -> Result<u16> {
        let (first, last) = (u32::from(*self.range.start()), u32::from(*self.range.end()));
        let count = (last + 1).saturating_sub(first);
        // Begins somewhere else for each, so that those that are taken are seldom met.
        let begin = key
            .bytes()
            .chain(spec.name.bytes())
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        for step in 0..count {
            let port = u16::try_from(first + (begin % count + step) % count).unwrap_or(*self.range.end());
            // One that another name of the same instance has is not free either.
            if std::fs::symlink_metadata(self.link(port)).is_ok_and(|_| owner(&self.link(port)).as_deref() == Some(key))
            {
                continue;
            }
            if self.take(key, port, spec.protocol, held)? {
                return Ok(port);
            }
        }
        Err(Error::Provision {
            step: STEP,
            detail: format!("no free port from {first} to {last} for {:?}: all {count} are taken", spec.name),
        })
    }

    /// Takes the port if nobody has it and nothing is bound to it.
    fn take(&self, key: &str, port: u16, protocol: Protocol, held: &mut Held) -> Result<bool> {
        let link = self.link(port);
        let mut reserve = || -> io::Result<bool> {
            match owner(&link) {
                Some(other) if other == key => {}
                Some(other) if self.still_there(&other) => return Ok(false),
                Some(_) => {
                    record::remove(&link)?;
                    std::os::unix::fs::symlink(Path::new("../instances").join(key), &link)?;
                }
                None => std::os::unix::fs::symlink(Path::new("../instances").join(key), &link)?,
            }
            let free = held.add((self.bind, port).into(), protocol).is_ok();
            if !free {
                record::remove(&link)?;
            }
            Ok(free)
        };
        reserve().map_err(home::failed(STEP, format!("reserving port {port}")))
    }

    fn still_there(&self, key: &str) -> bool {
        match record::read::<Label>(&self.instances.join(key), LABEL) {
            Ok(Some(label)) => !label.gone,
            Ok(None) => false,
            // What cannot be read may well be running.
            Err(_) => true,
        }
    }

    fn link(&self, port: u16) -> PathBuf {
        self.dir.join(port.to_string())
    }

    fn lock(&self) -> Result<File> {
        let deadline = Instant::now() + PATIENCE;
        let failed = home::failed(STEP, "locking the ports");
        let file = match File::open(&self.dir) {
            Ok(file) => file,
            Err(error) => return Err(failed(error)),
        };
        loop {
            match record::try_lock(&file) {
                Ok(true) => return Ok(file),
                Ok(false) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(false) => return Err(failed(io::ErrorKind::TimedOut.into())),
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// The key that a reservation leads to.
fn owner(link: &Path) -> Option<String> {
    Some(std::fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// Held while sockets of ports are open here, and by whoever starts a process: else that process would have them too until it becomes its
/// program, and an instance could find its own port in use.
static FORK: Mutex<()> = Mutex::new(());

/// Starts a process that has none of the sockets that are being bound. Blocks.
pub(super) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _guard = FORK.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Ports that are held: sockets bound to them, on which nobody listens, on their way to the process that becomes the program.
#[derive(Debug, Default)]
pub(super) struct Held {
    ports: BTreeSet<u16>,
    way: Option<(UnixStream, UnixStream)>,
}

impl Held {
    /// Binds a socket to the port and sends it ahead; an error if another program has the port.
    fn add(&mut self, address: SocketAddr, protocol: Protocol) -> io::Result<()> {
        let (ours, _) = match &mut self.way {
            Some(way) => way,
            none => none.insert(UnixStream::pair()?),
        };
        let _guard = FORK.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = bind(address, protocol)?;
        let sockets = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&sockets));
        rustix::net::sendmsg(ours, &[IoSlice::new(&[0])], &mut rights, SendFlags::empty())?;
        self.ports.insert(address.port());
        Ok(())
    }

    /// What the process that becomes the program is to be given. The ports are held until all that have it end, or take them over and
    /// close them; `None` if there are none.
    pub(super) fn hand_over(self) -> Option<OwnedFd> {
        self.way.map(|(_, theirs)| theirs.into())
    }

    /// Takes over what [`Self::hand_over`] gave away. The sockets are closed when this process becomes another program.
    pub(super) fn take_over(handed: &OwnedFd) -> Vec<OwnedFd> {
        let mut held = Vec::new();
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(handed, &mut [IoSliceMut::new(&mut [0])], &mut rights, flags) {
                Ok(received) if received.bytes > 0 => {}
                _ => return held,
            }
            for message in rights.drain() {
                if let RecvAncillaryMessage::ScmRights(sockets) = message {
                    held.extend(sockets);
                }
            }
        }
    }
}

/// A socket that keeps the port from others, and on which nobody listens.
fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if protocol == Protocol::Udp {
        rustix::net::bind(&socket, &address)?;
        return Ok(socket);
    }
    // So that connections that were just closed are not in the way; then not any more, so that nobody else binds it beside this one.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    sockopt::set_socket_reuseaddr(&socket, false)?;
    Ok(socket)
}

fn in_use(address: SocketAddr, protocol: Protocol) -> bool {
    bind(address, protocol).is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    #[test]
    fn a_port_is_held_while_it_is_handed_over() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let listens = |address: SocketAddr| match protocol {
                Protocol::Tcp => TcpListener::bind(address).is_ok(),
                Protocol::Udp => UdpSocket::bind(address).is_ok(),
            };
            let socket = bind((Ipv4Addr::LOCALHOST, 0).into(), protocol).unwrap();
            let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
            assert!(in_use(address, protocol));
            drop(socket);
            let mut held = Held::default();
            held.add(address, protocol).unwrap();
            assert!(in_use(address, protocol) && !listens(address), "held");
            let sent = held.hand_over().unwrap();
            assert!(in_use(address, protocol) && !listens(address), "on its way");
            drop(sent);
            assert!(listens(address), "given up");
        }
    }
}
