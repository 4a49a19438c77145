//! What stands behind the ports, as configured.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use gauntlet_domain::Store;
use gauntlet_provision::process::{self, Process};
use gauntlet_scenario::{Access, Credentials, FlagKey, Library};

use crate::Config;

/// The host's name and the process id.
pub(crate) fn replica_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}

/// Scenarios from registries and, if allowed, from a local directory.
pub(crate) fn scenarios(config: &Config) -> Result<Library> {
    std::fs::create_dir_all(&config.dir)
        .with_context(|| format!("cannot make {}: give --dir a directory that can be written", config.dir.display()))?;
    let key_file = config.flag_key_file.clone().unwrap_or_else(|| config.dir.join("flag.key"));
    let key = FlagKey::load_or_create(&key_file).with_context(|| format!("flag key {}", key_file.display()))?;
    let credentials = config.oci_username.clone().zip(config.oci_password.as_ref()).map(|(username, password)| Credentials {
        registry: None,
        username,
        password: password.reveal().to_owned(),
    });
    let library = gauntlet_scenario::Config {
        local_root: config.scenario_root.clone(),
        access: Access { insecure: config.oci_insecure, credentials, ..Access::default() },
        ..gauntlet_scenario::Config::new(config.dir.join("scenarios"), key)
    };
    Ok(Library::new(library)?)
}

/// Instances as processes of this machine.
pub(crate) fn provisioner(config: &Config) -> Result<Process> {
    let (first, last) = config.instance_ports;
    let mut process = process::Config::new(config.instances_dir());
    process.host.clone_from(&config.instance_host);
    process.ports = first..=last;
    process.path.splice(0..0, config.instance_path.iter().cloned());
    Ok(Process::new(process)?)
}
