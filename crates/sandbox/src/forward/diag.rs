//! Asks the kernel which TCP ports are listened on (`sock_diag`).
//!
//! `/proc/net/tcp` has the same list, but to read it the kernel walks through the table of all connections of the machine, even if it is empty:
//! 4 ms for each family on a small machine. This walks through the listening sockets alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with},
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `1 << TCP_LISTEN`.
const LISTENING: u32 = 1 << 10;
/// Lengths of `struct nlmsghdr`, and of `struct inet_diag_sockid` in a request.
const HEADER: usize = 16;
const SOCKET_ID: usize = 48;

/// The addresses and ports that sockets of the thread's network namespace listen on.
///
/// # Errors
/// `ENOENT` and others if the kernel was built without it.
pub(super) fn listening() -> Result<Vec<(IpAddr, u16)>, Errno> {
    let (flags, protocol) = (SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG));
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        send(&socket, &request(family), SendFlags::empty())?;
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (_, length) = recv(&socket, &mut buffer, RecvFlags::empty())?;
            if read_messages(buffer.get(..length).unwrap_or_default(), &mut found)? {
                break;
            }
        }
    }
    Ok(found)
}

/// `struct inet_diag_req_v2` with its header.
fn request(family: u8) -> Vec<u8> {
    let mut message = Vec::new();
    message.extend(u32::try_from(HEADER + 8 + SOCKET_ID).unwrap_or_default().to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, IPPROTO_TCP, 0, 0]);
    message.extend(LISTENING.to_ne_bytes());
    message.extend([0; SOCKET_ID]);
    message
}

/// Reads the messages of one datagram. Returns whether the list is complete.
fn read_messages(mut bytes: &[u8], found: &mut Vec<(IpAddr, u16)>) -> Result<bool, Errno> {
    while let Some((header, _)) = bytes.split_at_checked(HEADER) {
        let length = field(header, 0).map(u32::from_ne_bytes).and_then(|length| usize::try_from(length).ok());
        let length = length.filter(|length| *length >= HEADER).ok_or(Errno::BADMSG)?;
        let body = bytes.get(HEADER..length).ok_or(Errno::BADMSG)?;
        match field(header, 4).map(u16::from_ne_bytes) {
            Some(NLMSG_DONE) => return Ok(true),
            Some(NLMSG_ERROR) => {
                let code = field(body, 0).map_or(0, i32::from_ne_bytes);
                return Err(Errno::from_raw_os_error(code.saturating_neg()));
            }
            Some(SOCK_DIAG_BY_FAMILY) => found.extend(listener(body)),
            _ => {}
        }
        // Each message begins at a multiple of 4.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The address and port of `struct inet_diag_msg`.
fn listener(body: &[u8]) -> Option<(IpAddr, u16)> {
    let port = u16::from_be_bytes(field(body, 4)?);
    let address = match *body.first()? {
        AF_INET => IpAddr::from(Ipv4Addr::from(field::<4>(body, 8)?)),
        AF_INET6 => IpAddr::from(Ipv6Addr::from(field::<16>(body, 8)?)).to_canonical(),
        _ => return None,
    };
    Some((address, port))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn listening_sockets_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        match listening() {
            Ok(found) => assert!(found.contains(&(address.ip(), address.port())), "{found:?}"),
            Err(error) => assert_eq!(error, Errno::NOENT, "only a kernel without it"),
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read(bytes: Vec<u8>) {
            let _ = read_messages(&bytes, &mut Vec::new());
        }
    }
}
