//! How to reach an etcd cluster.

use std::{path::PathBuf, time::Duration};

use gauntlet_domain::Error;
use secrecy::SecretString;

/// How to reach an etcd cluster.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// The members of one cluster: `http://host:port`, `https://host:port` or `host:port`; at least one. An endpoint without a scheme uses
    /// https if TLS files are configured. It is rejected if a password is set and no TLS file is.
    pub endpoints: Vec<String>,
    /// The user to authenticate as, if the cluster has authentication enabled.
    pub username: Option<String>,
    /// The user's password. `Debug` hides it.
    pub password: Option<SecretString>,
    /// TLS files. An `https` endpoint needs none if the system trusts the authority that signed its certificate.
    pub tls: Option<EtcdTls>,
    /// The prefix of every key.
    pub prefix: String,
    /// The time to live of a replica's lease. etcd rounds it to whole seconds and raises it to at least two.
    pub lease_ttl: Duration,
    /// The longest time that one call takes, over all endpoints tried.
    pub deadline: Duration,
}

/// TLS files in PEM form. They are reloaded when they change, so a certificate can be replaced while it is in use.
#[derive(Debug, Clone, Default)]
pub struct EtcdTls {
    /// The certificates of the authorities that sign the members' certificates; `None` uses the system's.
    pub ca: Option<PathBuf>,
    /// The client certificate and its private key, if the members require one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl EtcdConfig {
    /// Creates a configuration without authentication or TLS, with a lease TTL of ten seconds and a call deadline of five.
    pub fn new(endpoints: impl IntoIterator<Item = String>) -> Self {
        Self {
            endpoints: endpoints.into_iter().collect(),
            username: None,
            password: None,
            tls: None,
            prefix: crate::PREFIX.to_owned(),
            lease_ttl: Duration::from_secs(10),
            deadline: Duration::from_secs(5),
        }
    }
}

/// The error for a wrong setting.
pub(super) fn invalid(field: &'static str, problem: String) -> Error {
    Error::Invalid { field, problem }
}
