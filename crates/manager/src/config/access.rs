//! The flags that say who may call the API.

use std::{convert::Infallible, path::PathBuf};

use clap::Args;
use gauntlet_access::Scope;

/// Who may call the API.
#[derive(Debug, Clone, Args)]
pub struct AccessConfig {
    /// The file with the bearer tokens that the API accepts, as `gauntlet token create` writes it. It has no secrets. It is reloaded when it
    /// changes: a removed token is refused within seconds, and a file with an error is logged and changes nothing.
    #[arg(long, env = "TOKENS", value_parser = path, value_name = "FILE", help_heading = "Access")]
    pub tokens: Option<PathBuf>,
    /// The file that says what the holders of client certificates may do: one JSON object per line with "subject" (CN:NAME, DNS:NAME, URI:NAME
    /// or EMAIL:NAME), "name", "scope" (read, operate or admin) and optionally "challenges". It is reloaded when it changes.
    #[arg(long, env = "CLIENT_SUBJECTS", value_parser = path, value_name = "FILE", help_heading = "Access")]
    pub client_subjects: Option<PathBuf>,
    /// Who may ask for the health of the manager: "open" for everybody, or the scope that is needed.
    #[arg(long, env = "HEALTH_ACCESS", default_value = "open", value_parser = openness, value_name = "SCOPE", help_heading = "Access")]
    pub health_access: Openness,
    /// Who may use gRPC's server reflection, which describes the API: "open" for everybody, or the scope that is needed.
    #[arg(long, env = "REFLECTION_ACCESS", default_value = "read", value_parser = openness, value_name = "SCOPE", help_heading = "Access")]
    pub reflection_access: Openness,
}

impl AccessConfig {
    /// Whether callers can authenticate themselves to the API.
    pub fn has_authentication(&self) -> bool {
        self.tokens.is_some() || self.client_subjects.is_some()
    }

    /// Empty variables count as unset.
    pub(super) fn drop_empty(&mut self) {
        for file in [&mut self.tokens, &mut self.client_subjects] {
            file.take_if(|path| path.as_os_str().is_empty());
        }
    }
}

/// The scope that is needed; `None`: everybody may, without credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Openness(pub Option<Scope>);

/// Takes any path, also an empty one.
fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

fn openness(text: &str) -> Result<Openness, String> {
    match text {
        "open" => Ok(Openness(None)),
        scope => scope.parse().map(|scope| Openness(Some(scope))).map_err(|error| format!("{error}, or open")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use crate::Config;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<AccessConfig, clap::Error> {
        let arguments = std::iter::once("gauntlet-manager").chain(arguments.iter().copied());
        Config::checked(arguments).map(|config| config.access)
    }

    #[test]
    fn health_is_open_and_reflection_is_not_by_default() {
        let config = parse(&[]).unwrap();
        assert_eq!((config.health_access, config.reflection_access), (Openness(None), Openness(Some(Scope::Read))));
        assert!(!config.has_authentication());
    }

    #[test]
    fn empty_files_count_as_unset() {
        assert!(!parse(&["--tokens", "", "--client-subjects", ""]).unwrap().has_authentication());
        assert!(parse(&["--tokens", "t"]).unwrap().has_authentication());
        assert!(parse(&["--client-subjects", "s"]).unwrap().has_authentication());
    }

    #[test]
    fn invalid_access_names_flag_and_fix() {
        let text = parse(&["--health-access", "all"]).unwrap_err().to_string();
        assert!(text.contains("--health-access") && text.contains("use read, operate or admin, or open"), "{text}");
    }
}
