//! One client per endpoint, and the TLS files that they use, reloaded when the files change.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use gauntlet_domain::Error;
use secrecy::ExposeSecret as _;
use tokio::{sync::OnceCell, time::Instant};

use super::config::{EtcdConfig, EtcdTls, invalid};

/// HTTP/2 keepalive: the interval between pings on a connection in use, and how long one may stay unanswered. Pings tell a frozen server
/// from an idle one. etcd allows one every five seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest time between two checks of the TLS files.
const TLS_CHECK_INTERVAL: Duration = Duration::from_secs(5);

struct Endpoint {
    url: String,
    /// `host:port`.
    address: String,
}

/// The endpoints of a cluster and their clients.
pub(super) struct Connections {
    endpoints: Vec<Endpoint>,
    /// All options but TLS.
    options: ConnectOptions,
    files: EtcdTls,
    current: Mutex<Current>,
}

struct Current {
    clients: Arc<Clients>,
    /// The version of the TLS files that the clients use.
    version: FileVersions,
    next_check: Instant,
}

/// The clients that share one version of the TLS files; each connects on its first use.
struct Clients {
    tls: TlsOptions,
    by_endpoint: Vec<OnceCell<Client>>,
}

/// The modification time and length of each TLS file; `None` for a file that cannot be read.
type FileVersions = Vec<Option<(SystemTime, u64)>>;

impl Connections {
    /// Checks the configuration and reads its files. Does not connect.
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, Error> {
        if config.endpoints.is_empty() {
            return Err(invalid(
                "etcd endpoint",
                "no endpoint is set; name at least one, such as http://127.0.0.1:2379".to_owned(),
            ));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(config.deadline / 2)
            .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        match (&config.username, &config.password) {
            (Some(username), Some(password)) => options = options.with_user(username, password.expose_secret()),
            (None, None) => {}
            _ => {
                return Err(invalid(
                    "etcd username",
                    "username and password go together; give both or none".to_owned(),
                ));
            }
        }
        let endpoints = config.endpoints.iter().map(|url| endpoint(url, config));
        let endpoints = endpoints.collect::<Result<Vec<_>, _>>()?;
        let files = config.tls.clone().unwrap_or_default();
        // Before the read: a file that changes in between is then reloaded.
        let version = file_versions(&files);
        let clients = Arc::new(Clients::new(read(&files)?, endpoints.len()));
        let current = Mutex::new(Current { clients, version, next_check: Instant::now() + TLS_CHECK_INTERVAL });
        Ok(Self { endpoints, options, files, current })
    }

    /// The number of endpoints.
    pub(super) fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// The `host:port` of each endpoint.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        self.endpoints.iter().map(|endpoint| endpoint.address.as_str())
    }

    /// The `host:port` of an endpoint.
    pub(super) fn address(&self, index: usize) -> &str {
        self.endpoints.get(index).map_or("", |endpoint| &endpoint.address)
    }

    /// Returns the client of an endpoint; connects it on its first use.
    pub(super) async fn client(&self, index: usize) -> Result<Client, etcd_client::Error> {
        let clients = self.clients().await;
        let Some((endpoint, client)) = self.endpoints.get(index).zip(clients.by_endpoint.get(index)) else {
            return Err(etcd_client::Error::InvalidArgs(format!("no endpoint has index {index}")));
        };
        let tls = endpoint.url.starts_with("https:");
        let options = || if tls { self.options.clone().with_tls(clients.tls.clone()) } else { self.options.clone() };
        client.get_or_try_init(|| Client::connect([&endpoint.url], Some(options()))).await.cloned()
    }

    /// Returns the clients for the current TLS files, at most [`TLS_CHECK_INTERVAL`] behind them.
    async fn clients(&self) -> Arc<Clients> {
        let before = {
            let mut current = self.current();
            let now = Instant::now();
            if self.files.paths().next().is_none() || now < current.next_check {
                return current.clients.clone();
            }
            // This caller checks the files; concurrent ones keep using the current clients.
            current.next_check = now + TLS_CHECK_INTERVAL;
            current.version.clone()
        };
        let files = self.files.clone();
        let check = move || {
            let version = file_versions(&files);
            (version != before).then(|| read(&files).map(|tls| (version, tls)))
        };
        match tokio::task::spawn_blocking(check).await {
            Ok(Some(Ok((version, tls)))) => {
                tracing::info!("the TLS files of etcd have changed: new connections use them");
                let mut current = self.current();
                current.clients = Arc::new(Clients::new(tls, self.endpoints.len()));
                current.version = version;
            }
            // They may be half written: the next check tries again.
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "the TLS files of etcd have changed but cannot be used; keeping the previous ones");
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "the TLS files of etcd could not be checked"),
        }
        self.current().clients.clone()
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn new(tls: TlsOptions, count: usize) -> Self {
        Self { tls, by_endpoint: (0..count).map(|_| OnceCell::new()).collect() }
    }
}

impl EtcdTls {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let identity = self.identity.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(identity).map(|path| path.as_path())
    }
}

fn file_versions(files: &EtcdTls) -> FileVersions {
    let version = |path: &Path| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.len()))
    };
    files.paths().map(version).collect()
}

/// Reads the files and checks that they can be used together.
fn read(files: &EtcdTls) -> Result<TlsOptions, Error> {
    let read = |field, path: &Path| {
        fs::read(path).map_err(|error| invalid(field, format!("{} cannot be read: {error}", path.display())))
    };
    let mut tls = TlsOptions::new();
    tls = match &files.ca {
        Some(ca) => tls.ca_certificate(Certificate::from_pem(read("etcd CA certificate", ca)?)),
        None => tls.with_enabled_roots(),
    };
    if let Some((certificate, key)) = &files.identity {
        tls = tls
            .identity(Identity::from_pem(read("etcd client certificate", certificate)?, read("etcd client key", key)?));
    }
    if files.paths().next().is_some() {
        let checked = tonic::transport::Endpoint::from_static("https://127.0.0.1:2379").tls_config(tls.clone());
        checked.map_err(|error| {
            let source = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            let paths: Vec<_> = files.paths().map(|path| path.display().to_string()).collect();
            invalid("etcd TLS files", format!("{} cannot be used: {source}", paths.join(", ")))
        })?;
    }
    Ok(tls)
}

fn endpoint(url: &str, config: &EtcdConfig) -> Result<Endpoint, Error> {
    let wrong = |problem: &str| invalid("etcd endpoint", format!("{url:?} {problem}"));
    let tls = config.tls.is_some();
    let (scheme, rest) = match url.split_once("://") {
        Some(named) => named,
        None if tls => ("https", url),
        None if config.password.is_some() => {
            return Err(wrong(
                "has no scheme, and a password is set: write https:// before it, or http:// to send the password in plain text",
            ));
        }
        None => ("http", url),
    };
    match (scheme, tls) {
        ("http", false) | ("https", _) => {}
        ("http", true) => return Err(wrong("is plain http, but TLS is configured: use https")),
        _ => return Err(wrong("is neither http nor https")),
    }
    let address = rest.trim_end_matches('/');
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {}
        _ => return Err(wrong("has no host and port, such as in http://127.0.0.1:2379")),
    }
    if address.contains(['/', '@', ' ']) {
        return Err(wrong("has more than a host and a port; write it as in http://127.0.0.1:2379"));
    }
    Ok(Endpoint { url: format!("{scheme}://{address}"), address: address.to_owned() })
}
