//! The client of OCI registries: resolves tags, pulls and pushes scenarios.
//!
//! Written on `reqwest`, because the server of a reference is chosen by a client of the API: which addresses are connected to, where
//! redirects lead and who gets credentials must be decided for each request (ADR 18).

mod address;
mod allowed;
mod docker;
mod failure;
mod login;
pub(crate) mod manifest;
mod session;
mod transport;
mod turns;

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use gauntlet_domain::{Error, Result};
use http::{Method, StatusCode, header::LOCATION};
pub(crate) use oci_spec::distribution::Reference;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

pub use self::{
    allowed::{Allowed, Host, InvalidPattern, RegistryPattern},
    login::Credentials,
};
use self::{
    failure::Failure,
    login::Logins,
    manifest::{Layer, MANIFEST_TYPE, Manifest},
    session::{Action, Gate, Session},
    transport::{Request, Transport, body, successful},
    turns::{Turn, Turns},
};
use crate::{
    archive,
    cache::Cache,
    digest::Digest,
    draft::Draft,
    files::{FileError, FileLimits, blocking},
};

/// How to reach registries.
#[derive(Debug, Clone)]
pub struct Access {
    /// The registries that scenarios may come from.
    pub allowed: Allowed,
    /// Plain HTTP instead of HTTPS.
    pub insecure: bool,
    /// Credentials, each for one registry.
    pub credentials: Vec<Credentials>,
    /// Docker's `config.json`, or its directory: asked for registries without credentials above.
    pub docker_config: Option<PathBuf>,
    /// Hosts of token services that may get credentials, besides each registry's own host.
    pub token_hosts: Vec<Host>,
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
    /// Any registry, over HTTPS without credentials; 10 s to connect, 30 s between reads, 5 min in total.
    fn default() -> Self {
        Self {
            allowed: Allowed::Any,
            insecure: false,
            credentials: Vec::new(),
            docker_config: None,
            token_hosts: Vec::new(),
            extra_roots: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            timeout: Duration::from_secs(300),
        }
    }
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
    gate: Gate,
    allowed: Allowed,
    turns: Turns,
    timeout: Duration,
}

impl Registry {
    /// The error text is for the operator.
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        let logins = Logins { credentials: access.credentials.clone(), docker_config: access.docker_config.clone() };
        let transport = Transport::new(access)?;
        let gate = Gate { transport, logins, token_hosts: access.token_hosts.clone() };
        Ok(Self { gate, allowed: access.allowed.clone(), turns: Turns::default(), timeout: access.timeout })
    }

    /// Checks that the operator allows the registry and repository of a reference.
    ///
    /// # Errors
    /// [`Error::RegistryNotAllowed`].
    pub(crate) fn check_allowed(&self, reference: &str, target: &Reference) -> Result<()> {
        let host = host(target).map_err(|failure| failure.of(reference))?;
        if self.allowed.allows(&host, target.repository()) {
            return Ok(());
        }
        Err(Error::RegistryNotAllowed { reference: reference.to_owned(), registry: host.to_string() })
    }

    /// Waits for a turn to talk to the target's registry.
    async fn turn(&self, target: &Reference) -> Result<Turn, Failure> {
        self.turns.of(&host(target)?).await
    }

    /// Runs `work` with the configured timeout.
    pub(crate) async fn with_timeout<T>(&self, reference: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            let detail = format!("timed out after {} s", self.timeout.as_secs_f32());
            Err(Error::Registry { reference: reference.to_owned(), detail })
        })
    }

    /// Returns the digest that a tag points to now.
    pub(crate) async fn resolve_tag(&self, reference: &str, target: &Reference) -> Result<Digest> {
        let lookup = async {
            let _turn = self.turn(target).await?;
            let mut session = Session::new(&self.gate, target, Action::Pull)?;
            let response = get_manifest(&mut session, target, Method::HEAD).await?;
            let named = response
                .headers()
                .get("docker-content-digest")
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned);
            let Some(named) = named else {
                let response = get_manifest(&mut session, target, Method::GET).await?;
                return Ok(Digest::of(&body(response, manifest::MAX_BYTES).await?));
            };
            named.parse().map_err(|error| {
                Failure::broken(format!("the digest that the registry gives the manifest, {named:?}, {error}"))
            })
        };
        self.with_timeout(reference, async { lookup.await.map_err(|failure| failure.of(reference)) }).await
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
            let failed = |failure: Failure| failure.of(reference);
            let _turn = self.turn(&target).await.map_err(failed)?;
            let mut session = Session::new(&self.gate, &target, Action::Pull).map_err(failed)?;
            let manifest = self.manifest(&mut session, reference, &target, digest).await?;
            let layers = manifest.layers(limits).map_err(|error| error.of_scenario(reference))?;
            let mut draft = {
                let (cache, limits) = (cache.clone(), limits.clone());
                let reference = reference.to_owned();
                blocking(move || cache.draft(&limits).map_err(|error| error.of_scenario(&reference))).await?
            };
            for layer in layers {
                draft = self.layer(&mut session, reference, &target, layer, draft, cache).await?;
            }
            let (cache, reference) = (cache.clone(), reference.to_owned());
            blocking(move || cache.keep(draft, digest).map_err(|error| error.of_scenario(&reference))).await
        })
        .await
    }

    /// Begins a push.
    pub(crate) fn push(&self, reference: &str, target: &Reference) -> Result<Push<'_>> {
        let session = Session::new(&self.gate, target, Action::Push).map_err(|failure| failure.of(reference))?;
        Ok(Push { session, reference: reference.to_owned(), target: target.clone() })
    }

    async fn manifest(
        &self,
        session: &mut Session<'_>,
        reference: &str,
        target: &Reference,
        digest: Digest,
    ) -> Result<Manifest> {
        let get = async {
            let response = get_manifest(session, target, Method::GET).await?;
            let bytes = body(response, manifest::MAX_BYTES).await?;
            if Digest::of(&bytes) == digest { Ok(bytes) } else { Err(corrupt("the manifest")) }
        };
        let bytes = get.await.map_err(|failure| failure.of(reference))?;
        Manifest::parse(&bytes).map_err(|problem| Error::ScenarioInvalid { reference: reference.to_owned(), problem })
    }

    async fn layer(
        &self,
        session: &mut Session<'_>,
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
            let (title, size, content) = (layer.title.clone(), layer.size, layer.digest);
            let owned = reference.to_owned();
            let (back, file) = blocking(move || {
                let file = draft.create(&title, size, content).map_err(|error| error.of_scenario(&owned))?;
                Ok((draft, file))
            })
            .await?;
            draft = back;
            (file, None)
        };
        self.blob(session, reference, target, &layer, file).await?;
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
    async fn blob(
        &self,
        session: &mut Session<'_>,
        reference: &str,
        target: &Reference,
        layer: &Layer,
        file: std::fs::File,
    ) -> Result<()> {
        let failed = |failure: Failure| failure.of(reference);
        let url = session.url(target, &format!("blobs/{}", layer.digest)).map_err(failed)?;
        let response = session.send(Request::new(Method::GET, url)).await.map_err(failed)?;
        let mut response = successful(response).await.map_err(failed)?;
        let mut file = tokio::fs::File::from_std(file);
        let local = |error| FileError::Io(cache_name(), error).of_scenario(reference);
        let (mut hash, mut size) = (Sha256::new(), 0u64);
        while let Some(chunk) = response.chunk().await.map_err(|error| failed(error.into()))? {
            size += chunk.len() as u64;
            if size > layer.size {
                return Err(failed(corrupt(&layer.title)));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(local)?;
        }
        file.flush().await.map_err(local)?;
        if size != layer.size || Digest::finish(hash) != layer.digest {
            return Err(failed(corrupt(&layer.title)));
        }
        Ok(())
    }
}

/// A push to one repository.
pub(crate) struct Push<'a> {
    session: Session<'a>,
    reference: String,
    target: Reference,
}

impl Push<'_> {
    /// Pushes a blob unless the registry has it. Returns whether it had it.
    pub(crate) async fn blob(&mut self, digest: &str, content: Vec<u8>) -> Result<bool> {
        self.send_blob(digest, content).await.map_err(|failure| failure.of(&self.reference))
    }

    async fn send_blob(&mut self, digest: &str, content: Vec<u8>) -> Result<bool, Failure> {
        let Self { session, target, .. } = self;
        let url = session.url(target, &format!("blobs/{digest}"))?;
        // If the check fails otherwise than for want of access, the blob is simply pushed.
        match session.send(Request::new(Method::HEAD, url)).await?.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(Failure::Denied),
            status if status.is_success() => return Ok(true),
            _ => {}
        }
        let url = session.url(target, "blobs/uploads/")?;
        let begun = successful(session.send(Request::new(Method::POST, url)).await?).await?;
        let location = begun.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let mut url = session.own_url(location.ok_or_else(|| Failure::broken("names no place for the upload"))?)?;
        url.query_pairs_mut().append_pair("digest", digest);
        let content = Some(("application/octet-stream", Bytes::from(content)));
        successful(session.send(Request { content, ..Request::new(Method::PUT, url) }).await?).await?;
        Ok(false)
    }

    /// Pushes a manifest to the target's tag.
    pub(crate) async fn manifest(&mut self, body: Vec<u8>) -> Result<()> {
        let Self { session, target, reference } = self;
        let put = async {
            let url = session.url(target, &format!("manifests/{}", target.tag().unwrap_or_default()))?;
            let content = Some((MANIFEST_TYPE, Bytes::from(body)));
            successful(session.send(Request { content, ..Request::new(Method::PUT, url) }).await?).await
        };
        put.await.map(|_| ()).map_err(|failure| failure.of(reference))
    }
}

async fn get_manifest(
    session: &mut Session<'_>,
    target: &Reference,
    method: Method,
) -> Result<reqwest::Response, Failure> {
    let name = target.digest().or(target.tag()).unwrap_or_default();
    let url = session.url(target, &format!("manifests/{name}"))?;
    successful(session.send(Request { accept: Some(manifest::ACCEPTED), ..Request::new(method, url) }).await?).await
}

/// The registry of a reference, as references name it.
fn host(target: &Reference) -> Result<Host, Failure> {
    target.registry().parse().map_err(|error: InvalidPattern| Failure::broken(error.to_string()))
}

fn cache_name() -> PathBuf {
    PathBuf::from("scenario cache")
}

fn corrupt(what: &str) -> Failure {
    Failure::broken(format!("{what} does not match its digest or size"))
}
