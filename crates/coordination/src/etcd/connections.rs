//! One client for each endpoint, and the TLS files that they are made of, which are read again when they change.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use gauntlet_domain::Error;
use tokio::{sync::OnceCell, time::Instant};

use super::{EtcdConfig, EtcdTls, PING, invalid};

/// How often the TLS files are looked at, at most.
const LOOK: Duration = Duration::from_secs(5);

/// Where a member is reached.
struct Endpoint {
    url: String,
    /// `host:port`.
    address: String,
}

/// How the members are reached.
pub(super) struct Connections {
    endpoints: Vec<Endpoint>,
    /// All but TLS.
    options: ConnectOptions,
    files: EtcdTls,
    current: Mutex<Current>,
}

struct Current {
    clients: Arc<Clients>,
    /// What the files were when the clients were made.
    stamp: Stamp,
    /// When to look at them next.
    look: Instant,
}

/// Made of the same files; connected when first used.
struct Clients {
    tls: TlsOptions,
    each: Vec<OnceCell<Client>>,
}

/// When each of the files was last written, and how long it is.
type Stamp = Vec<Option<(SystemTime, u64)>>;

impl Connections {
    /// Checks the configuration and reads its files; does not connect.
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, Error> {
        if config.endpoints.is_empty() {
            return Err(invalid(
                "etcd endpoint",
                "there is none; name at least one, such as http://127.0.0.1:2379".to_owned(),
            ));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(config.deadline / 2)
            .with_keep_alive(PING.0, PING.1)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        match (&config.username, &config.password) {
            (Some(username), Some(password)) => options = options.with_user(username, password),
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
        let stamp = stamp(&files);
        let clients = Arc::new(Clients::new(read(&files)?, endpoints.len()));
        let current = Mutex::new(Current { clients, stamp, look: Instant::now() + LOOK });
        Ok(Self { endpoints, options, files, current })
    }

    /// How many endpoints there are.
    pub(super) fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// The `host:port` of each endpoint.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        self.endpoints.iter().map(|endpoint| endpoint.address.as_str())
    }

    /// The `host:port` of an endpoint.
    pub(super) fn address(&self, at: usize) -> &str {
        self.endpoints.get(at).map_or("", |endpoint| &endpoint.address)
    }

    /// The client of an endpoint.
    pub(super) async fn client(&self, at: usize) -> Result<Client, etcd_client::Error> {
        let clients = self.clients().await;
        let Some((endpoint, client)) = self.endpoints.get(at).zip(clients.each.get(at)) else {
            return Err(etcd_client::Error::InvalidArgs(format!("there is no endpoint {at}")));
        };
        let tls = endpoint.url.starts_with("https:");
        let options = || if tls { self.options.clone().with_tls(clients.tls.clone()) } else { self.options.clone() };
        client.get_or_try_init(|| Client::connect([&endpoint.url], Some(options()))).await.cloned()
    }

    /// The clients made of the files as they are, or as they were some seconds ago.
    async fn clients(&self) -> Arc<Clients> {
        let before = {
            let mut current = self.current();
            let now = Instant::now();
            if self.files.paths().next().is_none() || now < current.look {
                return current.clients.clone();
            }
            // One looks, the others go on.
            current.look = now + LOOK;
            current.stamp.clone()
        };
        let files = self.files.clone();
        let look = move || {
            let stamp = stamp(&files);
            (stamp != before).then(|| read(&files).map(|tls| (stamp, tls)))
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Some(Ok((stamp, tls)))) => {
                tracing::info!("the TLS files of etcd have changed: new connections use them");
                let mut current = self.current();
                current.clients = Arc::new(Clients::new(tls, self.endpoints.len()));
                current.stamp = stamp;
            }
            // They may be half written: they are looked at again.
            Ok(Some(Err(error))) => tracing::warn!(%error, "the TLS files of etcd have changed and are not used"),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "the TLS files of etcd were not read"),
        }
        self.current().clients.clone()
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn new(tls: TlsOptions, count: usize) -> Self {
        Self { tls, each: (0..count).map(|_| OnceCell::new()).collect() }
    }
}

impl EtcdTls {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let identity = self.identity.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(identity).map(|path| path.as_path())
    }
}

fn stamp(files: &EtcdTls) -> Stamp {
    let of = |path: &Path| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.len()))
    };
    files.paths().map(of).collect()
}

/// Reads the files, and checks that they can be used together.
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
                "does not say how the password is to be sent: write https:// before it, or http:// for plain text",
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
        return Err(wrong("has more than a host and a port, such as in http://127.0.0.1:2379"));
    }
    Ok(Endpoint { url: format!("{scheme}://{address}"), address: address.to_owned() })
}
