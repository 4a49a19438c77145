//! How many connections each client has.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

/// Counts open connections and flows, in all and per client.
#[derive(Debug)]
pub(super) struct Clients {
    limit: usize,
    per_client: usize,
    open: usize,
    counts: HashMap<IpAddr, usize>,
}

impl Clients {
    pub(super) fn new(limit: usize, per_client: usize) -> Self {
        Self { limit, per_client, open: 0, counts: HashMap::new() }
    }

    /// Counts one more for `client`, unless a limit is reached.
    pub(super) fn enter(&mut self, client: IpAddr) -> bool {
        let client = network(client);
        if self.open >= self.limit || self.counts.get(&client).is_some_and(|count| *count >= self.per_client) {
            return false;
        }
        self.open += 1;
        *self.counts.entry(client).or_default() += 1;
        true
    }

    /// Counts one less; the client had entered.
    pub(super) fn leave(&mut self, client: IpAddr) {
        let client = network(client);
        self.open = self.open.saturating_sub(1);
        if let Some(count) = self.counts.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&client);
            }
        }
    }
}

/// A client of IPv6 usually has a whole network of 64 bits to choose addresses from.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        IpAddr::V4(address) => address.into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_client_does_not_take_the_places_of_others() {
        let mut clients = Clients::new(3, 2);
        assert!(clients.enter(ip("192.0.2.1")) && clients.enter(ip("::ffff:192.0.2.1")));
        assert!(!clients.enter(ip("192.0.2.1")), "the client's own limit");
        assert!(clients.enter(ip("192.0.2.2")));
        assert!(!clients.enter(ip("192.0.2.3")), "the limit of all");
        clients.leave(ip("192.0.2.1"));
        assert!(clients.enter(ip("192.0.2.3")));
        for client in ["192.0.2.1", "192.0.2.2", "192.0.2.3"] {
            clients.leave(ip(client));
        }
        assert!(clients.counts.is_empty() && clients.open == 0);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_client() {
        let mut clients = Clients::new(9, 1);
        assert!(clients.enter(ip("2001:db8::1")));
        assert!(!clients.enter(ip("2001:db8::ffff:2")));
        assert!(clients.enter(ip("2001:db8:0:1::1")));
    }
}
