//! The certificate, key and client CA of TLS listeners, reloaded when their files change.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{Error as PemError, PemObject as _},
    },
    server::{NoClientAuth, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::tasks::repeat_blocking;

/// How often the files are checked for changes.
pub(crate) const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// The files of TLS listeners, PEM.
#[derive(Debug, Clone)]
pub(crate) struct TlsFiles {
    /// The certificate, followed by those of intermediate CAs.
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// The CA that client certificates are checked against. Without it clients are not asked for one.
    pub(crate) client_ca: Option<PathBuf>,
}

/// The modification time and length of each file; `None` for a file that cannot be read.
type Versions = Vec<Option<(SystemTime, u64)>>;

/// The certificates of a listener. Clones share them.
#[derive(Clone)]
pub(crate) struct Certificates(Arc<Shared>);

struct Shared {
    files: TlsFiles,
    requires_certificate: bool,
    current: Mutex<(Versions, Arc<ServerConfig>)>,
}

impl Certificates {
    /// Reads the files. With `requires_certificate`, clients must present a certificate of the client CA; else they may.
    ///
    /// # Errors
    /// A file cannot be used; the text names its flag, the file and the fix.
    pub(crate) fn load(files: TlsFiles, requires_certificate: bool) -> Result<Self, String> {
        // Before the read: a file that changes in between is then reloaded.
        let versions = files.versions();
        let config = files.read(requires_certificate)?;
        Ok(Self(Arc::new(Shared { files, requires_certificate, current: Mutex::new((versions, config)) })))
    }

    /// The acceptor for the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current().1.clone().into()
    }

    fn current(&self) -> std::sync::MutexGuard<'_, (Versions, Arc<ServerConfig>)> {
        // Poisoning does no harm: the pair is replaced whole.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the files every `interval` until `stop` is cancelled. New connections use what changed; if it cannot be used, they continue with
    /// what was there before, and the log says why.
    pub(crate) async fn keep_current(self, interval: Duration, stop: CancellationToken) {
        repeat_blocking(interval, stop, move || self.reload()).await;
    }

    fn reload(&self) {
        let versions = self.0.files.versions();
        if versions == self.current().0 {
            return;
        }
        let config = match self.0.files.read(self.0.requires_certificate) {
            Ok(config) => {
                tracing::info!(certificate = %self.0.files.certificate.display(), "TLS files reloaded");
                config
            }
            Err(error) => {
                tracing::error!(%error, "cannot use the changed TLS files; continuing with the previous ones");
                self.current().1.clone()
            }
        };
        *self.current() = (versions, config);
    }
}

impl TlsFiles {
    fn versions(&self) -> Versions {
        [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .map(|path| path.metadata().and_then(|file| Ok((file.modified()?, file.len()))).ok())
            .collect()
    }

    fn read(&self, requires_certificate: bool) -> Result<Arc<ServerConfig>, String> {
        let chain = certificates("--tls-cert", &self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| unusable("--tls-key", &self.key, error))?;
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ClientCertVerifier> = match &self.client_ca {
            None => Arc::new(NoClientAuth),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates("--tls-client-ca", path)? {
                    roots.add(certificate).map_err(|error| problem("--tls-client-ca", path, error))?;
                }
                let builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
                let builder = if requires_certificate { builder } else { builder.allow_unauthenticated() };
                builder.build().map_err(|error| problem("--tls-client-ca", path, error))?
            }
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => format!(
                    "--tls-key {} is not the key of the certificate in --tls-cert {}; pass the key that belongs to it",
                    self.key.display(),
                    self.certificate.display()
                ),
                error => problem("--tls-cert", &self.certificate, error),
            })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config.into())
    }
}

fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err(unusable(flag, path, PemError::NoItemsFound)),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(unusable(flag, path, error)),
    }
}

/// Describes a file that has none of what it should have. Never quotes its content: it may be a key.
fn unusable(flag: &str, path: &Path, error: PemError) -> String {
    match error {
        PemError::Io(error) if error.kind() == io::ErrorKind::NotFound => {
            problem(flag, path, "no such file; correct the path")
        }
        PemError::Io(error) => problem(flag, path, format!("cannot read it: {error}")),
        PemError::NoItemsFound if flag == "--tls-key" => {
            problem(flag, path, "no private key in it; expected PEM with -----BEGIN PRIVATE KEY-----, not encrypted")
        }
        PemError::NoItemsFound => {
            problem(flag, path, "no certificate in it; expected PEM with -----BEGIN CERTIFICATE-----")
        }
        _ => problem(flag, path, "not valid PEM; write the file again"),
    }
}

fn problem(flag: &str, path: &Path, problem: impl std::fmt::Display) -> String {
    format!("{flag} {}: {problem}", path.display())
}

#[cfg(test)]
mod tests;
