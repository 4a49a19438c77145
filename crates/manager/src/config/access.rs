//! The flags that say who may call the API.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use clap::Args;
use gauntlet_access::{JwtPolicy, RateLimit, Scope};
use gauntlet_telemetry::Instruments;

use crate::caller::CallerLimits;

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
    /// The maximum number of calls per second of one caller: the holder of a token, certificate or JWT, or an address without credentials.
    /// Further ones fail with RESOURCE_EXHAUSTED (429). 0 is no limit.
    #[arg(long, env = "MAX_CALL_RATE", default_value = "10000", value_name = "COUNT", help_heading = "Limits")]
    pub max_call_rate: u32,
    /// The maximum number of creates, renewals and deletions per second of the instances of one source, which is a user or a team. Further ones
    /// fail with RESOURCE_EXHAUSTED (429). 0 is no limit.
    #[arg(long, env = "MAX_SOURCE_RATE", default_value = "1000", value_name = "COUNT", help_heading = "Limits")]
    pub max_source_rate: u32,
    #[command(flatten)]
    oidc_flags: OidcFlags,
    /// The issuer whose JWTs the API accepts, made of the flags above when they are checked.
    #[arg(skip)]
    pub oidc: Option<Oidc>,
}

/// OpenID Connect, as it is written on the command line.
#[derive(Debug, Clone, Default, Args)]
struct OidcFlags {
    /// The OpenID Connect issuer whose JWTs the API accepts, exactly as in their claim "iss". Needs --oidc-audience and --oidc-jwks.
    #[arg(long, env = "OIDC_ISSUER", value_name = "URL", help_heading = "Access")]
    oidc_issuer: Option<String>,
    /// The audience that JWTs must name in their claim "aud".
    #[arg(long, env = "OIDC_AUDIENCE", value_name = "NAME", help_heading = "Access")]
    oidc_audience: Option<String>,
    /// The public keys of the issuer (JWKS): an https:// URL, fetched every 5 minutes and when a JWT names an unknown key, or a file, reloaded when
    /// it changes.
    #[arg(long, env = "OIDC_JWKS", value_name = "URL|FILE", help_heading = "Access")]
    oidc_jwks: Option<String>,
    /// The CA certificate that the server of --oidc-jwks is checked against, PEM [default: the system's CAs].
    #[arg(long, env = "OIDC_CA", value_parser = path, value_name = "FILE", help_heading = "Access")]
    oidc_ca: Option<PathBuf>,
    /// The claim with the scopes: gauntlet:read, gauntlet:operate or gauntlet:admin, in a list or separated by spaces, among others.
    #[arg(long, env = "OIDC_SCOPE_CLAIM", default_value = "scope", value_name = "CLAIM", help_heading = "Access")]
    oidc_scope_claim: String,
    /// The claim with the list of challenges that the holder sees and changes. A JWT without it is for all of them.
    #[arg(
        long,
        env = "OIDC_CHALLENGES_CLAIM",
        default_value = "gauntlet_challenges",
        value_name = "CLAIM",
        help_heading = "Access"
    )]
    oidc_challenges_claim: String,
}

/// The issuer whose JWTs the API accepts.
#[derive(Debug, Clone)]
pub struct Oidc {
    /// What a JWT must have.
    pub policy: Arc<JwtPolicy>,
    /// Where the issuer's keys come from.
    pub keys: KeySource,
    /// The CA of the keys' server; `None`: the system's.
    pub ca: Option<PathBuf>,
}

/// Where the keys of an issuer come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file, reloaded when it changes.
    File(PathBuf),
    /// An `https` URL.
    Url(String),
}

impl AccessConfig {
    /// Whether callers can authenticate themselves to the API.
    pub fn has_authentication(&self) -> bool {
        self.tokens.is_some() || self.client_subjects.is_some() || self.oidc.is_some()
    }

    /// The limits on callers.
    pub(crate) fn limits(&self, instruments: &Instruments) -> CallerLimits {
        CallerLimits {
            calls: RateLimit::new(self.max_call_rate),
            changes: RateLimit::new(self.max_source_rate),
            denials: instruments.access.clone(),
        }
    }

    /// Turns authentication off.
    pub fn without_authentication(&mut self) {
        (self.tokens, self.client_subjects, self.oidc) = (None, None, None);
    }

    /// Checks flags against each other. Empty variables count as unset.
    ///
    /// # Errors
    /// A flag that needs another, and an address without TLS.
    pub(super) fn check(&mut self) -> Result<(), String> {
        for file in [&mut self.tokens, &mut self.client_subjects] {
            file.take_if(|path| path.as_os_str().is_empty());
        }
        let OidcFlags { oidc_issuer, oidc_audience, oidc_jwks, oidc_ca, .. } = &self.oidc_flags;
        let text = |flag: &Option<String>| flag.clone().filter(|text| !text.is_empty());
        self.oidc = match (text(oidc_issuer), text(oidc_audience), text(oidc_jwks)) {
            (None, None, None) => None,
            (Some(issuer), Some(audience), Some(jwks)) => Some(Oidc {
                policy: Arc::new(JwtPolicy {
                    issuer,
                    audience,
                    scope_claim: self.oidc_flags.oidc_scope_claim.clone(),
                    challenges_claim: self.oidc_flags.oidc_challenges_claim.clone(),
                }),
                keys: key_source(jwks)?,
                ca: oidc_ca.clone().filter(|path| !path.as_os_str().is_empty()),
            }),
            _ => {
                let flags = "--oidc-issuer (OIDC_ISSUER), --oidc-audience (OIDC_AUDIENCE) and --oidc-jwks (OIDC_JWKS)";
                return Err(format!("{flags} go together: pass all three or none"));
            }
        };
        Ok(())
    }
}

/// The scope that is needed; `None`: everybody may, without credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Openness(pub Option<Scope>);

fn key_source(text: String) -> Result<KeySource, String> {
    match text.split_once("://") {
        None => Ok(KeySource::File(text.into())),
        Some(("https", _)) => Ok(KeySource::Url(text)),
        // A party that can change the keys in transit can sign JWTs for any caller.
        Some(_) => Err(format!("--oidc-jwks (OIDC_JWKS) is {text:?}: pass an https:// URL or a file")),
    }
}

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

    const OIDC: [&str; 4] = ["--oidc-issuer", "https://id.example", "--oidc-audience", "gauntlet"];

    #[test]
    fn issuer_needs_audience_and_keys() {
        let with = |jwks: &[&str]| parse(&[&OIDC, jwks].concat());
        let config = with(&["--oidc-jwks", "https://id.example/keys"]).unwrap();
        assert!(config.has_authentication());
        let oidc = config.oidc.unwrap();
        assert_eq!(oidc.keys, KeySource::Url("https://id.example/keys".to_owned()));
        assert_eq!((oidc.policy.scope_claim.as_str(), oidc.ca), ("scope", None));
        let keys = |jwks: &str| with(&["--oidc-jwks", jwks]).map(|config| config.oidc.unwrap().keys);
        assert_eq!(keys("keys.json").unwrap(), KeySource::File("keys.json".into()));
        let text = keys("http://id.example/keys").unwrap_err().to_string();
        assert!(text.contains("--oidc-jwks") && text.contains("https://"), "{text}");
        for incomplete in [with(&[]), with(&["--oidc-jwks", ""]), parse(&["--oidc-jwks", "keys.json"])] {
            assert!(incomplete.unwrap_err().to_string().contains("pass all three or none"));
        }
    }

    #[test]
    fn invalid_access_names_flag_and_fix() {
        let text = parse(&["--health-access", "all"]).unwrap_err().to_string();
        assert!(text.contains("--health-access") && text.contains("use read, operate or admin, or open"), "{text}");
    }
}
