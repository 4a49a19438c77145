use std::{fmt, net::IpAddr, str::FromStr};

use http::Uri;

/// The address of a server of the API.
///
/// Parsed from `host:port`, `http://host[:port]` (80) or `https://host[:port]` (443, verified against the system's root certificates).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddress(pub(crate) Uri);

/// Why a text is not a [`ServerAddress`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}; expected an address such as localhost:8080, http://localhost:8080 or https://example.org")]
pub struct InvalidAddress {
    problem: &'static str,
}

impl FromStr for ServerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = |problem| InvalidAddress { problem };
        let has_scheme = text.contains("://");
        let uri: Uri = if has_scheme { text.to_owned() } else { format!("http://{text}") }
            .parse()
            .map_err(|_| invalid("not an address"))?;
        let authority = uri.authority().ok_or_else(|| invalid("not an address"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(invalid("the scheme is neither http nor https"));
        }
        if authority.as_str().contains('@') {
            return Err(invalid("the address has a user name, which the API does not support"));
        }
        if authority.host().is_empty() {
            return Err(invalid("the address has no host"));
        }
        // `Uri` treats a port that is not a number as no port.
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        if !port.is_empty() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err(invalid("the port is not a number from 1 to 65535"));
        }
        if !has_scheme && port.is_empty() {
            return Err(invalid("the address has no port"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(invalid("the address has a path or a query, which gRPC does not use"));
        }
        Ok(Self(uri))
    }
}

impl ServerAddress {
    /// Whether connections use TLS.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    /// Whether connections stay on this machine: the host is `localhost` or a loopback address.
    pub(crate) fn is_loopback(&self) -> bool {
        let host = self.0.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn addresses_are_parsed_and_displayed_as_urls() {
        for (text, shown) in [
            ("localhost:8080", "http://localhost:8080"),
            ("10.0.0.1:80", "http://10.0.0.1:80"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("http://manager:8080/", "http://manager:8080"),
            ("http://manager", "http://manager"),
            ("https://ctf.example.org", "https://ctf.example.org"),
        ] {
            assert_eq!(text.parse::<ServerAddress>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn invalid_address_names_the_problem() {
        for (text, problem) in [
            ("", "not an address"),
            ("localhost", "no port"),
            ("[::1]", "no port"),
            ("localhost:http", "not a number"),
            ("localhost:0", "not a number"),
            ("localhost:70000", "not a number"),
            (":8080", "no host"),
            ("ftp://localhost", "neither http nor https"),
            ("http://user:secret@localhost:8080", "has a user name"),
            ("http://localhost:8080/api/v1", "has a path"),
            ("http://localhost:8080?a=b", "a query"),
            ("two words:1", "not an address"),
        ] {
            let error = text.parse::<ServerAddress>().unwrap_err().to_string();
            assert!(error.contains(problem) && !error.contains("secret"), "{text}: {error}");
        }
    }
}
