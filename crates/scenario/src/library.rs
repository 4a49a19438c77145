//! The port's implementation: resolves references, keeps scenarios, prepares them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use futures::{
    FutureExt as _,
    future::{BoxFuture, WeakShared},
};
use gauntlet_domain::{
    Additional, Error, Identity, LaunchPlan, Pinned, Placement, PreparedScenario, Result, Scenarios,
};
use tracing::{
    Instrument as _,
    field::{Empty, display},
};

use crate::{
    cache::{Cache, Evicted},
    digest::Digest,
    document::Document,
    documents::Documents,
    files::{FileError, FileLimits, blocking},
    flag::FlagKey,
    local, plan,
    registry::{Access, Registry},
    scenario_file::{Unread, read_document},
    yaml::Problem,
};

/// What a [`Library`] needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where scenarios are kept by digest. Several processes may share it.
    pub cache: PathBuf,
    /// The directory under which `file://` references are allowed; none are without it.
    pub local_root: Option<PathBuf>,
    /// What flags are varied with.
    pub flag_key: FlagKey,
    /// How registries are reached.
    pub access: Access,
    /// Bounds on a scenario's files.
    pub limits: FileLimits,
}

impl Config {
    /// Over HTTPS without credentials, no local directories, default bounds.
    pub fn new(cache: impl Into<PathBuf>, flag_key: FlagKey) -> Self {
        Self {
            cache: cache.into(),
            local_root: None,
            flag_key,
            access: Access::default(),
            limits: FileLimits::default(),
        }
    }
}

/// The scenarios that references name, kept by digest.
///
/// Cloning is cheap and shares everything. A reference that names a digest which is kept costs no network; one that names a tag costs one
/// request to see where the tag points now. Several calls for one digest share one fetch; dropping the last of them ends it and leaves
/// nothing behind.
#[derive(Clone)]
pub struct Library {
    inner: Arc<Inner>,
}

struct Inner {
    cache: Cache,
    documents: Documents,
    config: Config,
    registry: Registry,
    /// Fetches under way, by digest.
    fetches: Mutex<BTreeMap<Digest, WeakShared<Fetch>>>,
}

type Fetch = BoxFuture<'static, Result<PathBuf>>;

impl Library {
    /// Opens the cache, creating it where it is missing. Blocks on the file system.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache cannot be used or the access settings are wrong.
    pub fn new(config: Config) -> Result<Self> {
        let cache = Cache::open(&config.cache).map_err(unusable)?;
        let registry = Registry::new(&config.access).map_err(Error::Internal)?;
        Ok(Self {
            inner: Arc::new(Inner {
                cache,
                documents: Documents::default(),
                config,
                registry,
                fetches: Mutex::default(),
            }),
        })
    }

    /// How many bytes of scenarios are kept.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache cannot be read.
    pub async fn bytes(&self) -> Result<u64> {
        let cache = self.inner.cache.clone();
        blocking(move || cache.bytes().map_err(unusable)).await
    }

    /// Removes scenarios that are not `in_use` (by digest) and were not used within the last hour, those used longest ago first, until no
    /// more than `limit` bytes are kept. One that is wanted again is fetched again.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache cannot be read or a scenario cannot be removed.
    pub async fn evict(&self, limit: u64, in_use: BTreeSet<String>) -> Result<Evicted> {
        let cache = self.inner.cache.clone();
        blocking(move || cache.evict(limit, &in_use).map_err(unusable)).await
    }

    async fn resolve_local(&self, reference: &str) -> Result<(Digest, PathBuf)> {
        let (library, owned) = (self.clone(), reference.to_owned());
        blocking(move || {
            let Inner { cache, config, .. } = &*library.inner;
            let dir = local::locate(&owned, config.local_root.as_deref())?;
            local::snapshot(&dir, cache, &config.limits).map_err(|error| error.of_scenario(&owned))
        })
        .await
    }

    async fn resolve_registry(&self, reference: &str) -> Result<(Digest, PathBuf)> {
        let (target, digest) = crate::registry::parse(reference)?;
        let span = pull_span(reference);
        let resolved = async {
            let digest = match digest {
                Some(digest) => digest,
                None => self.inner.registry.head(reference, &target).await?,
            };
            let dir = self.fetch(reference, target, digest).await?;
            Ok((digest, dir))
        };
        noted(resolved, span).await
    }

    /// The directory of that digest: kept, being fetched, or fetched now.
    async fn fetch(&self, reference: &str, target: oci_client::Reference, digest: Digest) -> Result<PathBuf> {
        let kept = self.inner.cache.find(digest);
        tracing::Span::current().record("scenario.digest", display(digest)).record("cache.hit", kept.is_some());
        if let Some(dir) = kept {
            return Ok(dir);
        }
        let fetch = {
            let mut fetches = self.inner.fetches.lock().unwrap_or_else(PoisonError::into_inner);
            fetches.retain(|_, fetch| fetch.upgrade().is_some());
            let under_way = fetches.get(&digest).and_then(WeakShared::upgrade);
            under_way.unwrap_or_else(|| {
                let fetch = self.clone().pull(reference.to_owned(), target, digest).boxed().shared();
                fetches.extend(fetch.downgrade().map(|weak| (digest, weak)));
                fetch
            })
        };
        fetch.await
    }

    async fn pull(self, reference: String, target: oci_client::Reference, digest: Digest) -> Result<PathBuf> {
        // Between the look into the cache and this, another fetch may have ended.
        if let Some(dir) = self.inner.cache.find(digest) {
            return Ok(dir);
        }
        let Inner { registry, cache, config, .. } = &*self.inner;
        registry.pull(&reference, &target, digest, cache, &config.limits).await
    }

    /// The directory that was pinned; fetched again if it is no longer kept.
    async fn directory(&self, pinned: &Pinned, digest: Digest) -> Result<PathBuf> {
        if let Some(dir) = self.inner.cache.find(digest) {
            return Ok(dir);
        }
        if pinned.reference.starts_with(local::SCHEME) {
            let (found, dir) = self.resolve_local(&pinned.reference).await?;
            if found == digest {
                return Ok(dir);
            }
            let problem = format!("what is there now is {found}, {digest} is no longer kept");
            return Err(Error::ScenarioNotFound { reference: pinned.reference.clone(), problem });
        }
        let (target, _) = crate::registry::parse(&pinned.reference)?;
        let target = target.clone_with_digest(digest.to_string());
        noted(self.fetch(&pinned.reference, target, digest), pull_span(&pinned.reference)).await
    }

    /// The document of a cached scenario, from memory if it is there.
    async fn document(&self, reference: &str, digest: Digest, dir: &Path) -> Result<Arc<Document>> {
        match self.inner.documents.get(digest) {
            Some(document) => Ok(document),
            None => self.read(reference, digest, dir).await,
        }
    }

    /// Reads and checks the document of a cached scenario, and keeps it in memory.
    async fn read(&self, reference: &str, digest: Digest, dir: &Path) -> Result<Arc<Document>> {
        let span = tracing::info_span!(
            "scenario.validate",
            otel.kind = "internal",
            otel.status_code = Empty,
            error.type = Empty,
            scenario.digest = %digest,
        );
        let (owned, dir) = (reference.to_owned(), dir.to_owned());
        let read = blocking(move || {
            read_document(&dir).map_err(|invalid| match invalid {
                Unread::Invalid(problems) => Error::ScenarioInvalid { reference: owned, problem: summary(&problems) },
                Unread::Io(error) => Error::Internal(format!("scenario in {}: {error}", dir.display())),
            })
        });
        let document = Arc::new(noted(read, span).await?);
        self.inner.documents.insert(digest, document.clone());
        Ok(document)
    }
}

#[async_trait]
impl Scenarios for Library {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        let (digest, dir) = if reference.starts_with(local::SCHEME) {
            self.resolve_local(reference).await?
        } else {
            self.resolve_registry(reference).await?
        };
        self.read(reference, digest, &dir).await?;
        Ok(Pinned { reference: reference.to_owned(), digest: digest.to_string() })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        let digest = pinned_digest(scenario)?;
        let files = self.directory(scenario, digest).await?;
        let document = self.document(&scenario.reference, digest, &files).await?;
        let flags = plan::flags(&scenario.reference, &document, &self.inner.config.flag_key, identity, additional)?;
        let ports = document.ports.clone();
        Ok(PreparedScenario { files, ports, flags, ..PreparedScenario::new(scenario, identity, additional) })
    }

    async fn render(&self, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan> {
        let PreparedScenario { scenario, files, .. } = prepared;
        let document = self.document(&scenario.reference, pinned_digest(scenario)?, files).await?;
        plan::render(&document, prepared, placement)
    }
}

fn pinned_digest(scenario: &Pinned) -> Result<Digest> {
    scenario.digest.parse().map_err(|error| Error::ScenarioInvalid {
        reference: scenario.reference.clone(),
        problem: format!("digest {:?} {error}", scenario.digest),
    })
}

/// The first mistakes, on one line.
fn summary(problems: &[Problem]) -> String {
    const SHOWN: usize = 5;
    let mut text = problems.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if problems.len() > SHOWN {
        text += &format!("; and {} more", problems.len() - SHOWN);
    }
    text
}

fn unusable(error: FileError) -> Error {
    Error::Internal(format!("scenario cache: {error}"))
}

fn pull_span(reference: &str) -> tracing::Span {
    tracing::info_span!(
        "scenario.pull",
        otel.kind = "client",
        otel.status_code = Empty,
        error.type = Empty,
        oci.reference = reference,
        scenario.digest = Empty,
        cache.hit = Empty,
    )
}

/// Runs in a span and marks it with the error's code.
pub(crate) async fn noted<T>(work: impl Future<Output = Result<T>>, span: tracing::Span) -> Result<T> {
    let result = work.instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("error.type", error.code());
        span.record("otel.status_code", "ERROR");
    }
    result
}
