//! Published UDP ports: each client has a socket of its own to the program, so that answers find their client.

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use super::{
    Shared, count,
    poller::{Interest, Key},
    sockets::Sockets,
    tcp::bind_client,
    timers::Timer,
};

/// Datagrams taken from a socket at once, so that others get their turn.
const DATAGRAMS: usize = 64;
/// The longest datagram of IPv4 and IPv6.
const MAX_DATAGRAM: usize = 64 << 10;
/// How long to rely on what was read of where the program is bound.
const BOUND_FOR: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct UdpPorts {
    ports: Vec<UdpPort>,
    flows: HashMap<u64, Flow>,
    datagram: Vec<u8>,
}

#[derive(Debug)]
struct UdpPort {
    outer: UdpSocket,
    inner: u16,
    flows: HashMap<SocketAddr, u64>,
    /// The families that the program is bound in, and when that was read.
    bound: Option<(Bound, Instant)>,
    /// A program that is bound to `::` refused at `127.0.0.1`.
    v4_refused: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bound {
    v4: bool,
    v6: bool,
}

#[derive(Debug)]
struct Flow {
    port: usize,
    client: SocketAddr,
    inner: UdpSocket,
    active: Instant,
    timer: Instant,
}

impl UdpPorts {
    pub(super) fn add(&mut self, shared: &mut Shared, outer: OwnedFd, inner: u16) -> io::Result<()> {
        self.datagram.resize(MAX_DATAGRAM, 0);
        shared.poller.set(outer.as_fd(), Key::Udp(self.ports.len()), Interest::NONE, Interest::READ)?;
        self.ports.push(UdpPort { outer: outer.into(), inner, flows: HashMap::new(), bound: None, v4_refused: false });
        Ok(())
    }

    /// Forwards datagrams from clients. One that the program's socket has no room for is dropped, as by any router.
    pub(super) fn receive(&mut self, shared: &mut Shared, index: usize, now: Instant) {
        for _ in 0..DATAGRAMS {
            let Some(port) = self.ports.get(index) else { return };
            let (length, client) = match port.outer.recv_from(&mut self.datagram) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => continue,
            };
            let id = match port.flows.get(&client) {
                Some(id) => Some(*id),
                None => self.open(shared, index, client, now),
            };
            let Some(flow) = id.and_then(|id| Some((id, self.flows.get_mut(&id)?))) else {
                count(&shared.counters.refused, 1);
                continue;
            };
            let (id, flow) = flow;
            flow.active = now;
            match flow.inner.send(self.datagram.get(..length).unwrap_or_default()) {
                Ok(_) => count(&shared.counters.received, length),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.refused(shared, id),
            }
        }
    }

    /// Forwards the program's answers.
    pub(super) fn reply(&mut self, shared: &mut Shared, id: u64, now: Instant) {
        for _ in 0..DATAGRAMS {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            match flow.inner.recv(&mut self.datagram) {
                Ok(length) => {
                    flow.active = now;
                    let Some(port) = self.ports.get(flow.port) else { return };
                    // If there is no room or no route, the datagram is lost, as by any router.
                    let answer = self.datagram.get(..length).unwrap_or_default();
                    count(&shared.counters.sent, port.outer.send_to(answer, flow.client).unwrap_or(0));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.refused(shared, id),
            }
        }
    }

    /// Forgets the flow if it is idle.
    pub(super) fn expire(&mut self, shared: &mut Shared, id: u64, now: Instant) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let idle_at = flow.active + shared.limits.udp_idle;
        if idle_at > now {
            flow.timer = idle_at;
            shared.timers.set(idle_at, Timer::Flow(id));
        } else {
            self.close(shared, id);
        }
    }

    fn open(&mut self, shared: &mut Shared, index: usize, client: SocketAddr, now: Instant) -> Option<u64> {
        let port = self.ports.get_mut(index)?;
        let address = client.ip().to_canonical();
        if !shared.clients.enter(address) {
            return None;
        }
        let id = shared.id();
        let opened = connect_inner(shared, port, address, now).and_then(|inner| {
            shared.poller.set(inner.as_fd(), Key::Flow(id), Interest::NONE, Interest::READ)?;
            Ok(inner)
        });
        let Ok(inner) = opened else {
            shared.clients.leave(address);
            return None;
        };
        let timer = now + shared.limits.udp_idle;
        shared.timers.set(timer, Timer::Flow(id));
        count(&shared.counters.opened, 1);
        port.flows.insert(client, id);
        self.flows.insert(id, Flow { port: index, client, inner, active: now, timer });
        Some(id)
    }

    /// The program doesn't receive where it was looked for.
    fn refused(&mut self, shared: &mut Shared, id: u64) {
        count(&shared.counters.refused, 1);
        if let Some(port) = self.flows.get(&id).and_then(|flow| self.ports.get_mut(flow.port)) {
            port.v4_refused = port.bound.is_some_and(|(bound, _)| bound.v6 && !bound.v4);
            port.bound = None;
        }
        self.close(shared, id);
    }

    fn close(&mut self, shared: &mut Shared, id: u64) {
        let Some(flow) = self.flows.remove(&id) else { return };
        if let Some(port) = self.ports.get_mut(flow.port) {
            port.flows.remove(&flow.client);
        }
        shared.timers.cancel(flow.timer, Timer::Flow(id));
        shared.clients.leave(flow.client.ip());
        count(&shared.counters.closed, 1);
    }
}

fn connect_inner(shared: &Shared, port: &mut UdpPort, client: IpAddr, now: Instant) -> io::Result<UdpSocket> {
    let bound = match port.bound {
        Some((bound, read)) if now.saturating_duration_since(read) < BOUND_FOR => bound,
        _ => {
            let sockets = Sockets::bound()?;
            let bound = Bound { v4: sockets.v4.contains(&port.inner), v6: sockets.v6.contains(&port.inner) };
            port.bound = Some((bound, now));
            bound
        }
    };
    // A program that is bound to `::` alone usually receives IPv4 too, and then sees the addresses of clients of IPv4.
    let v6 = bound.v6 && (client.is_ipv6() || !bound.v4 && port.v4_refused);
    let target: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
    bind_client(&socket, target, shared.client_addresses.then_some(client))?;
    connect(&socket, &SocketAddr::new(target, port.inner))?;
    Ok(socket.into())
}
