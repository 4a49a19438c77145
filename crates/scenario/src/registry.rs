//! Scenarios in OCI registries.

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
/// The annotation with a layer's path.
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
/// The annotation of a layer that is a directory to unpack.
const UNPACK: &str = "io.deis.oras.content.unpack";

/// How registries are reached.
#[derive(Debug, Clone)]
pub struct Access {
    /// Plain HTTP instead of HTTPS.
    pub insecure: bool,
    /// What to say where a registry asks.
    pub credentials: Option<Credentials>,
    /// Certificates (PEM) to trust besides the system's.
    pub extra_roots: Vec<Vec<u8>>,
    /// Until a connection stands.
    pub connect_timeout: Duration,
    /// Between two parts of an answer.
    pub read_timeout: Duration,
    /// A whole pull or push, or the look at a tag.
    pub timeout: Duration,
}

impl Default for Access {
    /// HTTPS, nobody in particular, the system's certificates; 10 s to connect, 30 s between two parts, 5 min in all.
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

/// A name and a password for registries. Its `Debug` hides the password.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The one registry (`host` or `host:port`) that they are for. `None` gives them to whichever registry a reference names: only where
    /// everybody who may name one is trusted with them.
    pub registry: Option<String>,
    /// The name.
    pub username: String,
    /// The password.
    pub password: SecretString,
}

/// Reads an OCI reference: `registry/repository`, then a tag, a digest (sha256), both or neither (`latest`).
pub(crate) fn parse(reference: &str) -> Result<(Reference, Option<Digest>)> {
    let wrong = |problem: String| Err(Error::ReferenceMalformed { reference: reference.to_owned(), problem });
    let form = "must be registry/repository[:tag][@sha256:digest]";
    // Without a host in front, clients disagree on which registry is meant.
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

/// A client of registries.
pub(crate) struct Registry {
    client: Client,
    access: Access,
}

impl Registry {
    /// The error is the operator's text.
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        // The first provider stays, whoever installed it; where it is there already, that is as good.
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

    /// Ends the work at the deadline.
    pub(crate) async fn in_time<T>(&self, reference: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.access.timeout, work).await.unwrap_or_else(|_| {
            let detail = format!("no end after {} s", self.access.timeout.as_secs_f32());
            Err(Error::Registry { reference: reference.to_owned(), detail })
        })
    }

    /// The digest that a tag names now.
    pub(crate) async fn head(&self, reference: &str, target: &Reference) -> Result<Digest> {
        let auth = self.auth(target);
        let look =
            async { self.client.fetch_manifest_digest(target, &auth).await.map_err(|error| failed(reference, &error)) };
        let digest = self.in_time(reference, look).await?;
        digest.parse().map_err(|error| {
            let detail = format!("the digest that the registry gives the manifest, {digest:?}, {error}");
            Error::Registry { reference: reference.to_owned(), detail }
        })
    }

    /// Fetches an artifact by digest, checks it and keeps it.
    pub(crate) async fn pull(
        &self,
        reference: &str,
        target: &Reference,
        digest: Digest,
        cache: &Cache,
        limits: &FileLimits,
    ) -> Result<PathBuf> {
        let target = target.clone_with_digest(digest.to_string());
        self.in_time(reference, async {
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

    /// Sends a blob unless it is there; answers whether it was.
    pub(crate) async fn put_blob(
        &self,
        reference: &str,
        target: &Reference,
        digest: &str,
        content: Vec<u8>,
    ) -> Result<bool> {
        self.client.store_auth_if_needed(target.resolve_registry(), &self.auth(target)).await;
        // A registry that does not say, or wants other credentials for the question, is simply sent the blob.
        if self.client.blob_exists(target, digest).await.unwrap_or(false) {
            return Ok(true);
        }
        self.client.push_blob(target, content, digest).await.map_err(|error| failed(reference, &error))?;
        Ok(false)
    }

    /// Puts a manifest under the target's tag.
    pub(crate) async fn put_manifest(&self, reference: &str, target: &Reference, body: Vec<u8>) -> Result<()> {
        let kind = http::HeaderValue::from_static(OCI_IMAGE_MEDIA_TYPE);
        self.client.push_manifest_raw(target, body, kind).await.map_err(|error| failed(reference, &error))?;
        Ok(())
    }

    async fn manifest(&self, reference: &str, target: &Reference, digest: Digest) -> Result<OciImageManifest> {
        // An index is asked for too, to say what is wrong with it.
        let accepted = [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE];
        let pulled = self.client.pull_manifest_raw(target, &self.auth(target), &accepted).await;
        let (bytes, _) = pulled.map_err(|error| failed(reference, &error))?;
        if Digest::of(&bytes) != digest {
            return Err(corrupt(reference, "the manifest"));
        }
        let invalid = |problem: String| Error::ScenarioInvalid { reference: reference.to_owned(), problem };
        let manifest: OciImageManifest = serde_json::from_slice(&bytes)
            .map_err(|error| invalid(format!("its manifest is not an OCI image manifest: {error}")))?;
        // Before artifact types were, the type of the configuration said it.
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

    /// Writes a blob of exactly the announced size and digest.
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

/// A layer, checked.
struct Layer {
    title: String,
    size: u64,
    archive: bool,
    descriptor: OciDescriptor,
}

/// What a manifest promises, within the limits and before anything is fetched.
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
    let detail = format!("{what} is not what its digest and size say");
    Error::Registry { reference: reference.to_owned(), detail }
}

/// What a registry's failure means to the caller.
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
            let detail = "refuses access; check OCI_USERNAME and OCI_PASSWORD, and what they are allowed".to_owned();
            Error::Registry { reference, detail }
        }
        error => Error::Registry { reference, detail: chain(error) },
    }
}

/// An error and its causes on one line, of bounded length.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}
