//! HTTP to registries: permitted addresses, redirects without credentials, bounded bodies.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION},
};
use reqwest::{Certificate, Client, Response, Url, redirect};

use super::{
    Access,
    address::{Addresses, Resolver, system_lookup},
    allowed::{Allowed, Host, address},
    failure::{Failure, chain, one_line},
};

/// The most redirects of one request.
const MAX_REDIRECTS: usize = 5;
/// The most that is read of an error's body, in bytes.
const MAX_ERROR_BODY: usize = 16 << 10;

/// A request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) accept: Option<&'static str>,
    pub(crate) content: Option<(&'static str, Bytes)>,
}

impl Request {
    pub(crate) fn new(method: Method, url: Url) -> Self {
        Self { method, url, accept: None, content: None }
    }
}

/// Sends requests. Connects to permitted addresses only.
pub(crate) struct Transport {
    /// For registries that may be in private networks.
    trusted: Client,
    /// For all other servers.
    public: Client,
    allowed: Allowed,
    insecure: bool,
}

impl Transport {
    /// The error text is for the operator.
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        let mut roots = Vec::new();
        for (at, pem) in access.extra_roots.iter().enumerate() {
            let found = Certificate::from_pem_bundle(pem).ok().filter(|found| !found.is_empty());
            roots.extend(found.ok_or_else(|| format!("extra root {}: holds no certificate in PEM form", at + 1))?);
        }
        // An error means that a provider is already installed, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = |permitted| {
            Client::builder()
                .dns_resolver(Resolver { lookup: system_lookup(), permitted })
                .redirect(redirect::Policy::none())
                // A proxy would connect to addresses that nobody has checked.
                .no_proxy()
                .referer(false)
                .no_gzip()
                .no_brotli()
                .no_zstd()
                .no_deflate()
                .tls_certs_merge(roots.iter().cloned())
                .connect_timeout(access.connect_timeout)
                .read_timeout(access.read_timeout)
                .user_agent(concat!("gauntlet/", env!("CARGO_PKG_VERSION")))
                .build()
                .map_err(|error| format!("registry client: {}", chain(&error)))
        };
        Ok(Self {
            trusted: client(Addresses::Trusted)?,
            public: client(Addresses::Public)?,
            allowed: access.allowed.clone(),
            insecure: access.insecure,
        })
    }

    /// The URL of a registry.
    pub(crate) fn base(&self, registry: &str) -> Result<Url, Failure> {
        let scheme = if self.insecure { "http" } else { "https" };
        Url::parse(&format!("{scheme}://{registry}/"))
            .map_err(|error| Failure::broken(format!("{registry:?} is no host: {error}")))
    }

    /// Sends a request on behalf of a registry, and follows redirects of downloads. `authorization` is sent to the origin of the request only.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub(crate) async fn send(
        &self,
        registry: &Url,
        mut request: Request,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let origin = request.url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let client = self.client(registry, &request.url)?;
            let mut outgoing = client.request(request.method.clone(), request.url.clone()).headers(headers(&request));
            if let Some(value) = authorization.filter(|_| request.url.origin() == origin) {
                outgoing = outgoing.header(AUTHORIZATION, value);
            }
            if let Some((_, body)) = &request.content {
                outgoing = outgoing.body(body.clone());
            }
            let response = outgoing.send().await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            if !matches!(request.method, Method::GET | Method::HEAD) {
                return Err(Failure::broken(
                    "redirects a request that isn't a download; name the registry that it redirects to",
                ));
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = target.and_then(|target| request.url.join(target).ok());
            request.url = target.ok_or_else(|| Failure::broken("redirects without a valid Location"))?;
        }
        Err(Failure::broken(format!("redirects more than {MAX_REDIRECTS} times")))
    }

    /// Returns the client for a URL that `registry` leads to.
    fn client(&self, registry: &Url, url: &Url) -> Result<&Client, Failure> {
        let plain = url.scheme() == "http" && self.insecure;
        if !(plain || url.scheme() == "https") || !url.username().is_empty() || url.password().is_some() {
            let host = url.host_str().unwrap_or_default();
            return Err(Failure::broken(format!(
                "leads to {}://{host}; only https without a user in the URL is followed",
                url.scheme()
            )));
        }
        let listed = self.allowed.lists(url);
        let (client, permitted) = if listed || url.origin() == registry.origin() {
            (&self.trusted, Addresses::Trusted)
        } else {
            (&self.public, Addresses::Public)
        };
        // The resolver isn't asked for addresses. An address that the operator listed is meant.
        if let Some(literal) = url.host_str().and_then(address).filter(|_| !listed) {
            permitted.check(literal).map_err(|error| Failure::broken(error.to_string()))?;
        }
        Ok(client)
    }

    /// Whether credentials of `registry` may be sent to a token service at `realm`: a host of its own, or one that the operator listed.
    pub(crate) fn may_authenticate_at(&self, registry: &Url, realm: &Url, token_hosts: &[Host]) -> bool {
        let hub = registry.host_str() == Some("index.docker.io") && realm.host_str() == Some("auth.docker.io");
        let own = realm.origin() == registry.origin()
            || realm.scheme() == "https"
                && registry.scheme() == "https"
                && (realm.host_str() == registry.host_str() || hub);
        own || token_hosts.iter().any(|host| host.is_of(realm))
    }
}

fn headers(request: &Request) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.extend(request.accept.map(|accept| (ACCEPT, HeaderValue::from_static(accept))));
    headers.extend(request.content.as_ref().map(|(kind, _)| (CONTENT_TYPE, HeaderValue::from_static(kind))));
    headers
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn body(mut response: Response, limit: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > limit {
            return Err(Failure::broken(format!("sends more than {limit} bytes where less is expected")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Returns the response if its status is a success.
pub(crate) async fn successful(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    match status {
        _ if status.is_success() => Ok(response),
        StatusCode::NOT_FOUND => Err(Failure::NotFound),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Failure::Denied),
        _ => {
            let text = body(response, MAX_ERROR_BODY).await.unwrap_or_default();
            let text = one_line(String::from_utf8_lossy(&text).trim());
            Err(Failure::Status { status, detail: if text.is_empty() { text } else { format!(": {text}") } })
        }
    }
}
