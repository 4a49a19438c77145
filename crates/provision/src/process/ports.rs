//! Reserves ports of this machine for instances.
//!
//! A reservation is a symbolic link, named like the port, to the owner's directory; creating a link is atomic. Reservations change under one
//! lock, so that managers that share the directory never reserve the same port twice.
//!
//! A bound socket holds a port against other programs, from its reservation until the instance's program starts: the sockets are passed to the
//! process that becomes the program, and exec closes them. Then the program must bind the port itself. If another program is faster, the
//! instance is launched again with another port.

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
    blocking::failed,
    record::{self, LABEL, Label},
};

/// How long to wait for other reservations, each of which takes milliseconds.
const PORTS_LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const STEP: &str = "allocate";

/// The reservations of one directory.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    pub(super) dir: PathBuf,
    pub(super) instances: PathBuf,
    pub(super) range: RangeInclusive<u16>,
    pub(super) bind: IpAddr,
}

impl Ports {
    /// Reserves and holds a port for each of `specs`, preferably the one it had `before`. If the instance is `running`, its program uses the
    /// ports that it had, and only new ones are held. Blocks.
    pub(super) fn reserve(
        &self,
        key: &str,
        specs: &[PortSpec],
        before: &BTreeMap<String, u16>,
        running: bool,
    ) -> Result<(BTreeMap<String, u16>, HeldPorts)> {
        let (mut assigned, mut held) = (BTreeMap::new(), HeldPorts::default());
        if specs.is_empty() {
            return Ok((assigned, held));
        }
        let _lock = self.lock()?;
        for spec in specs {
            let port = match before.get(&spec.name) {
                Some(port) if running && owner(&self.link(*port)).as_deref() == Some(key) => *port,
                Some(port) if self.try_reserve(key, *port, spec.protocol, &mut held)? => *port,
                _ => self.reserve_any(key, spec, &mut held)?,
            };
            assigned.insert(spec.name.clone(), port);
        }
        Ok((assigned, held))
    }

    /// Holds the ports that aren't held yet. The error names a port that another program uses. Blocks.
    pub(super) fn hold(&self, specs: &[PortSpec], ports: &BTreeMap<String, u16>, held: &mut HeldPorts) -> Result<()> {
        for spec in specs {
            let Some(port) = ports.get(&spec.name).filter(|port| !held.ports.contains(port)) else { continue };
            let added = held.add((self.bind, *port).into(), spec.protocol);
            added.map_err(failed(STEP, format!("port {port}")))?;
        }
        Ok(())
    }

    /// Returns one of the ports that a program is bound to, if there is one. Blocks.
    pub(super) fn first_in_use(&self, specs: &[PortSpec], ports: &BTreeMap<String, u16>) -> Option<u16> {
        let ports = specs.iter().filter_map(|spec| Some((*ports.get(&spec.name)?, spec.protocol)));
        ports.into_iter().find(|(port, protocol)| in_use((self.bind, *port).into(), *protocol)).map(|(port, _)| port)
    }

    /// Returns one of the ports that isn't reserved for the instance `key`, if there is one. Blocks.
    pub(super) fn first_not_reserved(&self, key: &str, ports: &BTreeMap<String, u16>) -> Option<u16> {
        ports.values().copied().find(|port| owner(&self.link(*port)).as_deref() != Some(key))
    }

    /// Releases the instance's ports in `before`, except those in `keep`. Blocks.
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
                record::remove(&link).map_err(failed(STEP, format!("releasing port {port}")))?;
            }
        }
        Ok(())
    }

    fn reserve_any(&self, key: &str, spec: &PortSpec, held: &mut HeldPorts) -> Result<u16> {
        let (first, last) = (u32::from(*self.range.start()), u32::from(*self.range.end()));
        let count = (last + 1).saturating_sub(first);
        // Each instance starts at another port, so that reserved ones are rarely tried.
        let start = key
            .bytes()
            .chain(spec.name.bytes())
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        for step in 0..count {
            let port = u16::try_from(first + (start % count + step) % count).unwrap_or(*self.range.end());
            // Skip ports that this instance has reserved under another name.
            if std::fs::symlink_metadata(self.link(port)).is_ok_and(|_| owner(&self.link(port)).as_deref() == Some(key))
            {
                continue;
            }
            if self.try_reserve(key, port, spec.protocol, held)? {
                return Ok(port);
            }
        }
        Err(Error::Provision {
            step: STEP,
            detail: format!("no free port from {first} to {last} for {:?}: all {count} are in use", spec.name),
        })
    }

    /// Reserves the port if no instance has it and no program is bound to it.
    fn try_reserve(&self, key: &str, port: u16, protocol: Protocol, held: &mut HeldPorts) -> Result<bool> {
        let link = self.link(port);
        let mut reserve = || -> io::Result<bool> {
            match owner(&link) {
                Some(other) if other == key => {}
                Some(other) if self.exists(&other) => return Ok(false),
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
        reserve().map_err(failed(STEP, format!("reserving port {port}")))
    }

    fn exists(&self, key: &str) -> bool {
        match record::read::<Label>(&self.instances.join(key), LABEL) {
            Ok(Some(label)) => !label.gone,
            Ok(None) => false,
            // An instance with an unreadable label may be running.
            Err(_) => true,
        }
    }

    fn link(&self, port: u16) -> PathBuf {
        self.dir.join(port.to_string())
    }

    fn lock(&self) -> Result<File> {
        let deadline = Instant::now() + PORTS_LOCK_TIMEOUT;
        let lock_failed = failed(STEP, "locking the ports");
        let file = match File::open(&self.dir) {
            Ok(file) => file,
            Err(error) => return Err(lock_failed(error)),
        };
        loop {
            match record::try_lock(&file) {
                Ok(true) => return Ok(file),
                Ok(false) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(false) => return Err(lock_failed(io::ErrorKind::TimedOut.into())),
                Err(error) => return Err(lock_failed(error)),
            }
        }
    }
}

/// The key of the instance that has the reservation.
fn owner(link: &Path) -> Option<String> {
    Some(std::fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// Held while sockets of ports are open in this process, and while a process is started. Otherwise a child would have copies of the sockets
/// until it calls exec, and an instance could find its own port in use.
static FORK_LOCK: Mutex<()> = Mutex::new(());

/// Starts a process that inherits no socket of a port. Blocks.
pub(super) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _guard = FORK_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Sockets that are bound to ports but don't listen, on their way to the process that becomes the program.
///
/// They are in flight in a socket pair, not open in the manager, for the reason given at [`FORK_LOCK`].
#[derive(Debug, Default)]
pub(super) struct HeldPorts {
    ports: BTreeSet<u16>,
    channel: Option<(UnixStream, UnixStream)>,
}

impl HeldPorts {
    /// Binds a socket to the port. Fails if another program uses the port.
    fn add(&mut self, address: SocketAddr, protocol: Protocol) -> io::Result<()> {
        let (ours, _) = match &mut self.channel {
            Some(channel) => channel,
            none => none.insert(UnixStream::pair()?),
        };
        let _guard = FORK_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = bind(address, protocol)?;
        let sockets = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&sockets));
        rustix::net::sendmsg(ours, &[IoSlice::new(&[0])], &mut rights, SendFlags::empty())?;
        self.ports.insert(address.port());
        Ok(())
    }

    /// The descriptor to pass to the process that becomes the program, which takes the sockets from it with [`HeldPorts::receive`]; `None` if
    /// no port is held. The ports are held until every copy of the descriptor is closed, or the receiver closes the sockets.
    pub(super) fn into_descriptor(self) -> Option<OwnedFd> {
        self.channel.map(|(_, theirs)| theirs.into())
    }

    /// Receives the sockets, which exec closes.
    pub(super) fn receive(channel: &OwnedFd) -> Vec<OwnedFd> {
        let mut held = Vec::new();
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(channel, &mut [IoSliceMut::new(&mut [0])], &mut rights, flags) {
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

/// Binds a socket that doesn't listen.
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
    // SO_REUSEADDR lets the bind succeed while earlier connections are in TIME_WAIT. Without it afterwards, no other socket can bind the port.
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
    fn port_is_held_while_it_is_passed_on() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let listens = |address: SocketAddr| match protocol {
                Protocol::Tcp => TcpListener::bind(address).is_ok(),
                Protocol::Udp => UdpSocket::bind(address).is_ok(),
            };
            let socket = bind((Ipv4Addr::LOCALHOST, 0).into(), protocol).unwrap();
            let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
            assert!(in_use(address, protocol));
            drop(socket);
            let mut held = HeldPorts::default();
            held.add(address, protocol).unwrap();
            assert!(in_use(address, protocol) && !listens(address), "held");
            let sent = held.into_descriptor().unwrap();
            assert!(in_use(address, protocol) && !listens(address), "in flight");
            drop(sent);
            assert!(listens(address), "released");
        }
    }
}
