//! Builds the adapters behind the ports from the configuration.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use gauntlet_coordination::{Coordination, Embedded, Etcd, EtcdConfig, EtcdTls};
use gauntlet_domain::Store;
use gauntlet_provision::process::{self, Process};
use gauntlet_scenario::{Allowed, FlagKeys, Library};
use gauntlet_telemetry::{db::Database, instruments::Instruments};

use crate::{Config, StartError};

type Result<T> = std::result::Result<T, StartError>;

/// The default name of a replica: host name and process id.
pub(crate) fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}

/// Scenarios from registries and, with `--scenario-root`, from a local directory.
pub(crate) fn scenarios(config: &Config, instruments: &Instruments) -> Result<Library> {
    std::fs::create_dir_all(&config.dir).map_err(|error| {
        anyhow!("cannot create {}: {error}; pass a writable directory as --dir (DIR)", config.dir.display())
    })?;
    let key_file = config.flag_key_file.clone().unwrap_or_else(|| config.dir.join("flag.key"));
    let key = FlagKeys::load_or_create(&key_file)
        .with_context(|| format!("cannot use the flag key {}", key_file.display()))?;
    let public = config.listens_beyond_loopback();
    let access = config.registries.access(public).map_err(StartError::Config)?;
    if access.allowed == Allowed::Only(Vec::new()) {
        tracing::warn!(
            "no registry is allowed, because the manager listens beyond loopback; pass --registry-allow (REGISTRY_ALLOW) with those that \
             scenarios may come from"
        );
    }
    if let Some(root) = config.scenario_root.as_ref().filter(|root| !root.is_dir()) {
        return Err(anyhow!("--scenario-root (SCENARIO_ROOT) {} is not a directory", root.display()).into());
    }
    let library = gauntlet_scenario::Config {
        local_root: config.scenario_root.clone(),
        access,
        instruments: instruments.clone(),
        ..gauntlet_scenario::Config::new(config.dir.join("scenarios"), key)
    };
    Ok(Library::new(library)?)
}

/// Instances as processes on this machine.
pub(crate) fn provisioner(config: &Config) -> Result<Process> {
    let (first, last) = config.instance_ports;
    let mut process = process::Config::new(config.instances_dir());
    process.host.clone_from(&config.instance_host);
    process.ports = first..=last;
    process.path.splice(0..0, config.instance_path.iter().cloned());
    process.require_limits = config.require_limits;
    process.defaults.clone_from(&config.limit_default);
    process.maximums.clone_from(&config.limit_max);
    process.isolation = config.isolation.0;
    process.require_isolation = config.require_isolation;
    process.system.clone_from(&config.instance_root);
    let (first, last) = config.instance_uids;
    process.uids = first..=last;
    let process = Process::new(process)?;
    let isolation = process.isolation();
    if isolation.level.has_namespaces() {
        tracing::info!(%isolation, "instances are isolated");
    } else {
        tracing::warn!(%isolation, "instances are not isolated from this machine: run only scenarios and admit only players that are trusted");
    }
    Ok(process)
}

/// The store. Cloning shares it.
#[derive(Clone)]
pub(crate) enum Backend {
    /// A file, used by one manager.
    Embedded(Arc<Coordination<Embedded>>),
    /// An etcd cluster, shared by several managers.
    Etcd(Arc<Coordination<Etcd>>),
}

impl Backend {
    /// The store behind the domain's port.
    pub(crate) fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Embedded(store) => store.clone(),
            Self::Etcd(store) => store.clone(),
        }
    }

    /// The id of the store; a new store gets `fresh`.
    pub(crate) async fn store_id(&self, fresh: &str) -> gauntlet_domain::Result<String> {
        match self {
            Self::Embedded(store) => store.store_id(fresh).await,
            Self::Etcd(store) => store.store_id(fresh).await,
        }
    }

    /// Reads which calls of this replica wait for locks, for which holders and since when; the longest waits if there are many. Doesn't block.
    pub(crate) fn waits(&self) -> impl Fn() -> serde_json::Value + Send + Sync + 'static {
        const SHOWN: usize = 32;
        let backend = self.clone();
        move || {
            let (waiting, longest) = match &backend {
                Self::Embedded(store) => store.waits(SHOWN),
                Self::Etcd(store) => store.waits(SHOWN),
            };
            serde_json::json!({ "waiting": waiting, "longest": longest })
        }
    }

    /// Releases the locks of this replica and closes the store; takes a bounded time.
    pub(crate) async fn shutdown(&self) {
        match self {
            Self::Embedded(store) => store.shutdown().await,
            Self::Etcd(store) => store.shutdown().await,
        }
    }
}

/// Opens etcd if there are endpoints, otherwise the embedded store in the data directory.
pub(crate) async fn store(config: &Config, replica: String, instruments: &Instruments) -> Result<Backend> {
    if config.etcd_endpoints.is_empty() {
        let file = config.dir.join("gauntlet.redb");
        return Ok(Backend::Embedded(Arc::new(Coordination::embedded(&file, replica).await?)));
    }
    let etcd = etcd(config)?;
    Ok(Backend::Etcd(Arc::new(Coordination::etcd(etcd, replica, Database::etcd(instruments)).await?)))
}

/// The configuration of the etcd client.
fn etcd(config: &Config) -> Result<EtcdConfig> {
    let tls = EtcdTls { ca: config.etcd_ca.clone(), identity: config.etcd_cert.clone().zip(config.etcd_key.clone()) };
    let (username, password) = config.etcd_credentials().map_err(StartError::Config)?.unzip();
    Ok(EtcdConfig {
        username,
        password,
        tls: (tls.ca.is_some() || tls.identity.is_some()).then_some(tls),
        prefix: config.etcd_prefix.clone(),
        lease_ttl: config.lease_ttl,
        deadline: config.etcd_deadline(),
        ..EtcdConfig::new(config.etcd_endpoints.iter().cloned())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use clap::Parser as _;

    use super::*;

    #[test]
    fn client_certificate_for_etcd_works_without_a_ca() {
        let arguments = ["manager", "--etcd-endpoints", "a:2379", "--etcd-cert", "cert.pem", "--etcd-key", "key.pem"];
        let tls = etcd(&Config::try_parse_from(arguments).unwrap()).unwrap().tls.unwrap();
        assert!(tls.ca.is_none() && tls.identity == Some(("cert.pem".into(), "key.pem".into())));
        let arguments = ["manager", "--etcd-endpoints", "a:2379", "--etcd-ca", "ca.pem"];
        let tls = etcd(&Config::try_parse_from(arguments).unwrap()).unwrap().tls.unwrap();
        assert!(tls.ca == Some("ca.pem".into()) && tls.identity.is_none());
        let plain = Config::try_parse_from(["manager", "--etcd-endpoints", "a:2379"]).unwrap();
        assert!(etcd(&plain).unwrap().tls.is_none());
    }

    #[test]
    fn keys_in_etcd_have_the_configured_prefix() {
        let arguments = ["manager", "--etcd-endpoints", "a:2379", "--etcd-prefix", "other/"];
        assert_eq!(etcd(&Config::try_parse_from(arguments).unwrap()).unwrap().prefix, "other/");
    }
}
