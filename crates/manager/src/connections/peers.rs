//! What one peer address may use: connections, and calls in a time.
//!
//! A platform is one peer, and so is a proxy: the limits are far above what either needs. They keep one machine from using up what all share.
//! Processes of this machine are not limited, so that nothing locks out the operator.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::peer::PeerAddress;

/// How many addresses the table of calls holds. More than these share one entry.
const MAX_CALLERS: usize = 10_000;
/// How many seconds of its rate a caller may use at once.
const BURST: f64 = 2.0;

/// The limits of each peer address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerLimits {
    /// Open connections.
    pub(crate) connections: usize,
    /// Calls per second, on average; for a moment, twice as many.
    pub(crate) calls: u32,
}

/// The peers of one listener. Clones share them.
#[derive(Clone)]
pub(super) struct Peers(Arc<Shared>);

struct Shared {
    limits: PeerLimits,
    /// Open connections. Has no more entries than there are connections.
    connections: Mutex<HashMap<Source, usize>>,
    /// When the calls so far will have been made at the average rate; no entry: in the past.
    calls: Mutex<HashMap<Source, Instant>>,
}

/// Where peers come from: an address, or the network of 64 bits that one IPv6 host may use. `None`: all those beyond the size of the table.
type Source = Option<IpAddr>;

fn source(address: PeerAddress) -> Source {
    let PeerAddress::Tcp(address) = address else { return None };
    Some(match address.ip().to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    })
}

impl Peers {
    pub(super) fn new(limits: PeerLimits) -> Self {
        Self(Arc::new(Shared { limits, connections: Mutex::default(), calls: Mutex::default() }))
    }

    /// Counts a connection until the guard is dropped. Returns `None` if the peer has as many as it may have.
    pub(super) fn connect(&self, address: PeerAddress) -> Option<Connected> {
        if address.is_loopback() {
            return Some(Connected { peers: self.clone(), source: None });
        }
        let source = source(address);
        let mut connections = self.connections();
        let open = connections.entry(source).or_default();
        if *open >= self.0.limits.connections {
            return None;
        }
        *open += 1;
        drop(connections);
        Some(Connected { peers: self.clone(), source })
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<Source, usize>> {
        // Poisoning does no harm: no update is left half done.
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call.
    ///
    /// # Errors
    /// The peer makes too many; the value is when it may make the next.
    pub(super) fn call(&self, address: PeerAddress, now: Instant) -> Result<(), Duration> {
        if address.is_loopback() {
            return Ok(());
        }
        let each = Duration::from_secs(1) / self.0.limits.calls.max(1);
        let mut calls = self.0.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let mut source = source(address);
        if calls.len() >= MAX_CALLERS && !calls.contains_key(&source) {
            // A caller whose calls are all in the past is as good as unknown.
            calls.retain(|_, until| *until > now);
            if calls.len() >= MAX_CALLERS {
                source = None;
            }
        }
        let until = calls.entry(source).or_insert(now);
        let next = (*until).max(now) + each;
        let excess = next.saturating_duration_since(now).saturating_sub(Duration::from_secs_f64(BURST));
        if excess > Duration::ZERO {
            return Err(excess);
        }
        *until = next;
        Ok(())
    }
}

/// An open connection.
pub(super) struct Connected {
    peers: Peers,
    source: Source,
}

impl Drop for Connected {
    fn drop(&mut self) {
        if self.source.is_none() {
            return;
        }
        let mut connections = self.peers.connections();
        if let Some(open) = connections.get_mut(&self.source) {
            *open -= 1;
            if *open == 0 {
                connections.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn peers(connections: usize, calls: u32) -> Peers {
        Peers::new(PeerLimits { connections, calls })
    }

    fn tcp(address: &str) -> PeerAddress {
        PeerAddress::Tcp((address.parse::<IpAddr>().unwrap(), 1).into())
    }

    #[test]
    fn connections_of_each_address_are_limited() {
        let peers = peers(2, 1);
        let open: Vec<_> = (0..2).map(|_| peers.connect(tcp("10.0.0.1")).unwrap()).collect();
        assert!(peers.connect(tcp("10.0.0.1")).is_none() && peers.connect(tcp("::ffff:10.0.0.1")).is_none());
        assert!(peers.connect(tcp("10.0.0.2")).is_some());
        drop(open);
        assert!(peers.connections().is_empty());
        assert!(peers.connect(tcp("10.0.0.1")).is_some());
    }

    #[test]
    fn ipv6_host_is_one_peer_whatever_address_of_its_network_it_uses() {
        let peers = peers(1, 1);
        let _open = peers.connect(tcp("2001:db8::1")).unwrap();
        assert!(peers.connect(tcp("2001:db8::ffff:2")).is_none());
        assert!(peers.connect(tcp("2001:db8:0:1::1")).is_some());
    }

    #[test]
    fn processes_of_this_machine_are_not_limited() {
        let peers = peers(0, 1);
        let now = Instant::now();
        for address in [tcp("127.0.0.1"), tcp("::1"), PeerAddress::Unix { uid: 0, pid: None }] {
            assert!(peers.connect(address).is_some());
            assert!((0..100).all(|_| peers.call(address, now).is_ok()));
        }
    }

    #[test]
    fn calls_are_limited_to_a_rate_after_a_burst() {
        let (peers, peer, start) = (peers(1, 10), tcp("10.0.0.1"), Instant::now());
        assert!((0..20).all(|_| peers.call(peer, start).is_ok()));
        assert_eq!(peers.call(peer, start), Err(Duration::from_millis(100)));
        assert!(peers.call(tcp("10.0.0.2"), start).is_ok());
        let later = start + Duration::from_millis(100);
        assert!(peers.call(peer, later).is_ok() && peers.call(peer, later).is_err());
        let rested = start + Duration::from_mins(1);
        assert!((0..20).all(|_| peers.call(peer, rested).is_ok()) && peers.call(peer, rested).is_err());
    }

    #[test]
    fn table_of_callers_is_bounded() {
        let (peers, start) = (peers(1, 1), Instant::now());
        for number in 0..2 * u32::try_from(MAX_CALLERS).unwrap() {
            let _ = peers.call(PeerAddress::Tcp((IpAddr::V4(number.wrapping_add(1 << 24).into()), 1).into()), start);
        }
        assert_eq!(peers.0.calls.lock().unwrap().len(), MAX_CALLERS + 1);
        let later = start + Duration::from_mins(1);
        assert!(peers.call(tcp("10.9.9.9"), later).is_ok());
        assert_eq!(peers.0.calls.lock().unwrap().len(), 1);
    }
}
