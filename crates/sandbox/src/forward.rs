//! Forwards an instance's published ports into its network namespace.
//!
//! A [`Forwarder`] runs on a thread whose network namespace is the instance's. The published sockets were bound in the host's namespace and stay
//! there; the sockets to the program are made by this thread, so they belong to the instance. The program gets no socket of the host.
//!
//! - A TCP port listens once the program listens: until then, clients and readiness probes are refused.
//! - Half-close is forwarded, and an error on one side resets the other.
//! - Memory is bounded: a connection holds at most [`Limits::buffer`] bytes per direction, and is not read while the receiver is slow.
//! - Where [`Setup::client_addresses`] is set, the program sees the client's address (the port is another one).

mod clients;
mod connection;
mod diag;
mod network;
mod poller;
mod sockets;
mod tcp;
mod timers;
mod udp;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub use network::prepare_network;

use clients::Clients;
use poller::{Interest, Key, Poller};
use tcp::TcpPorts;
use timers::{Timer, Timers};
use udp::UdpPorts;

/// How long a stopped forwarder may take to deliver what the program sent before its end.
const DRAIN: Duration = Duration::from_secs(1);

/// The transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port that clients reach, and where the program waits for them.
#[derive(Debug)]
pub struct Published {
    /// A socket that is bound in the host's namespace, and, for TCP, does not listen yet.
    pub outer: OwnedFd,
    /// The port that the program binds in its namespace, on any address or on loopback.
    pub inner: u16,
    /// The protocol of both.
    pub protocol: Protocol,
}

/// What clients may use of a forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections and UDP flows; further ones are refused.
    pub connections: usize,
    /// Open connections and UDP flows of one client: an IPv4 address, or an IPv6 network of 64 bits.
    pub per_client: usize,
    /// A connection that carries nothing for this time is reset.
    pub idle: Duration,
    /// A UDP flow that carries nothing for this time is forgotten.
    pub udp_idle: Duration,
    /// Bytes that are read at once, and held per direction of a connection while the receiver is slow; at least 1.
    pub buffer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            per_client: 256,
            idle: Duration::from_hours(1),
            udp_idle: Duration::from_mins(1),
            buffer: 64 << 10,
        }
    }
}

impl Limits {
    /// Returns how many file descriptors a forwarder of `ports` ports needs. At the process's own limit it accepts nothing until one is free.
    pub const fn descriptors(&self, ports: usize) -> usize {
        self.connections.saturating_mul(2).saturating_add(ports).saturating_add(8)
    }
}

/// What a forwarder has done so far; read by other threads.
#[derive(Debug, Default)]
pub struct Counters {
    opened: AtomicU64,
    closed: AtomicU64,
    refused: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

/// The values of [`Counters`] at one time.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Connections and UDP flows that were accepted.
    pub opened: u64,
    /// Those that have ended.
    pub closed: u64,
    /// Connections and datagrams refused: at a limit, or because the program did not accept them.
    pub refused: u64,
    /// Bytes from clients to the program.
    pub received: u64,
    /// Bytes from the program to clients.
    pub sent: u64,
}

impl Counters {
    /// Returns the present values.
    pub fn read(&self) -> Counts {
        Counts {
            opened: self.opened.load(Ordering::Relaxed),
            closed: self.closed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
        }
    }
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// What a [`Forwarder`] is made of.
#[derive(Debug)]
pub struct Setup {
    /// The published ports.
    pub ports: Vec<Published>,
    /// What clients may use.
    pub limits: Limits,
    /// Whether the program sees the clients' addresses. Requires [`prepare_network`] in the thread's namespace.
    pub client_addresses: bool,
    /// Where to count.
    pub counters: Arc<Counters>,
    /// The forwarder ends once this is readable or closed by its other end.
    pub stop: OwnedFd,
}

/// Copies between published ports and a program, until it is stopped.
#[derive(Debug)]
pub struct Forwarder {
    shared: Shared,
    tcp: TcpPorts,
    udp: UdpPorts,
    stop: OwnedFd,
}

/// What both protocols use.
#[derive(Debug)]
struct Shared {
    poller: Poller,
    timers: Timers,
    clients: Clients,
    counters: Arc<Counters>,
    limits: Limits,
    client_addresses: bool,
    next_id: u64,
    scratch: Vec<u8>,
}

impl Shared {
    const fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl Forwarder {
    /// Prepares the sockets, and starts nothing. Any thread may call it.
    ///
    /// # Errors
    /// If a socket can't be registered: it is closed, or of the wrong kind.
    pub fn new(setup: Setup) -> io::Result<Self> {
        let Setup { ports, limits, client_addresses, counters, stop } = setup;
        let mut shared = Shared {
            poller: Poller::new()?,
            timers: Timers::default(),
            clients: Clients::new(limits.connections, limits.per_client),
            counters,
            limits,
            client_addresses,
            next_id: 0,
            scratch: vec![0; limits.buffer.max(1)],
        };
        let (mut tcp, mut udp) = (TcpPorts::default(), UdpPorts::default());
        for Published { outer, inner, protocol } in ports {
            rustix::io::ioctl_fionbio(&outer, true)?;
            match protocol {
                Protocol::Tcp => tcp.add(outer, inner),
                Protocol::Udp => udp.add(&mut shared, outer, inner)?,
            }
        }
        shared.poller.set(stop.as_fd(), Key::Stop, Interest::NONE, Interest::READ)?;
        Ok(Self { shared, tcp, udp, stop })
    }

    /// Forwards until it is stopped, on a thread whose network namespace is the program's. What the program sent before the stop is delivered
    /// to clients that read it within a second; then all sockets are closed. Blocks.
    ///
    /// # Errors
    /// If a published port can't listen, or the kernel's list of sockets or the poller fails. One connection's errors end that connection alone.
    pub fn run(mut self) -> io::Result<()> {
        let mut drained_by = None;
        self.tcp.check_listening(&mut self.shared, Instant::now())?;
        loop {
            let now = Instant::now();
            let timeout = match drained_by {
                None => self.shared.timers.next().map(|next| next.saturating_duration_since(now)),
                Some(deadline) if now >= deadline => return Ok(()),
                Some(deadline) if self.tcp.holds_bytes() => Some(deadline - now),
                Some(_) => Some(Duration::ZERO),
            };
            let events = self.shared.poller.wait(timeout)?;
            if events.is_empty() && drained_by.is_some() && !self.tcp.holds_bytes() {
                return Ok(());
            }
            let now = Instant::now();
            for event in events {
                match event.key {
                    Key::Stop => {
                        self.shared.poller.set(self.stop.as_fd(), Key::Stop, Interest::READ, Interest::NONE)?;
                        self.tcp.close_ports();
                        drained_by = Some(now + DRAIN);
                    }
                    Key::Tcp(port) => self.tcp.accept(&mut self.shared, port, now),
                    Key::Outer(id) | Key::Inner(id) => self.tcp.ready(&mut self.shared, id, event, now),
                    Key::Udp(port) => self.udp.receive(&mut self.shared, port, now),
                    Key::Flow(id) => self.udp.reply(&mut self.shared, id, now),
                }
            }
            while drained_by.is_none()
                && let Some(timer) = self.shared.timers.pop(now)
            {
                match timer {
                    Timer::CheckListening => self.tcp.check_listening(&mut self.shared, now)?,
                    Timer::Accept(port) => self.tcp.resume(&mut self.shared, port)?,
                    Timer::Connection(id) => self.tcp.expire(&mut self.shared, id, now),
                    Timer::Flow(id) => self.udp.expire(&mut self.shared, id, now),
                }
            }
        }
    }
}
