//! The kernel's lists of sockets of the thread's network namespace.
//!
//! Reading a list disturbs no program, whereas a probing connection would take the place of the only client that some programs serve.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, ErrorKind, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// More than a list of listening sockets has; bounds the time that a program can make a reader spend.
const MAX_LIST_BYTES: u64 = 1 << 20;
/// The state of a listening socket (`TCP_LISTEN`).
const LISTEN: &str = "0A";

/// The ports that a connection to `127.0.0.1` or `::1` reaches.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Sockets {
    pub(super) v4: BTreeSet<u16>,
    pub(super) v6: BTreeSet<u16>,
}

impl Sockets {
    /// Returns the TCP ports that are listened on.
    pub(super) fn listening() -> io::Result<Self> {
        let Ok(found) = super::diag::listening() else { return Self::read("tcp", Some(LISTEN)) };
        let mut sockets = Self::default();
        found.into_iter().for_each(|(address, port)| sockets.add(address, port));
        Ok(sockets)
    }

    /// Returns the UDP ports that are bound.
    pub(super) fn bound() -> io::Result<Self> {
        Self::read("udp", None)
    }

    pub(super) fn contains(&self, port: u16) -> bool {
        self.v4.contains(&port) || self.v6.contains(&port)
    }

    fn read(protocol: &str, state: Option<&str>) -> io::Result<Self> {
        let mut sockets = Self::default();
        for path in [format!("/proc/thread-self/net/{protocol}"), format!("/proc/thread-self/net/{protocol}6")] {
            match File::open(path) {
                Ok(file) => sockets.parse(BufReader::new(file.take(MAX_LIST_BYTES)), state)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sockets)
    }

    /// Stops at the first socket in another state: the kernel lists those that listen first.
    fn parse(&mut self, list: impl io::BufRead, state: Option<&str>) -> io::Result<()> {
        for line in list.lines().skip(1) {
            let line = line?;
            let mut fields = line.split_ascii_whitespace();
            let local = fields.nth(1);
            if state.is_some() && fields.nth(1) != state {
                break;
            }
            if let Some((address, port)) = local.and_then(address) {
                self.add(address, port);
            }
        }
        Ok(())
    }

    /// Adds the port if a connection to loopback reaches the address.
    fn add(&mut self, address: IpAddr, port: u16) {
        match address {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED | Ipv4Addr::LOCALHOST) => self.v4.insert(port),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED | Ipv6Addr::LOCALHOST) => self.v6.insert(port),
            _ => false,
        };
    }
}

/// Parses `0100007F:1F90`: words of the address in the machine's byte order, and the port.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut octets = [0; 16];
            for (at, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            IpAddr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::net::{TcpListener, UdpSocket};

    use proptest::prelude::*;

    use super::*;

    fn parse(list: &str, state: Option<&str>) -> Sockets {
        let mut sockets = Sockets::default();
        sockets.parse(list.as_bytes(), state).unwrap();
        sockets
    }

    #[test]
    fn sockets_of_this_machine_are_found() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert!(Sockets::listening().unwrap().v4.contains(&v4.local_addr().unwrap().port()));
        assert!(Sockets::bound().unwrap().v4.contains(&udp.local_addr().unwrap().port()));
        if let Ok(v6) = TcpListener::bind("[::1]:0") {
            assert!(Sockets::listening().unwrap().v6.contains(&v6.local_addr().unwrap().port()));
        }
    }

    #[test]
    fn only_reachable_listening_sockets_count() {
        let list = "  sl  local_address rem_address   st\n\
             0: 0100007F:1F90 00000000:0000 0A 0\n\
             1: 00000000:1F91 00000000:0000 0A 0\n\
             2: 0200007F:1F92 00000000:0000 0A 0\n\
             3: 00000000000000000000000000000000:1F93 0:0 0A 0\n\
             4: 0000000000000000FFFF00000100007F:1F94 0:0 0A 0\n\
             5: 0100007F:1F95 0100007F:2000 01 0\n";
        if cfg!(target_endian = "little") {
            let sockets = parse(list, Some(LISTEN));
            assert_eq!(sockets.v4, [0x1f90, 0x1f91, 0x1f94].into());
            assert_eq!(sockets.v6, [0x1f93].into());
            assert_eq!(parse(list, None).v4, [0x1f90, 0x1f91, 0x1f94, 0x1f95].into());
        }
    }

    proptest! {
        #[test]
        fn any_list_is_read(list in "[ 0-9A-F:\\né]{0,200}") {
            parse(&list, Some(LISTEN));
            parse(&list, None);
        }
    }
}
