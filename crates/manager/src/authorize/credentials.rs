//! The credentials that the manager accepts, from files that are reloaded when they change.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use gauntlet_access::{FileError, Principal, Rejection, SubjectFile, Token, TokenFile};
use http::HeaderValue;
use jiff::Timestamp;
use tokio::time::MissedTickBehavior;

use super::Denial;
use crate::{config::AccessConfig, peer::ClientCertificate, tasks::Tasks};

/// How often the files are read. A removed token is accepted for at most this long.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum size of a file, in bytes: more than 50,000 tokens.
const MAX_FILE_SIZE: u64 = 16 << 20;

/// The accepted credentials.
#[derive(Default)]
pub(crate) struct Credentials {
    tokens: Option<Reloaded<TokenFile>>,
    subjects: Option<Reloaded<SubjectFile>>,
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
        Ok(Self { tokens, subjects })
    }

    /// Starts the task that reloads the files when they change.
    pub(crate) fn start(self: &Arc<Self>, tasks: &Tasks) {
        if self.tokens.is_none() && self.subjects.is_none() {
            return;
        }
        let credentials = self.clone();
        tasks.spawn("credentials", |stop| async move {
            let mut ticks = tokio::time::interval(RELOAD_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => {}
                }
                let current = credentials.clone();
                if let Err(error) = tokio::task::spawn_blocking(move || current.reload()).await {
                    tracing::error!(%error, "cannot check the credential files");
                }
            }
        });
    }

    /// Reads the files again. A file that cannot be used keeps what was read before, and is logged once.
    pub(crate) fn reload(&self) {
        if let Some(tokens) = &self.tokens {
            tokens.reload();
        }
        if let Some(subjects) = &self.subjects {
            subjects.reload();
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
        let Some(tokens) = &self.tokens else {
            return Err(invalid("a bearer token, and the manager has no token file (--tokens)"));
        };
        let token: Token = credentials.trim().parse().map_err(|error| Denial::Invalid(format!("{error}")))?;
        tokens.current().authenticate(&token, Timestamp::now()).map_err(|rejection| match rejection {
            Rejection::Unknown(_) | Rejection::WrongSecret(_) => Denial::Invalid(rejection.to_string()),
            Rejection::Expired(_) => Denial::Expired(rejection.to_string()),
        })
    }

    /// Returns the holder of a certificate that the listener has verified. A certificate without a rule is refused, also where callers without
    /// credentials are let in: removing its rule must not leave its holder more than it had.
    pub(super) fn by_certificate(&self, certificate: &ClientCertificate) -> Result<Arc<Principal>, Denial> {
        let names = certificate.names();
        let found = self.subjects.as_ref().and_then(|rules| rules.current().find(names.iter().map(String::as_str)));
        found.ok_or_else(|| Denial::Invalid(format!("no rule in --client-subjects for the certificate of {names:?}")))
    }
}

/// The contents of a file, as of the last time that it could be used.
struct Reloaded<T> {
    flag: &'static str,
    path: PathBuf,
    parse: fn(&str) -> Result<T, FileError>,
    state: RwLock<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    /// The text, or the error, that was seen last. Contents are compared, and not times, which may be the same after a change.
    seen: Result<String, String>,
}

impl<T> Reloaded<T> {
    fn load(flag: &'static str, path: &Path, parse: fn(&str) -> Result<T, FileError>) -> anyhow::Result<Self> {
        let name = || format!("cannot use {flag} {}", path.display());
        let text = read(path).with_context(name)?;
        let current = Arc::new(parse(&text).with_context(name)?);
        Ok(Self { flag, path: path.to_owned(), parse, state: RwLock::new(State { current, seen: Ok(text) }) })
    }

    fn current(&self) -> Arc<T> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    fn reload(&self) {
        let seen = read(&self.path).map_err(|error| error.to_string());
        if self.state.read().unwrap_or_else(PoisonError::into_inner).seen == seen {
            return;
        }
        let parsed = match &seen {
            Ok(text) => (self.parse)(text).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.seen = seen;
        match parsed {
            Ok(current) => {
                state.current = Arc::new(current);
                tracing::info!(file = %self.path.display(), "{} has changed and is in use", self.flag);
            }
            Err(error) => {
                tracing::error!(file = %self.path.display(), error, "{} cannot be used; keeping what was read before", self.flag);
            }
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_SIZE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(io::Error::other(format!("larger than {MAX_FILE_SIZE} bytes")));
    }
    Ok(text)
}
