//! The credentials that the manager accepts, from files that are reloaded when they change.

use std::{sync::Arc, time::Duration};

use gauntlet_access::{JwtRejection, JwtVerifier, Keys, Principal, Rejection, SubjectFile, Token, TokenFile};
use http::HeaderValue;
use jiff::Timestamp;

use super::{reloaded::Reloaded, remote_keys::RemoteKeys};
use crate::{
    caller::Denial,
    config::{AccessConfig, KeySource},
    peer::ClientCertificate,
    tasks::{Tasks, repeat_blocking},
};

/// How often the files are read. A removed token is accepted for at most this long.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// The accepted credentials.
#[derive(Default)]
pub(crate) struct Credentials {
    tokens: Option<Reloaded<TokenFile>>,
    subjects: Option<Reloaded<SubjectFile>>,
    jwts: Option<Jwts>,
}

/// Where the keys for JWTs come from.
enum Jwts {
    File(Reloaded<JwtVerifier>),
    Url(Arc<RemoteKeys>),
}

impl Credentials {
    /// Reads the configured files.
    ///
    /// # Errors
    /// A file cannot be read or parsed; the text names file, line, field and fix.
    pub(crate) fn load(config: &AccessConfig) -> anyhow::Result<Self> {
        let tokens =
            config.tokens.as_ref().map(|path| Reloaded::load("--tokens", path, TokenFile::parse)).transpose()?;
        let subjects = config.client_subjects.as_ref();
        let subjects =
            subjects.map(|path| Reloaded::load("--client-subjects", path, SubjectFile::parse)).transpose()?;
        let jwts = match &config.oidc {
            None => None,
            Some(oidc) => {
                let policy = oidc.policy.clone();
                Some(match &oidc.keys {
                    KeySource::File(path) => Jwts::File(Reloaded::load("--oidc-jwks", path, move |text| {
                        Keys::parse(text).map(|keys| JwtVerifier::new(policy.clone(), keys))
                    })?),
                    KeySource::Url(url) => Jwts::Url(Arc::new(RemoteKeys::new(url, oidc.ca.as_deref(), policy)?)),
                })
            }
        };
        Ok(Self { tokens, subjects, jwts })
    }

    /// Starts the tasks that reload the files when they change, and fetch the keys for JWTs.
    pub(crate) fn start(self: &Arc<Self>, tasks: &Tasks) {
        if let Some(Jwts::Url(keys)) = &self.jwts {
            let keys = keys.clone();
            tasks.spawn("jwks", |stop| async move { keys.refresh(stop).await });
        }
        if self.tokens.is_none() && self.subjects.is_none() && !matches!(self.jwts, Some(Jwts::File(_))) {
            return;
        }
        let credentials = self.clone();
        tasks.spawn("credentials", |stop| repeat_blocking(RELOAD_INTERVAL, stop, move || credentials.reload()));
    }

    /// Reads the files again. A file that cannot be used keeps what was read before, and is logged once.
    pub(crate) fn reload(&self) {
        if let Some(tokens) = &self.tokens {
            tokens.reload();
        }
        if let Some(subjects) = &self.subjects {
            subjects.reload();
        }
        if let Some(Jwts::File(keys)) = &self.jwts {
            keys.reload();
        }
    }

    /// Whether there is a subject file.
    pub(super) fn has_subjects(&self) -> bool {
        self.subjects.is_some()
    }

    /// Returns the holder of the credentials in an `authorization` header.
    pub(super) fn by_header(&self, header: &HeaderValue) -> Result<Arc<Principal>, Denial> {
        let invalid = |why: &str| Denial::Invalid(why.to_owned());
        let text = header.to_str().map_err(|_| invalid("the authorization header is not text"))?;
        let (scheme, credentials) =
            text.split_once(' ').ok_or_else(|| invalid("the authorization header has no scheme"))?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(invalid("the authorization header is not a bearer token"));
        }
        let credentials = credentials.trim();
        match (&self.tokens, &self.jwts) {
            (None, None) => Err(invalid("a bearer token, and the manager accepts none (--tokens, --oidc-issuer)")),
            (_, Some(jwts)) if !Token::has_prefix(credentials) => jwts.authenticate(credentials),
            (None, Some(_)) => Err(invalid("a token, and the manager has no token file (--tokens)")),
            (Some(tokens), _) => {
                let token: Token = credentials.parse().map_err(|error| Denial::Invalid(format!("{error}")))?;
                tokens.current().authenticate(&token, Timestamp::now()).map_err(|rejection| match rejection {
                    Rejection::Unknown(_) | Rejection::WrongSecret(_) => Denial::Invalid(rejection.to_string()),
                    Rejection::Expired(_) => Denial::Expired(rejection.to_string()),
                })
            }
        }
    }

    /// Returns the holder of a certificate that the listener has verified. A certificate without a rule is refused, also where callers without
    /// credentials are let in: removing its rule must not leave its holder more than it had.
    pub(super) fn by_certificate(&self, certificate: &ClientCertificate) -> Result<Arc<Principal>, Denial> {
        let names = certificate.names();
        let found = self.subjects.as_ref().and_then(|rules| rules.current().find(names.iter().map(String::as_str)));
        found.ok_or_else(|| Denial::Invalid(format!("no rule in --client-subjects for the certificate of {names:?}")))
    }
}

impl Jwts {
    fn authenticate(&self, jwt: &str) -> Result<Arc<Principal>, Denial> {
        let verifier = match self {
            Self::File(keys) => Some(keys.current()),
            Self::Url(keys) => keys.current(),
        };
        let no_keys = || Denial::Invalid("a JWT, and the keys of the issuer have not been fetched yet".to_owned());
        let rejected = |rejection: JwtRejection| match &rejection {
            JwtRejection::Expired(_) => Denial::Expired(rejection.to_string()),
            JwtRejection::UnknownKey(_) => {
                if let Self::Url(keys) = self {
                    keys.request_refresh();
                }
                Denial::Invalid(rejection.to_string())
            }
            JwtRejection::Invalid(_) => Denial::Invalid(rejection.to_string()),
        };
        verifier.ok_or_else(no_keys)?.authenticate(jwt, Timestamp::now()).map_err(rejected)
    }
}
