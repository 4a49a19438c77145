//! Waits for sockets, level-triggered.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    io::Errno,
};

/// Events taken from the kernel at once.
const EVENTS: usize = 256;

/// Which socket an event is about. Identifiers are never used twice, so a late event of a closed socket finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Stop,
    /// A published TCP port.
    Tcp(usize),
    /// A published UDP port.
    Udp(usize),
    /// A connection's socket to the client.
    Outer(u64),
    /// A connection's socket to the program.
    Inner(u64),
    /// A UDP flow's socket to the program.
    Flow(u64),
}

impl Key {
    const fn encode(self) -> u64 {
        match self {
            Self::Stop => 0,
            Self::Tcp(port) => (port as u64) << 3 | 1,
            Self::Udp(port) => (port as u64) << 3 | 2,
            Self::Outer(id) => id << 3 | 3,
            Self::Inner(id) => id << 3 | 4,
            Self::Flow(id) => id << 3 | 5,
        }
    }

    const fn decode(code: u64) -> Self {
        let value = code >> 3;
        match code & 7 {
            1 => Self::Tcp(value as usize),
            2 => Self::Udp(value as usize),
            3 => Self::Outer(value),
            4 => Self::Inner(value),
            5 => Self::Flow(value),
            _ => Self::Stop,
        }
    }
}

/// What to wait for on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Interest {
    pub(super) const NONE: Self = Self { read: false, write: false };
    pub(super) const READ: Self = Self { read: true, write: false };
    pub(super) const WRITE: Self = Self { read: false, write: true };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

/// A socket can be read or written. An error counts as both: the next call on the socket returns it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ready {
    pub(super) key: Key,
    pub(super) read: bool,
    pub(super) write: bool,
}

#[derive(Debug)]
pub(super) struct Poller(OwnedFd);

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Changes what is waited for on `socket`. A socket without interest is not registered: epoll would report its hang-up again and again.
    pub(super) fn set(&self, socket: BorrowedFd<'_>, key: Key, before: Interest, now: Interest) -> io::Result<()> {
        let data = EventData::new_u64(key.encode());
        match (before, now) {
            (before, now) if before == now => {}
            (Interest::NONE, now) => epoll::add(&self.0, socket, data, now.flags())?,
            (_, Interest::NONE) => epoll::delete(&self.0, socket)?,
            (_, now) => epoll::modify(&self.0, socket, data, now.flags())?,
        }
        Ok(())
    }

    /// Returns the events that are there within `timeout`; none if it passes or a signal comes.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Ready>> {
        let mut events = Vec::with_capacity(EVENTS);
        // Rounded up to milliseconds, so that a timer is due when the wait ends.
        let timeout = timeout.map(|timeout| {
            let timeout = Duration::from_millis(timeout.as_nanos().div_ceil(1_000_000) as u64);
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() }
        });
        match epoll::wait(&self.0, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let failed = EventFlags::ERR | EventFlags::HUP;
        let ready = events.into_iter().map(|event: epoll::Event| {
            let (flags, data) = (event.flags, event.data);
            let is = |flag| flags.intersects(flag | failed);
            Ready { key: Key::decode(data.u64()), read: is(EventFlags::IN), write: is(EventFlags::OUT) }
        });
        Ok(ready.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_encoding() {
        for key in [Key::Stop, Key::Tcp(0), Key::Udp(15), Key::Outer(1), Key::Inner(1), Key::Flow(u64::MAX >> 3)] {
            assert_eq!(Key::decode(key.encode()), key);
        }
    }
}
