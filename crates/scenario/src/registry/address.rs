//! Which IP addresses registries may have. Checked when a connection is made, so that a name whose address changes is checked again.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Who can be reached at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Hosts on the Internet.
    Public,
    /// Hosts of the operator's network.
    Private,
    /// This machine.
    Loopback,
    /// No registry: link-local addresses, clouds' metadata services among them, multicast, unspecified and reserved ones.
    Never,
}

impl Reach {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        match address.octets() {
            [127, ..] => Self::Loopback,
            // The metadata service of a cloud, in the range of carriers.
            [100, 100, 100, 200] => Self::Never,
            [10, ..] | [192, 168, ..] | [172, 16..=31, ..] | [100, 64..=127, ..] | [198, 18..=19, ..] => Self::Private,
            [0, ..] | [169, 254, ..] | [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [224..=255, ..] => {
                Self::Never
            }
            _ => Self::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        if let Some(address) = address.to_ipv4_mapped() {
            return Self::of_v4(address);
        }
        let last = |high: u16, low: u16| Self::of_v4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
        match address.segments() {
            [0, 0, 0, 0, 0, 0, 0, 1] => Self::Loopback,
            // NAT64 and 6to4 contain the IPv4 address that is reached.
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => last(high, low),
            // The metadata service of a cloud, in the range of private networks.
            [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => Self::Never,
            [0xfc00..=0xfdff, ..] => Self::Private,
            [0x2001, 0xdb8 | 0, ..] => Self::Never,
            [0x2000..=0x3fff, ..] => Self::Public,
            _ => Self::Never,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Private => "private",
            Self::Loopback => "loopback",
            Self::Never => "link-local or reserved",
        }
    }
}

/// The addresses that a client may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// Those of the Internet.
    Public,
    /// Those of the Internet, of private networks and of this machine: for registries that the operator trusts.
    Trusted,
}

impl Addresses {
    /// # Errors
    /// The address isn't permitted; the text names it.
    pub(crate) fn check(self, address: IpAddr) -> Result<(), Refused> {
        match (Reach::of(address), self) {
            (Reach::Public, _) | (Reach::Private | Reach::Loopback, Self::Trusted) => Ok(()),
            (reach, _) => Err(Refused { address, kind: reach.name() }),
        }
    }
}

/// An address that a registry may not have.
#[derive(Debug, thiserror::Error)]
#[error("the address {address} is {kind}, where no registry may be unless its host is in --registry-allow")]
pub(crate) struct Refused {
    address: IpAddr,
    kind: &'static str,
}

/// Looks names up.
pub(crate) type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Looks names up as the system does.
pub(crate) fn system_lookup() -> Lookup {
    Arc::new(|name| {
        Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|found| found.ip()).collect()) })
    })
}

/// Resolves names to permitted addresses only. A connection is made to exactly the addresses that were checked.
#[derive(Clone)]
pub(crate) struct Resolver {
    pub(crate) lookup: Lookup,
    pub(crate) permitted: Addresses,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (lookup, permitted) = (self.lookup.clone(), self.permitted);
        Box::pin(async move {
            let found = lookup(name.as_str().to_owned()).await?;
            // One refused address refuses all: the others of such a name can't be trusted either.
            found.iter().try_for_each(|address| permitted.check(*address))?;
            let addresses: Addrs = Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn addresses_are_classified() {
        use Reach::{Loopback, Never, Private, Public};
        for (address, expected) in [
            ("8.8.8.8", Public),
            ("140.82.121.34", Public),
            ("2606:50c0:8000::154", Public),
            ("10.1.2.3", Private),
            ("172.16.0.1", Private),
            ("172.31.255.255", Private),
            ("172.32.0.1", Public),
            ("192.168.1.1", Private),
            ("100.64.0.1", Private),
            ("fd12::1", Private),
            ("127.0.0.1", Loopback),
            ("127.9.9.9", Loopback),
            ("::1", Loopback),
            ("::ffff:127.0.0.1", Loopback),
            ("64:ff9b::7f00:1", Loopback),
            ("2002:7f00:1::", Loopback),
            ("169.254.169.254", Never),
            ("::ffff:169.254.169.254", Never),
            ("64:ff9b::a9fe:a9fe", Never),
            ("100.100.100.200", Never),
            ("fd00:ec2::254", Never),
            ("fe80::1", Never),
            ("0.0.0.0", Never),
            ("::", Never),
            ("::127.0.0.1", Never),
            ("224.0.0.1", Never),
            ("ff02::1", Never),
            ("255.255.255.255", Never),
            ("192.0.2.1", Never),
            ("2001:db8::1", Never),
        ] {
            assert_eq!(Reach::of(address.parse().unwrap()), expected, "{address}");
        }
    }

    async fn resolve(resolver: &Resolver) -> Result<Vec<SocketAddr>, String> {
        let resolved = resolver.resolve("registry.test".parse().unwrap()).await;
        resolved.map(Iterator::collect).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn name_whose_address_changes_is_checked_again() {
        let calls = Arc::new(AtomicUsize::new(0));
        let lookup: Lookup = Arc::new(move |_| {
            let first = calls.fetch_add(1, Ordering::Relaxed) == 0;
            let address = if first { "8.8.8.8" } else { "127.0.0.1" };
            Box::pin(async move { Ok(vec![address.parse().unwrap()]) })
        });
        let resolver = Resolver { lookup, permitted: Addresses::Public };
        assert_eq!(resolve(&resolver).await.unwrap(), ["8.8.8.8:0".parse().unwrap()]);
        assert!(resolve(&resolver).await.unwrap_err().contains("127.0.0.1 is loopback"));
    }

    #[tokio::test]
    async fn trusted_hosts_may_be_private_but_never_link_local() {
        for (addresses, permitted, expected) in [
            (&["10.0.0.7"][..], Addresses::Trusted, true),
            (&["127.0.0.1", "::1"], Addresses::Trusted, true),
            (&["10.0.0.7"], Addresses::Public, false),
            (&["8.8.8.8", "10.0.0.7"], Addresses::Public, false),
            (&["169.254.169.254"], Addresses::Trusted, false),
            (&["10.0.0.7", "fe80::1"], Addresses::Trusted, false),
        ] {
            let found: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let lookup: Lookup = Arc::new(move |_| {
                let found = found.clone();
                Box::pin(async move { Ok(found) })
            });
            assert_eq!(resolve(&Resolver { lookup, permitted }).await.is_ok(), expected, "{addresses:?} {permitted:?}");
        }
    }
}
