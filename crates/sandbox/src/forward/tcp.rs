//! Published TCP ports.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen, socket_with, sockopt},
};

use super::{
    Shared,
    connection::{Connection, Progress, reset},
    count,
    network::can_be_source,
    poller::{Interest, Key, Ready},
    sockets::Sockets,
    timers::Timer,
};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 1024;
/// Connections accepted at once, so that open ones get their turn.
const ACCEPTS: usize = 64;
/// How long to accept nothing after the process or the machine ran out of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The first and the longest pause between two looks at whether the program listens. A pause is a quarter longer than the one before, so
/// that a slow start is delayed by a quarter at most.
const FIRST_CHECK: Duration = Duration::from_millis(1);
const LONGEST_CHECK: Duration = Duration::from_millis(100);

/// The published ports and their connections.
#[derive(Debug, Default)]
pub(super) struct TcpPorts {
    ports: Vec<TcpPort>,
    connections: HashMap<u64, Connection>,
    check_pause: Duration,
}

#[derive(Debug)]
struct TcpPort {
    outer: TcpListener,
    inner: u16,
    listens: bool,
    interest: Interest,
}

/// Where a program is connected to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    port: u16,
    address: IpAddr,
    /// The address to try if this one refuses.
    next: Option<IpAddr>,
}

impl Target {
    /// The client's family first: there the program sees the client's address.
    fn first(port: u16, client: IpAddr) -> Self {
        let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
        let (address, next) = if client.is_ipv4() { (v4, v6) } else { (v6, v4) };
        Self { port, address, next: Some(next) }
    }

    /// Starts connecting, if possible from the client's address.
    fn connect(self, client: Option<IpAddr>) -> Result<TcpStream, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let family = if self.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        bind_client(&socket, self.address, client)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match connect(&socket, &SocketAddr::new(self.address, self.port)) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
            Err(error) => Err(error),
        }
    }
}

/// Gives a socket to `target` the client's address, if both are of one family.
pub(super) fn bind_client(socket: &OwnedFd, target: IpAddr, client: Option<IpAddr>) -> Result<(), Errno> {
    match client.filter(|client| client.is_ipv4() == target.is_ipv4() && can_be_source(*client)) {
        Some(client) => {
            if client.is_ipv6() {
                sockopt::set_ipv6_freebind(socket, true)?;
            }
            bind(socket, &SocketAddr::new(client, 0))
        }
        None => Ok(()),
    }
}

impl TcpPorts {
    pub(super) fn add(&mut self, outer: OwnedFd, inner: u16) {
        self.check_pause = FIRST_CHECK;
        self.ports.push(TcpPort { outer: outer.into(), inner, listens: false, interest: Interest::NONE });
    }

    /// Listens on the ports that the program listens on by now.
    pub(super) fn check_listening(&mut self, shared: &mut Shared, now: Instant) -> io::Result<()> {
        if self.ports.iter().all(|port| port.listens) {
            return Ok(());
        }
        let listening = Sockets::listening()?;
        for (index, port) in self.ports.iter_mut().enumerate() {
            if !port.listens && listening.contains(port.inner) {
                // Without it, connections of the previous run in TIME_WAIT refuse this.
                sockopt::set_socket_reuseaddr(&port.outer, true)?;
                listen(&port.outer, BACKLOG)?;
                port.listens = true;
                port.wait(shared, index, Interest::READ)?;
            }
        }
        if self.ports.iter().any(|port| !port.listens) {
            shared.timers.set(now + self.check_pause, Timer::CheckListening);
            self.check_pause = (self.check_pause * 5 / 4).min(LONGEST_CHECK);
        }
        Ok(())
    }

    pub(super) fn accept(&mut self, shared: &mut Shared, index: usize, now: Instant) {
        for _ in 0..ACCEPTS {
            let Some(port) = self.ports.get_mut(index) else { return };
            match acceptfrom_with(&port.outer, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok((outer, client)) => {
                    let client = client.and_then(|client| SocketAddr::try_from(client).ok());
                    let Some(client) = client else { continue };
                    let inner = port.inner;
                    self.open(shared, outer.into(), inner, client.ip().to_canonical(), now);
                }
                Err(Errno::WOULDBLOCK) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    if port.wait(shared, index, Interest::NONE).is_ok() {
                        shared.timers.set(now + ACCEPT_PAUSE, Timer::Accept(index));
                    }
                    return;
                }
                // The client was gone before it was accepted, or a network error of that connection: accept(2).
                Err(_) => {}
            }
        }
    }

    /// Accepts again.
    pub(super) fn resume(&mut self, shared: &mut Shared, index: usize) -> io::Result<()> {
        self.ports.get_mut(index).map_or(Ok(()), |port| port.wait(shared, index, Interest::READ))
    }

    fn open(&mut self, shared: &mut Shared, outer: TcpStream, port: u16, client: IpAddr, now: Instant) {
        if !shared.clients.enter(client) {
            count(&shared.counters.refused, 1);
            return reset(&outer);
        }
        let target = Target::first(port, client);
        let opened = outer.set_nodelay(true).and_then(|()| connect_any(shared, target, client));
        let (inner, target) = match opened {
            Ok(opened) => opened,
            Err(_) => {
                shared.clients.leave(client);
                count(&shared.counters.refused, 1);
                return reset(&outer);
            }
        };
        let id = shared.id();
        count(&shared.counters.opened, 1);
        let mut connection = Connection::new(outer, inner, target, client, now);
        connection.timer = connection.idle_at(shared.limits.idle);
        shared.timers.set(connection.timer, Timer::Connection(id));
        self.proceed(shared, id, connection);
    }

    pub(super) fn ready(&mut self, shared: &mut Shared, id: u64, event: Ready, now: Instant) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        match connection.ready(event, &mut shared.scratch, now) {
            Progress::Open { received, sent } => {
                count(&shared.counters.received, received);
                count(&shared.counters.sent, sent);
                self.proceed(shared, id, connection);
            }
            Progress::Done => close(shared, id, &connection),
            Progress::Refused => {
                let next = connection
                    .connecting
                    .and_then(|target| Some(Target { address: target.next?, next: None, ..target }));
                match next.map(|target| connect_any(shared, target, connection.client)) {
                    Some(Ok((inner, target))) => {
                        connection.retry(inner, target);
                        self.proceed(shared, id, connection);
                    }
                    _ => {
                        count(&shared.counters.refused, 1);
                        close(shared, id, &connection);
                        connection.reset();
                    }
                }
            }
            Progress::Failed => {
                close(shared, id, &connection);
                connection.reset();
            }
        }
    }

    fn proceed(&mut self, shared: &mut Shared, id: u64, mut connection: Connection) {
        if connection.register(&shared.poller, id).is_ok() {
            self.connections.insert(id, connection);
        } else {
            close(shared, id, &connection);
            connection.reset();
        }
    }

    /// Resets the connection if it is idle.
    pub(super) fn expire(&mut self, shared: &mut Shared, id: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let idle_at = connection.idle_at(shared.limits.idle);
        if idle_at > now {
            connection.timer = idle_at;
            shared.timers.set(idle_at, Timer::Connection(id));
        } else if let Some(connection) = self.connections.remove(&id) {
            close(shared, id, &connection);
            connection.reset();
        }
    }

    /// Refuses further clients.
    pub(super) fn close_ports(&mut self) {
        self.ports.clear();
    }

    /// Whether a client has not taken everything yet that was read from the program.
    pub(super) fn holds_bytes(&self) -> bool {
        self.connections.values().any(Connection::holds_bytes)
    }
}

impl TcpPort {
    fn wait(&mut self, shared: &Shared, index: usize, interest: Interest) -> io::Result<()> {
        shared.poller.set(self.outer.as_fd(), Key::Tcp(index), self.interest, interest)?;
        self.interest = interest;
        Ok(())
    }
}

/// Starts connecting to the first address that doesn't refuse at once.
fn connect_any(shared: &Shared, target: Target, client: IpAddr) -> io::Result<(TcpStream, Target)> {
    let source = shared.client_addresses.then_some(client);
    match (target.connect(source), target.next) {
        (Ok(stream), _) => Ok((stream, target)),
        (Err(_), Some(address)) => {
            let target = Target { address, next: None, ..target };
            Ok((target.connect(source)?, target))
        }
        (Err(error), None) => Err(error.into()),
    }
}

fn close(shared: &mut Shared, id: u64, connection: &Connection) {
    shared.timers.cancel(connection.timer, Timer::Connection(id));
    shared.clients.leave(connection.client);
    count(&shared.counters.closed, 1);
}
