//! Credentials: which registry they are for.

use std::{fmt, path::PathBuf};

use secrecy::SecretString;

use super::{allowed::Host, docker, failure::Failure};

/// A user name and password for one registry. `Debug` hides the password.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The registry. They are sent to no other host.
    pub registry: Host,
    /// The user name.
    pub username: String,
    /// The password.
    pub password: SecretString,
}

/// What proves to a registry who is calling. `Debug` hides it.
#[derive(Clone)]
pub(crate) enum Login {
    /// A user name and password.
    Password(String, SecretString),
    /// A refresh token, exchanged for access tokens at the registry's token service.
    Identity(SecretString),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password(..) => "Password(hidden)",
            Self::Identity(_) => "Identity(hidden)",
        })
    }
}

/// The sources of credentials.
#[derive(Debug, Clone)]
pub(crate) struct Logins {
    pub(crate) credentials: Vec<Credentials>,
    pub(crate) docker_config: Option<PathBuf>,
}

impl Logins {
    /// Returns the credentials for a registry, if there are any. Docker's configuration is read each time, so that a new login counts at
    /// once.
    pub(crate) async fn of(&self, registry: &Host) -> Result<Option<Login>, Failure> {
        if let Some(found) = self.credentials.iter().find(|credentials| credentials.registry == *registry) {
            return Ok(Some(Login::Password(found.username.clone(), found.password.clone())));
        }
        match &self.docker_config {
            Some(config) => docker::login(config, registry).await.map_err(Failure::Broken),
            None => Ok(None),
        }
    }
}
