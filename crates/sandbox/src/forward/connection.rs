//! One TCP connection: a socket to the client, one to the program, and what is in flight between them.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Shutdown, TcpStream},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use rustix::net::sockopt;

use super::{
    poller::{Interest, Key, Poller, Ready},
    tcp::Target,
};

/// The kernel keeps what a closed program hasn't received for as long (`tcp_fin_timeout`).
const AFTER_PROGRAM_CLOSED: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: IpAddr,
    outer: End,
    inner: End,
    /// Where the program is being connected to; none once it is.
    pub(super) connecting: Option<Target>,
    /// From the client to the program.
    up: Direction,
    /// From the program to the client.
    down: Direction,
    active: Instant,
    /// When the idle timer is due.
    pub(super) timer: Instant,
}

/// How a connection goes on after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Open {
        /// Bytes read from the client.
        received: usize,
        /// Bytes read from the program.
        sent: usize,
    },
    /// Both sides closed.
    Done,
    /// Nothing accepts the connection to the program.
    Refused,
    /// Failed: both sides are reset.
    Failed,
}

#[derive(Debug)]
struct End {
    stream: TcpStream,
    interest: Interest,
}

#[derive(Debug, Default)]
struct Direction {
    /// What the receiver did not take yet. The sender is not read meanwhile.
    pending: Vec<u8>,
    written: usize,
    /// The sender sent its last byte, and the receiver was told.
    closed: bool,
}

impl Connection {
    pub(super) fn new(outer: TcpStream, inner: TcpStream, target: Target, client: IpAddr, now: Instant) -> Self {
        let end = |stream| End { stream, interest: Interest::NONE };
        Self {
            client,
            outer: end(outer),
            inner: end(inner),
            connecting: Some(target),
            up: Direction::default(),
            down: Direction::default(),
            active: now,
            timer: now,
        }
    }

    /// Replaces the socket to the program, which refused, by one to another address.
    pub(super) fn retry(&mut self, inner: TcpStream, target: Target) {
        self.inner = End { stream: inner, interest: Interest::NONE };
        self.connecting = Some(target);
    }

    /// Copies what the event allows, at most one buffer per direction.
    pub(super) fn ready(&mut self, event: Ready, scratch: &mut [u8], now: Instant) -> Progress {
        if self.connecting.is_some() {
            match sockopt::socket_error(&self.inner.stream) {
                Ok(Ok(())) => self.connecting = None,
                Ok(Err(rustix::io::Errno::CONNREFUSED)) => return Progress::Refused,
                _ => return Progress::Failed,
            }
        }
        match self.copy(event, scratch) {
            Err(_) => Progress::Failed,
            Ok(_) if self.up.closed && self.down.closed => Progress::Done,
            Ok((received, sent)) => {
                self.active = now;
                Progress::Open { received, sent }
            }
        }
    }

    fn copy(&mut self, event: Ready, scratch: &mut [u8]) -> io::Result<(usize, usize)> {
        let (outer, inner) = (&self.outer.stream, &self.inner.stream);
        let (mut received, mut sent) = (0, 0);
        if matches!(event.key, Key::Outer(_)) {
            if event.write {
                self.down.flush(outer)?;
            }
            if event.read {
                received = self.up.fill(outer, inner, scratch)?;
            }
        } else {
            if event.write {
                self.up.flush(inner)?;
            }
            if event.read {
                sent = self.down.fill(inner, outer, scratch)?;
            }
        }
        Ok((received, sent))
    }

    /// Waits for what the connection needs next.
    pub(super) fn register(&mut self, poller: &Poller, id: u64) -> io::Result<()> {
        let (mut outer, mut inner) = (Interest::NONE, Interest::WRITE);
        if self.connecting.is_none() {
            outer = Interest { read: self.up.wants_input(), write: self.down.is_blocked() };
            inner = Interest { read: self.down.wants_input(), write: self.up.is_blocked() };
        }
        self.outer.set(poller, Key::Outer(id), outer)?;
        self.inner.set(poller, Key::Inner(id), inner)
    }

    pub(super) fn holds_bytes(&self) -> bool {
        self.down.is_blocked()
    }

    /// When the connection is idle, if nothing happens before.
    pub(super) fn idle_at(&self, idle: Duration) -> Instant {
        self.active + if self.down.closed { idle.min(AFTER_PROGRAM_CLOSED) } else { idle }
    }

    /// Closes both sides with a reset.
    pub(super) fn reset(self) {
        reset(&self.outer.stream);
        reset(&self.inner.stream);
    }
}

/// Makes the close of `stream` a reset.
pub(super) fn reset(stream: &TcpStream) {
    // If the option can't be set, the connection is gone already.
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

impl End {
    fn set(&mut self, poller: &Poller, key: Key, interest: Interest) -> io::Result<()> {
        poller.set(self.stream.as_fd(), key, self.interest, interest)?;
        self.interest = interest;
        Ok(())
    }
}

impl Direction {
    const fn is_blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    const fn wants_input(&self) -> bool {
        !self.closed && !self.is_blocked()
    }

    /// Reads once and writes what was read; keeps what the receiver doesn't take.
    fn fill(&mut self, mut from: &TcpStream, to: &TcpStream, scratch: &mut [u8]) -> io::Result<usize> {
        if !self.wants_input() {
            return Ok(0);
        }
        let Some(length) = unless_blocked(from.read(scratch))? else { return Ok(0) };
        if length == 0 {
            self.closed = true;
            to.shutdown(Shutdown::Write)?;
            return Ok(0);
        }
        let bytes = scratch.get(..length).unwrap_or_default();
        let written = write(to, bytes)?;
        if let Some(rest @ [_, ..]) = bytes.get(written..) {
            (self.pending, self.written) = (rest.to_vec(), 0);
        }
        Ok(length)
    }

    fn flush(&mut self, to: &TcpStream) -> io::Result<()> {
        if self.is_blocked() {
            self.written += write(to, self.pending.get(self.written..).unwrap_or_default())?;
            if self.written >= self.pending.len() {
                self.pending = Vec::new();
            }
        }
        Ok(())
    }
}

fn write(mut to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    Ok(unless_blocked(to.write(bytes))?.unwrap_or(0))
}

fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(length) => Ok(Some(length)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
