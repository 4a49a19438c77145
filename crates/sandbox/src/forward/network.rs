//! Prepares an instance's network namespace.

use std::{fs, io, net::IpAddr};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv, send,
        socket_with,
    },
};

/// The kernel gives this index to the loopback interface of every namespace.
const LOOPBACK: u32 = 1;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const RT_TABLE_LOCAL: u8 = 255;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_HOST: u8 = 254;
const RTN_LOCAL: u8 = 2;
const RTA_OIF: u16 = 4;

/// Prepares the calling thread's network namespace, which must be new and the instance's own: brings its loopback interface up, makes every
/// address lead to it (so that a [`super::Forwarder`] can use the clients' addresses, and nothing leaves), and lets every user bind ports
/// below 1024.
///
/// # Errors
/// The step that failed. Without `CAP_NET_ADMIN` over the namespace each fails with `EPERM`.
pub fn prepare_network() -> io::Result<()> {
    let netlink = Netlink::open().map_err(at("netlink socket"))?;
    netlink.request(RTM_NEWLINK, 0, &link_up()).map_err(at("loopback interface up"))?;
    netlink.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &local_route(AF_INET)).map_err(at("IPv4 route"))?;
    match netlink.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &local_route(AF_INET6)) {
        // A kernel without IPv6.
        Err(Errno::AFNOSUPPORT | Errno::OPNOTSUPP) => {}
        result => result.map_err(at("IPv6 route"))?,
    }
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
        .map_err(|error| io::Error::new(error.kind(), format!("ip_unprivileged_port_start: {error}")))
}

fn at(step: &'static str) -> impl FnOnce(Errno) -> io::Error {
    move |errno| {
        let error = io::Error::from(errno);
        io::Error::new(error.kind(), format!("{step}: {error}"))
    }
}

/// Whether a socket to the program may have `client` as its address. Addresses of one link need an interface that the namespace lacks.
pub(super) fn can_be_source(client: IpAddr) -> bool {
    match client {
        IpAddr::V4(address) => !(address.is_unspecified() || address.is_multicast() || address.is_broadcast()),
        IpAddr::V6(address) => !(address.is_unspecified() || address.is_multicast() || address.is_unicast_link_local()),
    }
}

/// `struct ifinfomsg`: the flag "up" is set, the others stay.
fn link_up() -> Vec<u8> {
    let mut message = vec![0; 4];
    for field in [LOOPBACK, IFF_UP, IFF_UP] {
        message.extend(field.to_ne_bytes());
    }
    message
}

/// `struct rtmsg` and the interface: `local 0.0.0.0/0 dev lo` or `local ::/0 dev lo`.
fn local_route(family: u8) -> Vec<u8> {
    let mut message = vec![family, 0, 0, 0, RT_TABLE_LOCAL, RTPROT_STATIC, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0];
    message.extend(8u16.to_ne_bytes());
    message.extend(RTA_OIF.to_ne_bytes());
    message.extend(LOOPBACK.to_ne_bytes());
    message
}

struct Netlink(std::os::fd::OwnedFd);

impl Netlink {
    fn open() -> Result<Self, Errno> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends one request and returns the kernel's answer, which rtnetlink gives before `send` returns.
    fn request(&self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend((16 + body.len() as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(&self.0, &message, SendFlags::empty())?;
        let mut answer = [0; 512];
        let (_, length) = recv(&self.0, &mut answer, RecvFlags::DONTWAIT)?;
        let field = |at: usize, size: usize| answer.get(at..at + size).filter(|_| length >= at + size);
        let is_error = field(4, 2).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes) == Some(NLMSG_ERROR);
        match field(16, 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
            Some(0) if is_error => Ok(()),
            Some(code) if is_error => Err(Errno::from_raw_os_error(-code)),
            _ => Err(Errno::BADMSG),
        }
    }
}
