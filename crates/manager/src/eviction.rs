//! Limits the size of the scenario cache on disk.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{Error, Result, Store};
use gauntlet_scenario::Library;
use gauntlet_telemetry::context;
use jiff::Timestamp;
use tracing::{Instrument as _, field::Empty, info_span};

use crate::tasks::Tasks;

/// The pause between two checks.
const INTERVAL: Duration = Duration::from_secs(600);

/// Checks at once, then every [`INTERVAL`]. Reads the store only if the cache has more than `limit` bytes.
pub(crate) fn start(tasks: &Tasks, library: Library, store: Arc<dyn Store>, limit: u64) {
    tasks.spawn("eviction", |stop| async move {
        loop {
            let check = async {
                evict(&library, store.as_ref(), limit).await;
                tokio::time::sleep(INTERVAL).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = check => {}
            }
        }
    });
}

async fn evict(library: &Library, store: &dyn Store, limit: u64) {
    match library.bytes().await {
        Ok(bytes) if bytes <= limit => return,
        Ok(_) => {}
        Err(error) => return tracing::warn!(error.type = error.code(), %error, "cannot measure the scenario cache"),
    }
    let span = info_span!(parent: None, "scenario.evict", evicted.scenarios = Empty, evicted.bytes = Empty, error.type = Empty);
    async {
        let evicted = async { library.evict(limit, in_use(store).await?).await };
        match evicted.await {
            Ok(done) => {
                let span = tracing::Span::current();
                span.record("evicted.scenarios", done.scenarios).record("evicted.bytes", done.bytes);
                tracing::info!(
                    scenarios = done.scenarios,
                    bytes = done.bytes,
                    left = done.left,
                    limit,
                    "evicted scenarios"
                );
            }
            Err(error) => {
                tracing::warn!(error.type = error.code(), %error, "cannot evict scenarios; retrying later");
                tracing::Span::current().record("error.type", error.code());
                context::fail_span(error.to_string());
            }
        }
    }
    .instrument(span)
    .await;
}

/// The digests of all scenarios that challenges and instances refer to.
///
/// # Errors
/// [`Error::Internal`] if a record cannot be read, as it may refer to any scenario.
async fn in_use(store: &dyn Store) -> Result<BTreeSet<String>> {
    let mut digests = BTreeSet::new();
    let mut read = 0;
    let mut challenges = store.challenges();
    while let Some((challenge, instances)) = challenges.try_next().await? {
        read += 1;
        store.all_readable(&challenge.id).await?;
        digests.insert(challenge.scenario.digest);
        for instance in instances {
            digests.insert(instance.scenario.digest);
            digests.extend(instance.target.map(|target| target.scenario.digest));
        }
    }
    let stored = store.census(Timestamp::now()).await?.challenges;
    if read < stored {
        return Err(Error::Internal(format!(
            "only {read} of {stored} challenges can be read; the scenarios of the others are unknown"
        )));
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use gauntlet_coordination::Coordination;
    use gauntlet_domain::{Challenge, Identity, Instance, LockOptions, Phase, Scenarios as _, Strategy, Target};
    use gauntlet_scenario::FlagKey;
    use gauntlet_testing::fixtures::{challenge, instance, pinned, source_key};

    use super::*;

    #[tokio::test]
    async fn scenarios_of_challenges_instances_and_updates_are_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        assert_eq!(in_use(&store).await.unwrap(), BTreeSet::new());
        let challenge = Challenge { scenario: pinned("challenge"), ..challenge("web") };
        store.insert_challenge(&challenge).await.unwrap();
        let target = Target {
            identity: Identity::from_bits(2),
            scenario: pinned("target"),
            revision: 2,
            strategy: Strategy::BlueGreen,
        };
        let instance = Instance {
            scenario: pinned("instance"),
            target: Some(target),
            ..instance(source_key("web", "me"), Phase::Provisioning)
        };
        let stored = store.challenge(&challenge.id).await.unwrap().unwrap();
        let _guard = store.begin_create(&stored, &instance, None, &LockOptions::default()).await.unwrap();
        let expected = ["challenge", "instance", "target"].map(|reference| pinned(reference).digest);
        assert_eq!(in_use(&store).await.unwrap(), BTreeSet::from(expected));
    }

    const SCENARIO: &str = r#"
version: 1
provisioner: process
process: { command: ["./run.sh"] }
ports: { http: tcp }
ready: { tcp: { port: http } }
flags: { main: "FLAG{none}" }
connection_info: "http://{{ host }}:{{ ports.http }}"
"#;

    #[tokio::test]
    async fn unused_scenario_is_evicted_when_the_cache_exceeds_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let (root, cache) = (dir.path().join("root"), dir.path().join("cache"));
        std::fs::create_dir_all(root.join("web")).unwrap();
        std::fs::write(root.join("web/scenario.yaml"), SCENARIO).unwrap();
        std::fs::write(root.join("web/run.sh"), "").unwrap();
        let config = gauntlet_scenario::Config {
            local_root: Some(root),
            ..gauntlet_scenario::Config::new(&cache, FlagKey::new([1; 32]))
        };
        let library = Library::new(config).unwrap();
        library.resolve("file://web").await.unwrap();
        // Scenarios that were used within the last hour are kept.
        let used = std::time::SystemTime::now() - Duration::from_secs(2 * 3600);
        for entry in std::fs::read_dir(cache.join("sha256")).unwrap() {
            std::fs::File::open(entry.unwrap().path()).unwrap().set_modified(used).unwrap();
        }
        let cached = library.bytes().await.unwrap();
        assert!(cached > 0);
        evict(&library, &store, cached).await;
        assert_eq!(library.bytes().await.unwrap(), cached, "the limit is not exceeded");
        evict(&library, &store, cached - 1).await;
        assert_eq!(library.bytes().await.unwrap(), 0);
    }
}
