//! The client of OCI registries: resolves tags, pulls and pushes scenarios.

use std::{path::PathBuf, time::Duration};

use futures::StreamExt as _;
use gauntlet_domain::{Error, Result};
use oci_client::{
    Client, Reference,
    client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageManifest},
    secrets::RegistryAuth,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use crate::{
    archive,
    cache::Cache,
    digest::Digest,
    files::{Draft, FileError, FileLimits, blocking, refused},
};

/// The artifact type of a scenario.
pub(crate) const ARTIFACT_TYPE: &str = "application/vnd.ctfer-io.scenario";
/// The media type of one of its files.
pub(crate) const FILE_TYPE: &str = "application/vnd.ctfer-io.file";
/// The media type of a directory packed as one layer.
pub(crate) const ARCHIVE_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The annotation that holds a layer's path.
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
/// The annotation of a layer that must be unpacked.
const UNPACK: &str = "io.deis.oras.content.unpack";

/// How to reach registries.
#[derive(Debug, Clone)]
pub struct Access {
    /// Plain HTTP instead of HTTPS.
    pub insecure: bool,
    /// Credentials for registries that require them.
    pub credentials: Option<Credentials>,
    /// Certificates (PEM) to trust in addition to the system's.
    pub extra_roots: Vec<Vec<u8>>,
    /// The time limit for connecting.
    pub connect_timeout: Duration,
    /// The time limit between two reads of a response.
    pub read_timeout: Duration,
    /// The time limit for a whole pull, push or tag lookup.
    pub timeout: Duration,
}

impl Default for Access {
    /// HTTPS without credentials; 10 s to connect, 30 s between reads, 5 min in total.
    fn default() -> Self {
        Self {
            insecure: false,
            credentials: None,
            extra_roots: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            timeout: Duration::from_secs(300),
        }
    }
}

/// A user name and password for registries. `Debug` hides the password.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The registry (`host` or `host:port`) to send them to. `None` sends them to any registry that a reference names: use it only if you
    /// trust everybody who may create challenges with the password.
    pub registry: Option<String>,
    /// The user name.
    pub username: String,
    /// The password.
    pub password: SecretString,
}

/// Parses an OCI reference: `registry/repository`, then a tag, a SHA-256 digest, both, or neither (`latest`).
pub(crate) fn parse(reference: &str) -> Result<(Reference, Option<Digest>)> {
    let wrong = |problem: String| Err(Error::ReferenceMalformed { reference: reference.to_owned(), problem });
    let form = "must be registry/repository[:tag][@sha256:digest]";
    // Clients disagree on which registry a reference without a host means.
    let host = reference.split_once('/').map_or("", |(host, _)| host);
    if !(host.contains(['.', ':']) || host == "localhost") {
        return wrong(format!("{form}, the registry with a dot or a port in it"));
    }
    if reference.len() > 1024 {
        return wrong(format!("{form}, at most 1024 bytes"));
    }
    let parsed = match Reference::try_from(reference) {
        Ok(parsed) => parsed,
        Err(error) => return wrong(format!("{form}: {error}")),
    };
    match parsed.digest().map(str::parse).transpose() {
        Ok(digest) => Ok((parsed, digest)),
        Err(error) => wrong(format!("the digest {error}")),
    }
}

/// A registry client.
pub(crate) struct Registry {
    client: Client,
    access: Access,
}

impl Registry {
    /// The error text is for the operator.
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        // An error means that a provider is already installed, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        for (at, pem) in access.extra_roots.iter().enumerate() {
            let mut certificates = CertificateDer::pem_slice_iter(pem).peekable();
            if certificates.peek().is_none() || certificates.any(|certificate| certificate.is_err()) {
                return Err(format!("extra root {}: holds no certificate in PEM form", at + 1));
            }
        }
        let root = |pem: &Vec<u8>| Certificate { encoding: CertificateEncoding::Pem, data: pem.clone() };
        let config = ClientConfig {
            protocol: if access.insecure { ClientProtocol::Http } else { ClientProtocol::Https },
            extra_root_certificates: access.extra_roots.iter().map(root).collect(),
            platform_resolver: None,
            connect_timeout: Some(access.connect_timeout),
            read_timeout: Some(access.read_timeout),
            user_agent: concat!("gauntlet/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| format!("registry client: {}", chain(&error)))?;
        Ok(Self { client, access: access.clone() })
    }

    fn auth(&self, target: &Reference) -> RegistryAuth {
        match &self.access.credentials {
            Some(Credentials { registry, username, password })
                if registry.as_deref().is_none_or(|registry| registry == target.registry()) =>
            {
                RegistryAuth::Basic(username.clone(), password.expose_secret().to_owned())
            }
            _ => RegistryAuth::Anonymous,
        }
    }

    /// Runs `work` with the configured timeout.
    pub(crate) async fn with_timeout<T>(&self, reference: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.access.timeout, work).await.unwrap_or_else(|_| {
            let detail = format!("timed out after {} s", self.access.timeout.as_secs_f32());
            Err(Error::Registry { reference: reference.to_owned(), detail })
        })
    }

    /// Returns the digest that a tag points to now.
    pub(crate) async fn resolve_tag(&self, reference: &str, target: &Reference) -> Result<Digest> {
        let auth = self.auth(target);
        let lookup =
            async { self.client.fetch_manifest_digest(target, &auth).await.map_err(|error| failed(reference, &error)) };
        let digest = self.with_timeout(reference, lookup).await?;
        digest.parse().map_err(|error| {
            let detail = format!("the digest that the registry gives the manifest, {digest:?}, {error}");
            Error::Registry { reference: reference.to_owned(), detail }
        })
    }

    /// Pulls an artifact by digest, checks it and caches it. Returns its directory.
    pub(crate) async fn pull(
        &self,
        reference: &str,
        target: &Reference,
        digest: Digest,
        cache: &Cache,
        limits: &FileLimits,
    ) -> Result<PathBuf> {
        let target = target.clone_with_digest(digest.to_string());
        self.with_timeout(reference, async {
            let manifest = self.manifest(reference, &target, digest).await?;
            let layers = layers(&manifest, limits).map_err(|error| error.of_scenario(reference))?;
            let mut draft = {
                let (cache, limits) = (cache.clone(), limits.clone());
                let reference = reference.to_owned();
                blocking(move || cache.draft(&limits).map_err(|error| error.of_scenario(&reference))).await?
            };
            for layer in layers {
                draft = self.layer(reference, &target, layer, draft, cache).await?;
            }
            let place = cache.place(digest);
            let reference = reference.to_owned();
            blocking(move || draft.keep(&place).map(|()| place).map_err(|error| error.of_scenario(&reference))).await
        })
        .await
    }

    /// Pushes a blob unless the registry has it. Returns whether it had it.
    pub(crate) async fn put_blob(
        &self,
        reference: &str,
        target: &Reference,
        digest: &str,
        content: Vec<u8>,
    ) -> Result<bool> {
        self.client.store_auth_if_needed(target.resolve_registry(), &self.auth(target)).await;
        // If the check fails, the blob is simply pushed.
        if self.client.blob_exists(target, digest).await.unwrap_or(false) {
            return Ok(true);
        }
        self.client.push_blob(target, content, digest).await.map_err(|error| failed(reference, &error))?;
        Ok(false)
    }

    /// Pushes a manifest to the target's tag.
    pub(crate) async fn put_manifest(&self, reference: &str, target: &Reference, body: Vec<u8>) -> Result<()> {
        let kind = http::HeaderValue::from_static(OCI_IMAGE_MEDIA_TYPE);
        self.client.push_manifest_raw(target, body, kind).await.map_err(|error| failed(reference, &error))?;
        Ok(())
    }

    async fn manifest(&self, reference: &str, target: &Reference, digest: Digest) -> Result<OciImageManifest> {
        // Accepts indexes too, so that they can be rejected with a helpful message.
        let accepted = [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE];
        let pulled = self.client.pull_manifest_raw(target, &self.auth(target), &accepted).await;
        let (bytes, _) = pulled.map_err(|error| failed(reference, &error))?;
        if Digest::of(&bytes) != digest {
            return Err(corrupt(reference, "the manifest"));
        }
        let invalid = |problem: String| Error::ScenarioInvalid { reference: reference.to_owned(), problem };
        let manifest: OciImageManifest = serde_json::from_slice(&bytes)
            .map_err(|error| invalid(format!("its manifest is not an OCI image manifest: {error}")))?;
        // Manifests older than OCI 1.1 have no artifact type; their configuration's type takes its place.
        let kind = manifest.artifact_type.as_deref().unwrap_or(&manifest.config.media_type);
        if kind != ARTIFACT_TYPE {
            let fix = "push it with `gauntlet scenario push`";
            return Err(invalid(format!("is an artifact of type {kind:?}, a scenario is {ARTIFACT_TYPE:?}; {fix}")));
        }
        Ok(manifest)
    }

    async fn layer(
        &self,
        reference: &str,
        target: &Reference,
        layer: Layer,
        draft: Draft,
        cache: &Cache,
    ) -> Result<Draft> {
        let broken = |error: FileError| error.of_scenario(reference);
        let mut draft = draft;
        let (file, archive) = if layer.archive {
            let scratch = cache.scratch().map_err(broken)?;
            let handle = scratch.try_clone().map_err(|error| broken(FileError::Io(cache_name(), error)))?;
            (scratch, Some(handle))
        } else {
            let (title, size) = (layer.title.clone(), layer.size);
            let owned = reference.to_owned();
            let (back, file) = blocking(move || {
                let file = draft.create(&title, size).map_err(|error| error.of_scenario(&owned))?;
                Ok((draft, file))
            })
            .await?;
            draft = back;
            (file, None)
        };
        self.blob(reference, target, &layer, file).await?;
        match archive {
            None => Ok(draft),
            Some(archive) => {
                let reference = reference.to_owned();
                blocking(move || {
                    archive::unpack(archive, &layer.title, &mut draft)
                        .map_err(|error| error.of_scenario(&reference))?;
                    Ok(draft)
                })
                .await
            }
        }
    }

    /// Downloads a blob into `file` and checks its size and digest.
    async fn blob(&self, reference: &str, target: &Reference, layer: &Layer, file: std::fs::File) -> Result<()> {
        let auth = self.auth(target);
        self.client.store_auth_if_needed(target.resolve_registry(), &auth).await;
        let mut stream = self
            .client
            .pull_blob_stream(target, &layer.descriptor)
            .await
            .map_err(|error| failed(reference, &error))?
            .stream;
        let mut file = tokio::fs::File::from_std(file);
        let local = |error| FileError::Io(cache_name(), error).of_scenario(reference);
        let (mut hash, mut size) = (Sha256::new(), 0u64);
        while let Some(chunk) = stream.next().await {
            let chunk =
                chunk.map_err(|error| Error::Registry { reference: reference.to_owned(), detail: chain(&error) })?;
            size += chunk.len() as u64;
            if size > layer.size {
                return Err(corrupt(reference, &layer.title));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(local)?;
        }
        file.flush().await.map_err(local)?;
        if size != layer.size || Digest::finish(hash).to_string() != layer.descriptor.digest {
            return Err(corrupt(reference, &layer.title));
        }
        Ok(())
    }
}

fn cache_name() -> PathBuf {
    PathBuf::from("scenario cache")
}

/// A layer whose descriptor was checked.
struct Layer {
    title: String,
    size: u64,
    archive: bool,
    descriptor: OciDescriptor,
}

/// Checks the layers of a manifest against the limits, before anything is downloaded.
fn layers(manifest: &OciImageManifest, limits: &FileLimits) -> Result<Vec<Layer>, FileError> {
    if manifest.layers.is_empty() || manifest.layers.len() > limits.count {
        return refused(format!("has {} files; 1 to {} are right", manifest.layers.len(), limits.count));
    }
    let mut total = 0u64;
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for descriptor in &manifest.layers {
        let annotation = |name: &str| descriptor.annotations.as_ref().and_then(|all| all.get(name));
        let Some(title) = annotation(TITLE) else {
            return refused(format!("layer {} has no annotation {TITLE}", descriptor.digest));
        };
        let title = crate::files::relative(title)?;
        let archive = annotation(UNPACK).is_some_and(|unpack| unpack == "true");
        let kind = descriptor.media_type.as_str();
        if !(kind == FILE_TYPE || archive && kind == ARCHIVE_TYPE) {
            return refused(format!("layer {title:?} is of type {kind:?}; a scenario's file is {FILE_TYPE:?}"));
        }
        let size = match u64::try_from(descriptor.size) {
            Ok(size) if size <= limits.file => size,
            _ => return refused(format!("file {title:?} is {} bytes; at most {}", descriptor.size, limits.file)),
        };
        total = total.saturating_add(size);
        if total > limits.total {
            return refused(format!("its files hold over {} bytes together", limits.total));
        }
        layers.push(Layer { title, size, archive, descriptor: descriptor.clone() });
    }
    Ok(layers)
}

fn corrupt(reference: &str, what: &str) -> Error {
    let detail = format!("{what} does not match its digest or size");
    Error::Registry { reference: reference.to_owned(), detail }
}

/// Converts a registry's error.
fn failed(reference: &str, error: &OciDistributionError) -> Error {
    let reference = reference.to_owned();
    let unknown = |code: &OciErrorCode| {
        matches!(code, OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound)
    };
    match error {
        OciDistributionError::RegistryError { envelope, .. } if envelope.errors.iter().any(|e| unknown(&e.code)) => {
            Error::ReferenceNotFound { reference }
        }
        OciDistributionError::ServerError { code: 404, .. } | OciDistributionError::ImageManifestNotFoundError(_) => {
            Error::ReferenceNotFound { reference }
        }
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            let detail = "access denied; check OCI_USERNAME, OCI_PASSWORD and the permissions of that user".to_owned();
            Error::Registry { reference, detail }
        }
        error => Error::Registry { reference, detail: chain(error) },
    }
}

/// An error and its causes on one line of at most 500 characters.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}
