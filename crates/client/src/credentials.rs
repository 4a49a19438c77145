use std::{
    convert::Infallible,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use clap::Args;
use http::{HeaderValue, Request, header::AUTHORIZATION};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tower::Service;

use crate::ServerAddress;

/// The most that is read from a token file, in bytes.
const MAX_TOKEN_SIZE: u64 = 64 << 10;
/// How long a token that was read from a file is used before the file is read again.
const TOKEN_REFRESH: Duration = Duration::from_secs(10);

/// What the client shows to the server: nothing by default. As flags of a program, `--token-file`, `--ca`, `--cert`, `--key`, and the variables
/// `GAUNTLET_TOKEN` and `GAUNTLET_TOKEN_FILE`.
#[derive(Debug, Clone, Default, Args)]
pub struct Credentials {
    /// The bearer token. Prefer the variable or --token-file: other users can see the flags of a process.
    #[arg(long, env = "GAUNTLET_TOKEN", hide_env_values = true, global = true, value_name = "TOKEN")]
    pub token: Option<SecretString>,
    /// A file with the bearer token, and nothing else. It takes precedence over --token, and is read again while the program runs.
    #[arg(long, env = "GAUNTLET_TOKEN_FILE", global = true, value_parser = path, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The CA certificate that the server's certificate is checked against, PEM [default: the system's CAs].
    #[arg(long, env = "GAUNTLET_CA", global = true, value_parser = path, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The client certificate, PEM. Needs --key.
    #[arg(long, env = "GAUNTLET_CERT", global = true, value_parser = path, value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// The private key of the client certificate, PEM. Needs --cert.
    #[arg(long, env = "GAUNTLET_KEY", global = true, value_parser = path, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// Credentials that cannot be used, or not with this server. The text names the flag and the fix, and has no secret.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A token would be readable on the network.
    #[error("a token is not sent to {server}: the connection is not encrypted; use https://, or a loopback address")]
    Plaintext {
        /// The server.
        server: String,
    },
    /// Flags for TLS, and an address without TLS.
    #[error("{flag} has no effect with {server}: the connection is not encrypted; use https://")]
    Unused {
        /// The flag.
        flag: &'static str,
        /// The server.
        server: String,
    },
    /// A certificate without a key, or a key without a certificate.
    #[error("{given} needs {missing}")]
    Incomplete {
        /// The flag that was given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {flag} {}: {reason}", file.display())]
    Unreadable {
        /// The flag.
        flag: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The token is not one.
    #[error("{from} is not a token: it must be one line without spaces")]
    NoToken {
        /// The flag or file it came from.
        from: String,
    },
}

impl Credentials {
    /// Reads the token, if there is one, and checks that it may be sent to `server`.
    pub(crate) fn bearer(&self, server: &ServerAddress) -> Result<Option<Arc<Bearer>>, CredentialsError> {
        let source = match (non_empty(&self.token_file), &self.token) {
            (Some(file), _) => Source::File(file.to_owned()),
            (None, Some(token)) if !token.expose_secret().is_empty() => Source::Fixed(token.clone()),
            (None, _) => return Ok(None),
        };
        if !server.is_encrypted() && !server.is_loopback() {
            return Err(CredentialsError::Plaintext { server: server.to_string() });
        }
        let header = source.read()?;
        Ok(Some(Arc::new(Bearer { source, current: Mutex::new((Instant::now(), header)) })))
    }

    /// Reads the files for TLS. `None`: the connection is not encrypted.
    pub(crate) fn tls(&self, server: &ServerAddress) -> Result<Option<ClientTlsConfig>, CredentialsError> {
        let (ca, cert, key) = (non_empty(&self.ca), non_empty(&self.cert), non_empty(&self.key));
        if !server.is_encrypted() {
            let given = [("--ca", ca), ("--cert", cert), ("--key", key)].into_iter().find(|(_, file)| file.is_some());
            return given
                .map_or(Ok(None), |(flag, _)| Err(CredentialsError::Unused { flag, server: server.to_string() }));
        }
        let mut tls = match ca {
            Some(file) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--ca", file)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        match (cert, key) {
            (Some(cert), Some(key)) => {
                tls = tls.identity(Identity::from_pem(read("--cert", cert)?, read("--key", key)?));
            }
            (Some(_), None) => return Err(CredentialsError::Incomplete { given: "--cert", missing: "--key" }),
            (None, Some(_)) => return Err(CredentialsError::Incomplete { given: "--key", missing: "--cert" }),
            (None, None) => {}
        }
        Ok(Some(tls))
    }
}

/// Takes any path, also an empty one.
fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

/// Empty variables count as unset.
fn non_empty(file: &Option<PathBuf>) -> Option<&Path> {
    file.as_deref().filter(|file| !file.as_os_str().is_empty())
}

fn read(flag: &'static str, file: &Path) -> Result<Vec<u8>, CredentialsError> {
    fs::read(file).map_err(|error| CredentialsError::Unreadable {
        flag,
        file: file.to_owned(),
        reason: error.to_string(),
    })
}

/// Where a token comes from.
#[derive(Debug)]
enum Source {
    Fixed(SecretString),
    File(PathBuf),
}

impl Source {
    /// The token as a header, which `Debug` does not show.
    fn read(&self) -> Result<HeaderValue, CredentialsError> {
        let (token, from) = match self {
            Self::Fixed(token) => (token.clone(), "--token (GAUNTLET_TOKEN)".to_owned()),
            Self::File(file) => {
                let unreadable = |error: std::io::Error| CredentialsError::Unreadable {
                    flag: "--token-file",
                    file: file.clone(),
                    reason: error.to_string(),
                };
                let mut text = String::new();
                let opened = fs::File::open(file).map_err(unreadable)?;
                opened.take(MAX_TOKEN_SIZE).read_to_string(&mut text).map_err(unreadable)?;
                (SecretString::from(text), format!("--token-file {}", file.display()))
            }
        };
        let token = token.expose_secret().trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(CredentialsError::NoToken { from });
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| CredentialsError::NoToken { from: from.clone() })?;
        header.set_sensitive(true);
        Ok(header)
    }
}

/// A token, read again from its file from time to time: tokens in files are replaced before they expire.
#[derive(Debug)]
pub(crate) struct Bearer {
    source: Source,
    current: Mutex<(Instant, HeaderValue)>,
}

impl Bearer {
    fn header(&self) -> HeaderValue {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(self.source, Source::File(_)) && current.0.elapsed() >= TOKEN_REFRESH {
            current.0 = Instant::now();
            match self.source.read() {
                Ok(header) => current.1 = header,
                Err(error) => tracing::warn!(%error, "keeping the token that was read before"),
            }
        }
        current.1.clone()
    }
}

/// Adds the token to each call.
#[derive(Debug, Clone)]
pub struct Authenticated<S> {
    inner: S,
    bearer: Option<Arc<Bearer>>,
}

impl<S> Authenticated<S> {
    pub(crate) fn new(inner: S, bearer: Option<Arc<Bearer>>) -> Self {
        Self { inner, bearer }
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for Authenticated<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        if let Some(bearer) = &self.bearer {
            request.headers_mut().insert(AUTHORIZATION, bearer.header());
        }
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const TOKEN: &str = "gnt_secret";

    fn with_token() -> Credentials {
        Credentials { token: Some(TOKEN.into()), ..Credentials::default() }
    }

    fn server(text: &str) -> ServerAddress {
        text.parse().unwrap()
    }

    #[test]
    fn token_is_sent_over_tls_and_to_loopback_only() {
        for address in ["https://manager", "http://localhost:8080", "http://127.0.0.2:80", "http://[::1]:8080"] {
            assert!(with_token().bearer(&server(address)).unwrap().is_some(), "{address}");
        }
        for address in
            ["http://manager:8080", "http://10.0.0.1:8080", "http://localhost.example:80", "http://[::2]:8080"]
        {
            let error = with_token().bearer(&server(address)).unwrap_err().to_string();
            assert!(error.contains(address) && error.contains("https://") && !error.contains(TOKEN), "{error}");
        }
        assert!(Credentials::default().bearer(&server("http://manager:8080")).unwrap().is_none());
    }

    #[test]
    fn token_file_takes_precedence_and_its_text_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let from = |text: &str| {
            fs::write(&file, text).unwrap();
            let credentials = Credentials { token_file: Some(file.clone()), ..with_token() };
            credentials.bearer(&server("localhost:1")).map(|bearer| bearer.unwrap().header())
        };
        assert_eq!(from("other\n").unwrap().to_str().unwrap(), "Bearer other");
        for wrong in ["", "\n", "two words", "two\nlines", "é"] {
            let error = from(wrong).unwrap_err().to_string();
            assert!(error.contains("--token-file") && error.contains("one line"), "{error}");
        }
        fs::remove_file(&file).unwrap();
        let missing = Credentials { token_file: Some(file), ..Credentials::default() };
        assert!(
            missing.bearer(&server("localhost:1")).unwrap_err().to_string().starts_with("cannot read --token-file /")
        );
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = with_token();
        let bearer = credentials.bearer(&server("localhost:1")).unwrap();
        let shown = format!("{credentials:?} {bearer:?} {:?}", bearer.as_ref().unwrap().header());
        assert!(!shown.contains(TOKEN), "{shown}");
    }

    #[test]
    fn flags_for_tls_need_tls_and_each_other() {
        let file = || Some(PathBuf::from("/nonexistent"));
        let refused = |credentials: Credentials, address: &str| {
            credentials.tls(&server(address)).map(drop).unwrap_err().to_string()
        };
        let cert = || Credentials { cert: file(), ..Credentials::default() };
        assert!(refused(cert(), "localhost:1").starts_with("--cert has no effect with http://localhost:1"));
        assert_eq!(refused(cert(), "https://a"), "--cert needs --key");
        assert_eq!(refused(Credentials { key: file(), ..Credentials::default() }, "https://a"), "--key needs --cert");
        let ca = Credentials { ca: file(), ..Credentials::default() };
        assert!(refused(ca, "https://a").starts_with("cannot read --ca /nonexistent: "));
        assert!(Credentials::default().tls(&server("localhost:1")).unwrap().is_none());
    }
}
