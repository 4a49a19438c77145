//! Refuses what web pages of other sites send with a visitor's browser: cross-origin requests, and requests under a name that was rebound to this
//! machine (DNS rebinding). Clients that aren't browsers send no `Origin` and no `Sec-Fetch-Site`, and pass.

use std::{net::IpAddr, str::FromStr, sync::Arc};

use gauntlet_api::error;
use http::{
    HeaderMap, HeaderValue, Method, Request, Uri,
    header::{HOST, ORIGIN},
    uri::Authority,
};
use tonic::Status;

use crate::refusal::Refusal;

/// The origins and host names that a listener accepts. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub(crate) struct OriginPolicy {
    /// Origins whose pages may call, besides those of the listener itself.
    pub(crate) allowed_origins: Arc<[Origin]>,
    /// Host names that the listener is reached by. With [`Hosts::Listed`], besides those of loopback.
    pub(crate) allowed_hosts: Arc<[HostName]>,
    pub(crate) hosts: Hosts,
}

/// Which values of `Host` are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Hosts {
    /// Loopback addresses, `localhost`, names below it, and listed names. An attacker's name can resolve to a loopback address, but not these.
    #[default]
    Listed,
    /// Any: the names of the listener are unknown, or no browser reaches it.
    Any,
}

impl OriginPolicy {
    /// Checks a request before anything of it is used.
    ///
    /// # Errors
    /// The host isn't accepted, or a page of an origin that isn't accepted sent the request.
    pub(crate) fn check<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        self.check_host(request)?;
        if self.is_allowed_origin(request) {
            return Ok(());
        }
        let status = error::forbidden(
            "CROSS_ORIGIN",
            "A page of another origin sent this request; if it may, name its origin with --allow-origin.",
        );
        Err(Refusal { reason: "cross_origin", status })
    }

    fn check_host<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        if self.hosts == Hosts::Any {
            return Ok(());
        }
        let named = request.uri().authority().map(Authority::as_str);
        let headers = request.headers().get_all(HOST).iter().map(|host| host.to_str().unwrap_or_default());
        match named.into_iter().chain(headers).find(|host| !self.is_allowed_host(host)) {
            None => Ok(()),
            Some(_) => Err(Refusal { reason: "host", status: host_not_allowed() }),
        }
    }

    fn is_allowed_host(&self, authority: &str) -> bool {
        let Ok(authority) = Authority::from_str(authority) else { return false };
        let Ok(host) = HostName::from_str(authority.host()) else { return false };
        !authority.as_str().contains('@') && (host.is_loopback() || self.allowed_hosts.contains(&host))
    }

    fn is_allowed_origin<B>(&self, request: &Request<B>) -> bool {
        let headers = request.headers();
        let Ok(origin) = only(headers, ORIGIN.as_str()) else { return false };
        if let Some(origin) = origin.and_then(|origin| Origin::from_str(origin).ok())
            && self.allowed_origins.contains(&origin)
        {
            return true;
        }
        match only(headers, "sec-fetch-site") {
            Ok(Some("same-origin" | "none")) => true,
            // Following a link changes nothing, and the page with the link cannot read the response.
            Ok(Some(_)) => is_navigation(request),
            // Browsers leave it out of requests over plain HTTP, except to loopback.
            Ok(None) => origin.is_none_or(|origin| is_same_host(origin, request)),
            Err(()) => false,
        }
    }
}

/// The response to a request that names a host that its listener doesn't have.
fn host_not_allowed() -> Status {
    error::forbidden(
        "HOST_NOT_ALLOWED",
        "The Host of the request is not a name of this listener; use localhost, or name the host with --allow-host.",
    )
}

/// Returns the value of a header, which must not be repeated.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, ()> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(HeaderValue::to_str).transpose().map_err(drop)?;
    if values.next().is_some() { Err(()) } else { Ok(value) }
}

/// Whether a visitor follows a link, or enters an address, in a tab. Frames, scripts and forms that post don't count.
fn is_navigation<B>(request: &Request<B>) -> bool {
    let is = |name, value| only(request.headers(), name) == Ok(Some(value));
    (request.method() == Method::GET || request.method() == Method::HEAD)
        && is("sec-fetch-mode", "navigate")
        && is("sec-fetch-dest", "document")
}

/// Whether the page is of the host that the request names. The scheme isn't compared: a proxy may terminate TLS.
fn is_same_host<B>(origin: &str, request: &Request<B>) -> bool {
    let Ok(origin) = Origin::from_str(origin) else { return false };
    let host = match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => only(request.headers(), HOST.as_str()).ok().flatten(),
    };
    // The port that the scheme implies is left out of both.
    host.and_then(|host| format!("{}://{host}", origin.scheme).parse().ok()).is_some_and(|host: Origin| host == origin)
}

/// The origin of a web page: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    /// The origin as browsers write it, without the port that the scheme implies.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let text = match (self.scheme.as_str(), self.port) {
            ("http", 80) | ("https", 443) => format!("{}://{}", self.scheme, self.host),
            _ => format!("{}://{}:{}", self.scheme, self.host, self.port),
        };
        text.parse().ok()
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected an origin such as https://ctf.example or http://localhost:3000; got {text:?}");
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(wrong()) };
        let implied = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return Err(wrong()),
        };
        // The parser of URIs adds the path.
        if authority.as_str().contains('@')
            || text.ends_with('/')
            || !matches!(uri.path(), "" | "/")
            || uri.query().is_some()
        {
            return Err(wrong());
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|_| wrong())?,
            None => implied,
        };
        Ok(Self { scheme: scheme.to_owned(), host: authority.host().to_ascii_lowercase(), port })
    }
}

/// A host name or address, without a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostName(String);

impl HostName {
    /// Whether it means this machine wherever it is resolved.
    fn is_loopback(&self) -> bool {
        let address = self.0.trim_start_matches('[').trim_end_matches(']');
        match address.parse::<IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            Err(_) => self.0 == "localhost" || self.0.ends_with(".localhost"),
        }
    }
}

impl FromStr for HostName {
    type Err = String;

    /// Parses a name or an address. Case and a trailing dot don't count.
    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let is_address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
        let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        if name.is_empty() || !(is_name || is_address) {
            return Err(format!("expected a host name such as gauntlet.example, without a port; got {text:?}"));
        }
        // A `Host` header has IPv6 addresses in brackets.
        if is_address && name.contains(':') && !name.starts_with('[') {
            return Ok(Self(format!("[{name}]")));
        }
        Ok(Self(name))
    }
}

#[cfg(test)]
mod tests;
