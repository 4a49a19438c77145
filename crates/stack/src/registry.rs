//! Runs an OCI registry (CNCF distribution, Debian's docker-registry).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::ports::Reserved;
use crate::{Process, Ready, Result, Spec, Tool, Tools, create_dir, write};

/// Transport and users of the registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// The lines of an htpasswd file (bcrypt only); `None` lets everybody pull and push.
    pub htpasswd: Option<String>,
    /// The PEM files of the certificate chain and the key; `None` is plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl RegistryOptions {
    /// The name of [`RegistryOptions::with_user`]'s user.
    pub const USER: &str = "author";
    /// The password of [`RegistryOptions::with_user`]'s user.
    pub const PASSWORD: &str = "registry-secret";

    /// Plain HTTP, with one user.
    pub fn with_user() -> RegistryOptions {
        // bcrypt of PASSWORD, at the lowest cost.
        let line = format!("{}:$2b$04$9KjTZmUA3Ozm.ri7UB6yFu1BxmTOXkaLg67HP9Ei7sNUqPVhVXImy\n", Self::USER);
        RegistryOptions { htpasswd: Some(line), tls: None }
    }
}

/// A registry on a free loopback port.
#[derive(Debug)]
pub struct Registry {
    /// The registry's process.
    pub process: Process,
    reserved: Reserved,
}

impl Registry {
    /// Starts a registry with its blobs, configuration and log in `dir`, and waits until it listens.
    ///
    /// # Errors
    /// [`crate::Error::Missing`] if there is no registry binary, and the errors of [`Process::run`].
    pub fn start(dir: impl AsRef<Path>, options: &RegistryOptions) -> Result<Registry> {
        let dir = dir.as_ref();
        let blobs = dir.join("blobs");
        create_dir(&blobs)?;
        let reserved = Reserved::any()?;
        let port = reserved.number();
        let mut config = format!(
            "version: 0.1\nlog: {{ level: info, accesslog: {{ disabled: false }} }}\nstorage:\n  filesystem: {{ rootdirectory: {blobs:?} }}\n  delete: {{ \
             enabled: true }}\nhttp:\n  addr: 127.0.0.1:{port}\n  secret: loopback\n"
        );
        if let Some((certificate, key)) = &options.tls {
            let _ = writeln!(config, "  tls: {{ certificate: {certificate:?}, key: {key:?} }}");
        }
        if let Some(lines) = &options.htpasswd {
            let path = dir.join("htpasswd");
            write(&path, lines)?;
            let _ = writeln!(config, "auth:\n  htpasswd: {{ realm: gauntlet, path: {path:?} }}");
        }
        let config_path = dir.join("registry.yml");
        write(&config_path, &config)?;
        let program = Tools::from_env().require(Tool::Registry)?;
        let spec = Spec::new("docker-registry", program, dir.join("registry.log"), Ready::Tcp(port))
            .arg("serve")
            .arg(config_path);
        Ok(Registry { process: Process::run(spec)?, reserved })
    }

    /// `127.0.0.1:PORT`, the registry part of a scenario reference.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.reserved.number())
    }
}
