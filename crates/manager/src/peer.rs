//! Who is at the other end of a connection. Each request carries its [`Peer`] as an extension.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use gauntlet_access::Scope;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

/// The other end of the connection that a request came in on, and what its listener allows.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: PeerAddress,
    /// The certificate that the client presented, verified against the listener's CA.
    pub(crate) certificate: Option<ClientCertificate>,
    pub(crate) policy: Policy,
}

/// The address of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum PeerAddress {
    Tcp(SocketAddr),
    /// The process at the other end of a unix socket, as the kernel reports it. The process may have exited since.
    Unix {
        uid: u32,
        pid: Option<u32>,
    },
}

impl PeerAddress {
    /// Whether the peer is a process of this machine.
    pub(crate) fn is_loopback(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix { .. } => true,
        }
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { uid, pid: Some(pid) } => write!(f, "unix:uid={uid},pid={pid}"),
            Self::Unix { uid, pid: None } => write!(f, "unix:uid={uid}"),
        }
    }
}

/// What a listener allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Policy {
    /// The scope of callers without credentials; `None`: credentials are required.
    pub(crate) anonymous: Option<Scope>,
}

/// A client's certificate. Clones share it, and its names are parsed once.
#[derive(Clone)]
pub(crate) struct ClientCertificate(Arc<Parsed>);

struct Parsed {
    der: Vec<u8>,
    names: OnceLock<Vec<String>>,
}

impl ClientCertificate {
    /// Takes a certificate in DER form. The caller has verified it.
    pub(crate) fn new(der: impl Into<Vec<u8>>) -> Self {
        Self(Arc::new(Parsed { der: der.into(), names: OnceLock::new() }))
    }

    /// The names of its holder, each prefixed with its kind: `CN:`, `DNS:`, `URI:` or `EMAIL:`. Compare whole texts: a name may contain any
    /// character. Other kinds of names are left out, and so is everything in a certificate that cannot be parsed.
    pub(crate) fn names(&self) -> &[String] {
        self.0.names.get_or_init(|| names(&self.0.der))
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientCertificate").field(&self.names()).finish()
    }
}

fn names(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let mut names: Vec<String> = common.map(|name| format!("CN:{name}")).collect();
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        names.extend(alternatives.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(format!("DNS:{name}")),
            GeneralName::URI(name) => Some(format!("URI:{name}")),
            GeneralName::RFC822Name(name) => Some(format!("EMAIL:{name}")),
            _ => None,
        }));
    }
    names
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn certificate_names_have_their_kind() {
        let mut params = CertificateParams::new(["ctfd.example".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://ctf/ctfd".try_into().unwrap()));
        params.subject_alt_names.push(SanType::Rfc822Name("ops@example".try_into().unwrap()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "platform, O=admins");
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let certificate = ClientCertificate::new(der);
        let expected = ["CN:platform, O=admins", "DNS:ctfd.example", "URI:spiffe://ctf/ctfd", "EMAIL:ops@example"];
        assert_eq!(certificate.names(), expected);
    }

    #[test]
    fn certificate_that_cannot_be_parsed_has_no_names() {
        assert!(ClientCertificate::new(*b"garbage").names().is_empty());
    }

    #[test]
    fn addresses_are_printed_for_logs() {
        assert_eq!(PeerAddress::Tcp(([10, 0, 0, 1], 80).into()).to_string(), "10.0.0.1:80");
        assert_eq!(PeerAddress::Unix { uid: 7, pid: Some(9) }.to_string(), "unix:uid=7,pid=9");
        assert_eq!(PeerAddress::Unix { uid: 7, pid: None }.to_string(), "unix:uid=7");
    }
}
