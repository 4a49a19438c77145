//! The port's implementation: resolves references, keeps scenarios, prepares them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
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
use tracing::{Instrument as _, field::Empty};

use crate::{
    cache::{Cache, Evicted},
    document::Document,
    documents::Documents,
    files::{FileError, FileLimits},
    flag::FlagKey,
    local, plan,
    registry::{Access, Registry},
    yaml::{self, Problem},
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
    fetches: Mutex<BTreeMap<String, WeakShared<Fetch>>>,
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

    async fn resolve_local(&self, reference: &str) -> Result<(String, PathBuf)> {
        let (library, owned) = (self.clone(), reference.to_owned());
        blocking(move || {
            let Inner { cache, config, .. } = &*library.inner;
            let dir = local::locate(&owned, config.local_root.as_deref())?;
            local::snapshot(&dir, cache, &config.limits).map_err(|error| unfit(&owned, error))
        })
        .await
    }

    async fn resolve_registry(&self, reference: &str) -> Result<(String, PathBuf)> {
        let target = crate::registry::parse(reference)?;
        let span = pull_span(reference);
        let resolved = async {
            let digest = match target.digest() {
                Some(digest) => digest.to_owned(),
                None => self.inner.registry.head(reference, &target).await?,
            };
            let dir = self.fetch(reference, target, &digest).await?;
            Ok((digest, dir))
        };
        noted(resolved, span).await
    }

    /// The directory of that digest: kept, being fetched, or fetched now.
    async fn fetch(&self, reference: &str, target: oci_client::Reference, digest: &str) -> Result<PathBuf> {
        let kept = self.kept(reference, digest)?;
        tracing::Span::current().record("scenario.digest", digest).record("cache.hit", kept.is_some());
        if let Some(dir) = kept {
            return Ok(dir);
        }
        let fetch = {
            let mut fetches = self.inner.fetches.lock().unwrap_or_else(PoisonError::into_inner);
            fetches.retain(|_, fetch| fetch.upgrade().is_some());
            let under_way = fetches.get(digest).and_then(WeakShared::upgrade);
            under_way.unwrap_or_else(|| {
                let fetch = self.clone().pull(reference.to_owned(), target, digest.to_owned()).boxed().shared();
                fetches.extend(fetch.downgrade().map(|weak| (digest.to_owned(), weak)));
                fetch
            })
        };
        fetch.await
    }

    async fn pull(self, reference: String, target: oci_client::Reference, digest: String) -> Result<PathBuf> {
        // Between the look into the cache and this, another fetch may have ended.
        if let Some(dir) = self.kept(&reference, &digest)? {
            return Ok(dir);
        }
        let Inner { registry, cache, config, .. } = &*self.inner;
        registry.pull(&reference, &target, &digest, cache, &config.limits).await
    }

    fn kept(&self, reference: &str, digest: &str) -> Result<Option<PathBuf>> {
        self.inner.cache.find(digest).map_err(|error| unfit(reference, error))
    }

    /// The directory that was pinned; fetched again if it is no longer kept.
    async fn directory(&self, pinned: &Pinned) -> Result<PathBuf> {
        if let Some(dir) = self.kept(&pinned.reference, &pinned.digest)? {
            return Ok(dir);
        }
        if pinned.reference.starts_with(local::SCHEME) {
            let (digest, dir) = self.resolve_local(&pinned.reference).await?;
            if digest == pinned.digest {
                return Ok(dir);
            }
            let problem = format!("what is there now is {digest}, {} is no longer kept", pinned.digest);
            return Err(Error::ScenarioNotFound { reference: pinned.reference.clone(), problem });
        }
        let target = crate::registry::parse(&pinned.reference)?.clone_with_digest(pinned.digest.clone());
        noted(self.fetch(&pinned.reference, target, &pinned.digest), pull_span(&pinned.reference)).await
    }

    /// The document of a cached scenario, from memory if it is there.
    async fn document(&self, scenario: &Pinned, dir: &Path) -> Result<Arc<Document>> {
        match self.inner.documents.get(&scenario.digest) {
            Some(document) => Ok(document),
            None => self.read(&scenario.reference, &scenario.digest, dir).await,
        }
    }

    /// Reads and checks the document of a cached scenario, and keeps it in memory.
    async fn read(&self, reference: &str, digest: &str, dir: &Path) -> Result<Arc<Document>> {
        let span = tracing::info_span!(
            "scenario.validate",
            otel.kind = "internal",
            otel.status_code = Empty,
            error.type = Empty,
            scenario.digest = digest,
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
        self.read(reference, &digest, &dir).await?;
        Ok(Pinned { reference: reference.to_owned(), digest })
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        let files = self.directory(scenario).await?;
        let document = self.document(scenario, &files).await?;
        let flags = plan::flags(&scenario.reference, &document, &self.inner.config.flag_key, identity, additional)?;
        let ports = document.ports.clone();
        Ok(PreparedScenario { files, ports, flags, ..PreparedScenario::new(scenario, identity, additional) })
    }

    async fn render(&self, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan> {
        let document = self.document(&prepared.scenario, &prepared.files).await?;
        plan::render(&document, prepared, placement)
    }
}

/// Why a directory is no scenario.
pub(crate) enum Unread {
    /// Its author's fault.
    Invalid(Vec<Problem>),
    /// The machine's fault.
    Io(std::io::Error),
}

/// Reads and checks the `scenario.yaml` of a directory. Blocks on the file system.
pub(crate) fn read_document(dir: &Path) -> Result<Document, Unread> {
    let file = match std::fs::File::open(dir.join("scenario.yaml")) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(unread(other_kind(dir))),
        Err(error) => return Err(Unread::Io(error)),
    };
    let mut bytes = Vec::new();
    file.take(yaml::MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(Unread::Io)?;
    let text = String::from_utf8(bytes).map_err(|_| unread("scenario.yaml is not UTF-8"))?;
    Document::parse(&text).map_err(Unread::Invalid)
}

fn unread(text: &str) -> Unread {
    Unread::Invalid(vec![Problem { line: None, field: String::new(), text: text.to_owned() }])
}

fn other_kind(dir: &Path) -> &'static str {
    let has = |name: &str| dir.join(name).exists();
    if has("Pulumi.yaml") || has("Pulumi.yml") {
        "is a Pulumi scenario (Pulumi.yaml); this release runs scenarios with a scenario.yaml, Pulumi scenarios come with a later one"
    } else if has("scenario.yml") {
        "has scenario.yml; rename it to scenario.yaml"
    } else {
        "has neither scenario.yaml nor Pulumi.yaml at its top"
    }
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

/// What a client or an operator hears of files that do not fit.
pub(crate) fn unfit(reference: &str, error: FileError) -> Error {
    match error {
        FileError::Refused(problem) => Error::ScenarioInvalid { reference: reference.to_owned(), problem },
        FileError::Io(..) => Error::Internal(format!("scenario {reference:?}: {error}")),
    }
}

/// Work on the file system, bounded by the limits on files. Not waited for when the caller goes away: it ends by itself and drops its
/// draft.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let span = tracing::Span::current();
    let work = tokio::task::spawn_blocking(move || span.in_scope(work));
    work.await.unwrap_or_else(|error| Err(Error::Internal(format!("scenario files: {error}"))))
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
