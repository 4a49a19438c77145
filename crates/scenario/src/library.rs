//! Implements the domain's `Scenarios` port: resolves references, caches scenarios and renders launch plans.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use futures::FutureExt as _;
use gauntlet_domain::{
    Additional, Error, Identity, LaunchPlan, Pinned, Placement, PreparedScenario, Result, Scenarios,
};
use gauntlet_telemetry::Instruments;
use tracing::{
    Instrument as _,
    field::{Empty, display},
};

use crate::{
    cache::{Cache, Damaged, Evicted},
    digest::Digest,
    document::Document,
    documents::Documents,
    files::{FileError, FileLimits, blocking},
    flag_keys::FlagKeys,
    flights::Flights,
    local, plan,
    registry::{Access, Reference, Registry},
    scenario_file::{Unread, read_document},
    yaml::Problem,
};

/// The configuration of a [`Library`].
#[derive(Debug, Clone)]
pub struct Config {
    /// The cache directory. Several processes may share it.
    pub cache: PathBuf,
    /// The root of `file://` references; `None` rejects them.
    pub local_root: Option<PathBuf>,
    /// The keys that flags are varied with.
    pub flag_keys: FlagKeys,
    /// How to reach registries.
    pub access: Access,
    /// Limits on a scenario's files.
    pub limits: FileLimits,
    /// Where damage to the cache is counted.
    pub instruments: Instruments,
}

impl Config {
    /// Registries over HTTPS without credentials, no local directories, default limits.
    pub fn new(cache: impl Into<PathBuf>, flag_keys: impl Into<FlagKeys>) -> Self {
        Self {
            cache: cache.into(),
            local_root: None,
            flag_keys: flag_keys.into(),
            access: Access::default(),
            limits: FileLimits::default(),
            instruments: Instruments::noop(),
        }
    }
}

/// Scenarios, cached by digest.
///
/// Clones share the cache. Resolving a cached digest needs no network; resolving a tag takes one request. Concurrent calls for one digest of
/// one repository share one fetch. A slow registry delays only calls for its own scenarios.
///
/// # Cancel safety
/// Dropping the last call that waits for a fetch cancels the fetch and removes what it had written.
#[derive(Clone)]
pub struct Library {
    inner: Arc<Inner>,
}

struct Inner {
    cache: Cache,
    documents: Documents,
    config: Config,
    registry: Registry,
    /// Fetches in progress, by registry, repository and digest: content that one registry is slow to send or doesn't have may come from
    /// another.
    fetches: Flights<(String, String, Digest), Result<PathBuf>>,
    /// Verifications in progress.
    verifications: Flights<Digest, Result<Option<PathBuf>>>,
}

impl Library {
    /// Opens or creates the cache. Blocks on the file system.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache can't be used or the access settings are invalid.
    pub fn new(config: Config) -> Result<Self> {
        let cache = Cache::open(&config.cache).map_err(unusable)?;
        let registry = Registry::new(&config.access).map_err(Error::Internal)?;
        Ok(Self {
            inner: Arc::new(Inner {
                cache,
                documents: Documents::default(),
                config,
                registry,
                fetches: Flights::default(),
                verifications: Flights::default(),
            }),
        })
    }

    /// Returns the size of the cached scenarios in bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache can't be read.
    pub async fn bytes(&self) -> Result<u64> {
        let cache = self.inner.cache.clone();
        blocking(move || cache.bytes().map_err(unusable)).await
    }

    /// Removes the least recently used scenarios until at most `limit` bytes are cached. Keeps scenarios whose digest is `in_use` and those
    /// used within the last hour. A removed scenario is fetched again when it is needed.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cache can't be read or a scenario can't be removed.
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
        self.inner.registry.check_allowed(reference, &target)?;
        let span = pull_span(reference);
        let resolved = async {
            let digest = match digest {
                Some(digest) => digest,
                None => self.inner.registry.resolve_tag(reference, &target).await?,
            };
            let dir = self.fetch(reference, target, digest).await?;
            Ok((digest, dir))
        };
        recorded(resolved, span).await
    }

    /// Returns the directory of a scenario if it is cached and as it was unpacked. A damaged one is removed, logged and counted.
    async fn cached(&self, digest: Digest) -> Result<Option<PathBuf>> {
        if let Some(verified) = self.inner.cache.verified(digest) {
            // A few system calls on files whose metadata is in memory.
            let found = if verified.is_large() { blocking(|| Ok(verified.check())).await? } else { verified.check() };
            if found.is_some() {
                return Ok(found);
            }
        }
        let library = self.clone();
        let verify = move || {
            let work = blocking(move || {
                let Inner { cache, config, .. } = &*library.inner;
                Ok(cache.find(digest, &config.limits).unwrap_or_else(|Damaged(problem)| {
                    tracing::warn!(scenario.digest = %digest, problem, "a cached scenario was changed; fetching it again");
                    config.instruments.scenario.record_damage();
                    None
                }))
            });
            work.boxed()
        };
        self.inner.verifications.join(digest, verify).await
    }

    /// Returns the cached directory of a digest; fetches it, or joins the fetch in progress, if it isn't cached.
    async fn fetch(&self, reference: &str, target: Reference, digest: Digest) -> Result<PathBuf> {
        let cached = self.cached(digest).await?;
        tracing::Span::current().record("scenario.digest", display(digest)).record("cache.hit", cached.is_some());
        if let Some(dir) = cached {
            return Ok(dir);
        }
        let key = (target.registry().to_owned(), target.repository().to_owned(), digest);
        let pull = || self.clone().pull(reference.to_owned(), target, digest).boxed();
        self.inner.fetches.join(key, pull).await
    }

    async fn pull(self, reference: String, target: Reference, digest: Digest) -> Result<PathBuf> {
        // Another fetch may have finished since the cache was checked.
        if let Some(dir) = self.cached(digest).await? {
            return Ok(dir);
        }
        let Inner { registry, cache, config, .. } = &*self.inner;
        registry.pull(&reference, &target, digest, cache, &config.limits).await
    }

    /// Returns the directory of a pinned scenario; fetches it again if it is no longer cached, or was changed.
    async fn directory(&self, pinned: &Pinned, digest: Digest) -> Result<PathBuf> {
        if let Some(dir) = self.cached(digest).await? {
            return Ok(dir);
        }
        if pinned.reference.starts_with(local::SCHEME) {
            let (found, dir) = self.resolve_local(&pinned.reference).await?;
            if found == digest {
                return Ok(dir);
            }
            let problem = format!(
                "the directory has changed to {found}, and the copy of {digest} is no longer cached; update the challenge"
            );
            return Err(Error::ScenarioNotFound { reference: pinned.reference.clone(), problem });
        }
        let (target, _) = crate::registry::parse(&pinned.reference)?;
        self.inner.registry.check_allowed(&pinned.reference, &target)?;
        let target = target.clone_with_digest(digest.to_string());
        recorded(self.fetch(&pinned.reference, target, digest), pull_span(&pinned.reference)).await
    }

    /// Returns the parsed document of a cached scenario.
    async fn document(&self, reference: &str, digest: Digest, dir: &Path) -> Result<Arc<Document>> {
        match self.inner.documents.get(digest) {
            Some(document) => Ok(document),
            None => self.read(reference, digest, dir).await,
        }
    }

    /// Reads and checks the document of a cached scenario, and caches it in memory.
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
        let document = Arc::new(recorded(read, span).await?);
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

    fn flag_key(&self) -> Option<String> {
        self.inner.config.flag_keys.active().map(|key| key.id())
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        flag_key: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        let digest = pinned_digest(scenario)?;
        let files = self.directory(scenario, digest).await?;
        let document = self.document(&scenario.reference, digest, &files).await?;
        let key = self.inner.config.flag_keys.get(flag_key).ok_or_else(|| Error::Unavailable {
            what: "flag key",
            detail: format!(
                "no key has the id {:?}; restore its line in the key file (--flag-key-file)",
                flag_key.unwrap_or_default()
            ),
        })?;
        let flags = plan::flags(&scenario.reference, &document, &key, identity, additional)?;
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

/// The first problems, on one line.
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

/// Runs `work` in `span` and records an error's code there.
pub(crate) async fn recorded<T>(work: impl Future<Output = Result<T>>, span: tracing::Span) -> Result<T> {
    let result = work.instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("error.type", error.code());
        span.record("otel.status_code", "ERROR");
    }
    result
}
