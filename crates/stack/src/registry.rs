//! An OCI registry (CNCF distribution, Debian's docker-registry).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::ports::Reserved;
use crate::{Process, Ready, Result, Spec, Tool, Tools, create_dir, write};

/// How the registry is reached, and by whom.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Lines of an htpasswd file (bcrypt only); without it, anyone may pull and push.
    pub htpasswd: Option<String>,
    /// Certificate chain and key, PEM files; without them, plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl RegistryOptions {
    /// The name of [`RegistryOptions::with_user`]'s user.
    pub const USER: &str = "author";
    /// The password of [`RegistryOptions::with_user`]'s user.
    pub const PASSWORD: &str = "registry-secret";

    /// Plain HTTP, for one user only.
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
    /// Starts one whose blobs, configuration and log are in `dir`, and waits until it listens.
    ///
    /// # Errors
    /// [`crate::Error::Missing`] without a registry binary; what [`Process::run`] reports.
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

    /// `127.0.0.1:PORT`, the first part of a reference.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.reserved.number())
    }
}
