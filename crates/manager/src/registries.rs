//! The settings for registries: which are allowed, and whose credentials are whose.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use gauntlet_scenario::{Access, Allowed, Credentials, Host, RegistryPattern};
use secrecy::SecretString;

use crate::password::password;

/// The flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Scenarios")]
pub struct Registries {
    /// A registry that scenarios may come from, or the start of a repository's path: ghcr.io, ghcr.io/team. May be given several times, or
    /// separated by commas. Allowed registries may have private addresses [default: any while the manager listens on loopback only,
    /// otherwise none].
    #[arg(long, env = "REGISTRY_ALLOW", value_delimiter = ',', value_name = "PATTERN")]
    pub registry_allow: Vec<String>,
    /// Use plain HTTP for registries.
    #[arg(long, env = "OCI_INSECURE", value_parser = clap::builder::BoolishValueParser::new(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub oci_insecure: bool,
    /// The user name for a registry.
    #[arg(long, env = "OCI_USERNAME", value_name = "NAME")]
    pub oci_username: Option<String>,
    /// The password for a registry. Prefer --oci-password-file: other users can see the flags of a process.
    #[arg(long, env = "OCI_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    pub oci_password: Option<SecretString>,
    /// A file with the password for a registry.
    #[arg(long, env = "OCI_PASSWORD_FILE", value_name = "FILE")]
    pub oci_password_file: Option<PathBuf>,
    /// The registry that --oci-username and the password are for; they are sent to no other host [default: the registry in
    /// --registry-allow, if it names one].
    #[arg(long, env = "OCI_REGISTRY", value_name = "HOST")]
    pub oci_registry: Option<String>,
    /// A host that may get credentials because a registry names it as its token service. A registry's own host needs no mention. May be given
    /// several times, or separated by commas.
    #[arg(long, env = "OCI_TOKEN_HOST", value_delimiter = ',', value_name = "HOST")]
    pub oci_token_host: Vec<String>,
    /// Docker's config.json, or its directory, with credentials for further registries: its auths, credHelpers and credsStore.
    #[arg(long, env = "DOCKER_CONFIG", value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
}

impl Registries {
    /// Returns how to reach registries. `public` says whether the manager can be reached from other machines. Reads the password file.
    ///
    /// # Errors
    /// A value is invalid, or it is unclear which registry the credentials are for. The text names the flag and the fix.
    pub(crate) fn access(&self, public: bool) -> Result<Access> {
        let patterns: Vec<RegistryPattern> = parsed(&self.registry_allow, "--registry-allow (REGISTRY_ALLOW)")?;
        let credentials = self.credentials(&patterns)?;
        let allowed = if patterns.is_empty() && !public { Allowed::Any } else { Allowed::Only(patterns) };
        Ok(Access {
            allowed,
            insecure: self.oci_insecure,
            credentials: credentials.into_iter().collect(),
            docker_config: self.docker_config.clone().filter(|path| !path.as_os_str().is_empty()),
            token_hosts: parsed(&self.oci_token_host, "--oci-token-host (OCI_TOKEN_HOST)")?,
            ..Access::default()
        })
    }

    fn credentials(&self, patterns: &[RegistryPattern]) -> Result<Option<Credentials>> {
        let Some(username) = self.oci_username.clone().filter(|username| !username.is_empty()) else { return Ok(None) };
        let password = password("oci", self.oci_password.as_ref(), self.oci_password_file.as_deref())?;
        let mut hosts: Vec<&Host> = patterns.iter().map(RegistryPattern::host).collect();
        hosts.sort();
        hosts.dedup();
        let registry = match (self.oci_registry.as_deref().filter(|registry| !registry.is_empty()), hosts.as_slice()) {
            (Some(registry), _) => {
                registry.parse().map_err(|error| anyhow!("--oci-registry (OCI_REGISTRY): {error}"))?
            }
            (None, [host]) => (*host).clone(),
            (None, hosts) => bail!(
                "--oci-username (OCI_USERNAME) is set, but not which registry it is for, and --registry-allow names {}; pass --oci-registry HOST",
                if hosts.is_empty() { "none" } else { "several" }
            ),
        };
        Ok(Some(Credentials { registry, username, password }))
    }
}

/// Parses the values of a flag that may be given several times. Empty values count as unset: compose files set them.
fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(values: &[String], flag: &str) -> Result<Vec<T>> {
    let given = values.iter().map(|value| value.trim()).filter(|value| !value.is_empty());
    given.map(|value| value.parse().map_err(|error| anyhow!("{flag}: {error}"))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use clap::Parser as _;
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::Config;

    const USER: [&str; 4] = ["--oci-username", "ci", "--oci-password", "swordfish"];

    fn access(arguments: &[&str], public: bool) -> Result<Access> {
        let arguments = std::iter::once("gauntlet-manager").chain(arguments.iter().copied());
        Config::try_parse_from(arguments).unwrap().registries.access(public)
    }

    #[test]
    fn off_loopback_no_registry_is_allowed_until_one_is_named() {
        assert_eq!(access(&[], false).unwrap().allowed, Allowed::Any);
        assert_eq!(access(&["--registry-allow", ""], true).unwrap().allowed, Allowed::Only(Vec::new()));
        for public in [false, true] {
            let several = access(&["--registry-allow", "ghcr.io/team,registry.lan:5000"], public).unwrap();
            let expected = ["ghcr.io/team", "registry.lan:5000"].map(|pattern| pattern.parse().unwrap());
            assert_eq!(several.allowed, Allowed::Only(expected.into()));
        }
    }

    #[test]
    fn credentials_belong_to_one_registry() {
        for (arguments, registry) in [
            (&["--registry-allow", "ghcr.io"][..], "ghcr.io"),
            (&["--registry-allow", "ghcr.io/a,ghcr.io/b"], "ghcr.io"),
            (&["--registry-allow", "ghcr.io,quay.io", "--oci-registry", "quay.io"], "quay.io"),
            (&["--oci-registry", "Registry.lan:5000"], "registry.lan:5000"),
        ] {
            let [credentials] = access(&[&USER, arguments].concat(), true).unwrap().credentials.try_into().unwrap();
            assert_eq!(credentials.registry.to_string(), registry, "{arguments:?}");
            assert_eq!((credentials.username.as_str(), credentials.password.expose_secret()), ("ci", "swordfish"));
        }
        assert!(access(&["--oci-username", "", "--oci-password", ""], true).unwrap().credentials.is_empty());
    }

    #[test]
    fn ambiguous_or_incomplete_credentials_are_refused_with_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "\n").unwrap();
        for (arguments, parts) in [
            ([&USER[..], &[]].concat(), ["names none", "--oci-registry HOST"]),
            ([&USER[..], &["--registry-allow", "a.io,b.io"]].concat(), ["names several", "--oci-registry HOST"]),
            (
                [&USER[..], &["--oci-registry", "https://a.io"]].concat(),
                ["--oci-registry (OCI_REGISTRY)", "such as ghcr.io"],
            ),
            ([&USER[..], &["--oci-password-file", "f"]].concat(), ["both set", "keep one"]),
            (["--oci-username", "ci"].to_vec(), ["needs a password", "--oci-password-file"]),
            (
                vec!["--oci-username", "ci", "--oci-password-file", empty.to_str().unwrap()],
                ["OCI_PASSWORD_FILE", "it is empty"],
            ),
            (vec!["--registry-allow", "*"], ["--registry-allow (REGISTRY_ALLOW)", "such as ghcr.io"]),
        ] {
            let text = format!("{:#}", access(&arguments, true).unwrap_err());
            assert!(parts.iter().all(|part| text.contains(part)) && !text.contains("swordfish"), "{text}");
        }
    }
}
