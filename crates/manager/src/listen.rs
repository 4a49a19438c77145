//! The listeners: where the API is served, and what callers need there.
//!
//! A caller of the API can run code, so callers off this machine need credentials, and credentials need TLS: a configuration without them is
//! refused at start unless the operator says so explicitly.

pub(crate) mod flags;
pub(crate) mod socket;
pub(crate) mod tls;
mod unix;
mod url;

use std::{fmt, net::SocketAddr, path::PathBuf};

use anyhow::Result;
use gauntlet_access::Scope;
use socket::Socket;
use tls::{Certificates, RELOAD_INTERVAL, TlsFiles};
use url::ListenUrl;

use crate::{peer::Policy, tasks::Tasks};

/// Where a listener listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Tcp(SocketAddr),
    Tls(SocketAddr),
    /// A unix socket with the permission bits of its file.
    Unix {
        path: PathBuf,
        mode: u32,
    },
}

impl Endpoint {
    /// Whether only this machine reaches it.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) | Self::Tls(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix { .. } => true,
        }
    }

    /// The same kind of endpoint at another address.
    fn at(&self, address: SocketAddr) -> Self {
        match self {
            Self::Tcp(_) => Self::Tcp(address),
            Self::Tls(_) => Self::Tls(address),
            Self::Unix { .. } => self.clone(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Tls(address) => write!(f, "tls://{address}"),
            Self::Unix { path, .. } => write!(f, "unix://{}", path.display()),
        }
    }
}

/// A listener whose configuration has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) endpoint: Endpoint,
    pub(crate) policy: Policy,
    /// Whether the TLS handshake fails without a client certificate.
    pub(crate) requires_certificate: bool,
}

impl Listener {
    /// Whether what callers send can be read on the network.
    pub(crate) fn is_exposed(&self) -> bool {
        matches!(self.endpoint, Endpoint::Tcp(_)) && !self.endpoint.is_local()
    }
}

/// What the rest of the configuration provides for listeners.
#[derive(Debug, Clone, Copy, Default)]
struct Means {
    /// `--insecure-no-auth`.
    insecure: bool,
    /// Whether callers can have credentials.
    authentication: bool,
    /// `--tls-cert` and `--tls-key`.
    certificate: bool,
    /// `--tls-client-ca`.
    client_ca: bool,
}

/// Gives each listener its policy.
///
/// # Errors
/// A listener would let callers off this machine in without credentials, would read credentials in plaintext, or could not be used by anybody.
/// The text names the listener and the fixes.
fn check(urls: &[ListenUrl], means: Means) -> Result<Vec<Listener>, String> {
    urls.iter().map(|url| check_one(url, means).map_err(|problem| format!("{url}: {problem}"))).collect()
}

fn check_one(url: &ListenUrl, means: Means) -> Result<Listener, String> {
    let (local, tls) = (url.endpoint.is_local(), matches!(url.endpoint, Endpoint::Tls(_)));
    if tls && !means.certificate {
        return Err("TLS needs a certificate; pass --tls-cert and --tls-key".into());
    }
    if url.requires_certificate && !means.client_ca {
        return Err("client certificates are checked against a CA; pass --tls-client-ca".into());
    }
    if !local && !tls && !means.insecure {
        return Err(format!(
            "plaintext HTTP that other machines reach: every caller could run code, and credentials could be read on the network. Use \
             {} with --tls-cert, --tls-key and authentication; or listen on 127.0.0.1 or unix:///PATH behind a proxy or mesh; or, on a network \
             where every machine is trusted, pass --insecure-no-auth",
            url.endpoint.to_string().replacen("tcp", "tls", 1)
        ));
    }
    let anonymous = url.anonymous.unwrap_or(match (local, tls) {
        (true, _) | (false, true) if means.authentication => None,
        (false, true) if !means.insecure => None,
        _ => Some(Scope::Admin),
    });
    if anonymous.is_none() && !local && !tls {
        return Err("credentials are not accepted over plaintext, so nobody could call; use tls://".into());
    }
    if anonymous.is_none() && !means.authentication {
        return Err("callers need credentials, and no authentication is configured; configure it, or, on a trusted network, pass \
                    --insecure-no-auth"
            .into());
    }
    if anonymous.is_some() && !local && !url.requires_certificate && !means.insecure {
        return Err(
            "anonymous callers from other machines; leave out `anonymous`, add client-certificate=required with \
                    --tls-client-ca, or pass --insecure-no-auth"
                .into(),
        );
    }
    Ok(Listener {
        endpoint: url.endpoint.clone(),
        policy: Policy { anonymous },
        requires_certificate: url.requires_certificate,
    })
}

/// Binds all listeners of the API, and keeps their certificates current until the tasks stop.
///
/// # Errors
/// An address or a TLS file cannot be used; the text says what to do.
pub(crate) async fn bind(
    tasks: &Tasks,
    listeners: Vec<Listener>,
    files: Option<TlsFiles>,
) -> Result<Vec<(Listener, Socket)>> {
    let mut bound = Vec::with_capacity(listeners.len());
    for listener in listeners {
        let certificates = match (&listener.endpoint, &files) {
            (Endpoint::Tls(_), Some(files)) => {
                let certificates =
                    Certificates::load(files.clone(), listener.requires_certificate).map_err(anyhow::Error::msg)?;
                let kept = certificates.clone();
                tasks.spawn("TLS files", |stop| kept.keep_current(RELOAD_INTERVAL, stop));
                Some(certificates)
            }
            _ => None,
        };
        let socket = Socket::bind(&listener.endpoint, "api", certificates).await?;
        let url = match socket.address() {
            Some(address) => listener.endpoint.at(address).to_string(),
            None => listener.endpoint.to_string(),
        };
        let anonymous = listener.policy.anonymous.map_or("none", |scope| scope.as_str());
        tracing::info!(%url, anonymous, "listening");
        if listener.policy.anonymous.is_some() && !listener.endpoint.is_local() && !listener.requires_certificate {
            tracing::warn!(%url, anonymous, "every caller that reaches this listener may use it without credentials (--insecure-no-auth)");
        }
        bound.push((listener, socket));
    }
    Ok(bound)
}

/// Binds the listener of the debug page, which asks for no credentials.
///
/// # Errors
/// The address cannot be used; the text says what to do.
pub(crate) async fn bind_page(address: Option<SocketAddr>) -> Result<Option<(Listener, Socket)>> {
    let Some(address) = address else { return Ok(None) };
    let policy = Policy { anonymous: Some(Scope::Read) };
    let listener = Listener { endpoint: Endpoint::Tcp(address), policy, requires_certificate: false };
    if !listener.endpoint.is_local() {
        tracing::warn!(%address, "other machines reach the debug page, which asks for no credentials; keep it off public networks");
    }
    let socket = Socket::bind(&listener.endpoint, "debug page", None).await?;
    Ok(Some((listener, socket)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NOTHING: Means = Means { insecure: false, authentication: false, certificate: false, client_ca: false };
    const INSECURE: Means = Means { insecure: true, ..NOTHING };
    const TLS: Means = Means { certificate: true, ..NOTHING };
    const FULL: Means = Means { authentication: true, client_ca: true, ..TLS };

    fn anonymous(url: &str, means: Means) -> Result<Option<Scope>, String> {
        Ok(check(&[url.parse().unwrap()], means)?.pop().unwrap().policy.anonymous)
    }

    #[test]
    fn callers_on_this_machine_need_no_credentials_until_authentication_is_configured() {
        for url in ["tcp://127.0.0.1:8080", "tcp://[::1]:8080", "unix:///run/gauntlet.sock"] {
            assert_eq!(anonymous(url, NOTHING), Ok(Some(Scope::Admin)), "{url}");
            assert_eq!(anonymous(url, FULL), Ok(None), "{url}");
            assert_eq!(anonymous(&format!("{url}?anonymous=operate"), FULL), Ok(Some(Scope::Operate)), "{url}");
        }
        assert_eq!(anonymous("tls://127.0.0.1:1", TLS), Ok(Some(Scope::Admin)));
    }

    #[test]
    fn other_machines_need_credentials_over_tls() {
        assert_eq!(anonymous("tls://0.0.0.0:8080", FULL), Ok(None));
        assert_eq!(anonymous("tls://0.0.0.0:8080", Means { insecure: true, ..FULL }), Ok(None));
        for (url, means, fix) in [
            ("tcp://0.0.0.0:8080", NOTHING, "Use tls://0.0.0.0:8080 with --tls-cert"),
            ("tcp://[::]:8080", FULL, "or listen on 127.0.0.1 or unix:///PATH behind a proxy or mesh"),
            ("tcp://10.0.0.1:8080?anonymous=admin", FULL, "pass --insecure-no-auth"),
            (
                "tcp://0.0.0.0:8080?anonymous=none",
                Means { insecure: true, ..FULL },
                "credentials are not accepted over plaintext",
            ),
            ("tls://0.0.0.0:8080", NOTHING, "pass --tls-cert and --tls-key"),
            ("tls://0.0.0.0:8080", TLS, "no authentication is configured"),
            ("tls://0.0.0.0:8080?anonymous=read", FULL, "anonymous callers from other machines"),
            ("tls://0.0.0.0:8080?client-certificate=required", TLS, "pass --tls-client-ca"),
            ("unix:///a?anonymous=none", NOTHING, "no authentication is configured"),
        ] {
            let error = anonymous(url, means).unwrap_err();
            assert!(error.starts_with(url) && error.contains(fix), "{error}");
        }
    }

    #[test]
    fn insecure_listeners_are_possible_when_said() {
        assert_eq!(anonymous("tcp://0.0.0.0:8080", INSECURE), Ok(Some(Scope::Admin)));
        assert_eq!(anonymous("tcp://0.0.0.0:8080?anonymous=read", INSECURE), Ok(Some(Scope::Read)));
        assert_eq!(anonymous("tls://0.0.0.0:8080", Means { insecure: true, ..TLS }), Ok(Some(Scope::Admin)));
    }

    #[test]
    fn required_certificate_admits_callers_without_other_credentials() {
        let means = Means { client_ca: true, ..TLS };
        let url = "tls://0.0.0.0:8080?client-certificate=required&anonymous=operate";
        assert_eq!(anonymous(url, means), Ok(Some(Scope::Operate)));
    }

    #[test]
    fn plaintext_that_other_machines_reach_is_exposed() {
        for (url, exposed) in
            [("tcp://0.0.0.0:1", true), ("tcp://127.0.0.1:1", false), ("tls://0.0.0.0:1", false), ("unix:///a", false)]
        {
            let means = Means { insecure: true, ..FULL };
            assert_eq!(check(&[url.parse().unwrap()], means).unwrap().pop().unwrap().is_exposed(), exposed, "{url}");
        }
    }
}
