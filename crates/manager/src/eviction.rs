//! Keeps the scenarios on this machine's disk within their bound.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use gauntlet_domain::{Error, Result, Store};
use gauntlet_scenario::Library;
use gauntlet_telemetry::context;
use jiff::Timestamp;
use tracing::{Instrument as _, field::Empty, info_span};

use crate::tasks::Tasks;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(600);

/// Looks at once and then every ten minutes. The store is asked only where more than `limit` bytes are kept.
pub(crate) fn start(tasks: &Tasks, library: Library, store: Arc<dyn Store>, limit: u64) {
    tasks.spawn("eviction", |stop| async move {
        loop {
            let looked = async {
                look(&library, store.as_ref(), limit).await;
                tokio::time::sleep(EVERY).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = looked => {}
            }
        }
    });
}

async fn look(library: &Library, store: &dyn Store, limit: u64) {
    match library.bytes().await {
        Ok(bytes) if bytes <= limit => return,
        Ok(_) => {}
        Err(error) => return tracing::warn!(error.type = error.code(), %error, "scenarios not counted"),
    }
    let span = info_span!(parent: None, "scenario.evict", evicted.scenarios = Empty, evicted.bytes = Empty, error.type = Empty);
    async {
        let evicted = async { library.evict(limit, in_use(store).await?).await };
        match evicted.await {
            Ok(done) => {
                let span = tracing::Span::current();
                span.record("evicted.scenarios", done.scenarios).record("evicted.bytes", done.bytes);
                tracing::info!(scenarios = done.scenarios, bytes = done.bytes, left = done.left, limit, "evicted");
            }
            Err(error) => {
                tracing::warn!(error.type = error.code(), %error, "scenarios not evicted, will be tried again");
                tracing::Span::current().record("error.type", error.code());
                context::fail_span(error.to_string());
            }
        }
    }
    .instrument(span)
    .await;
}

/// The digest of every scenario that a challenge or an instance refers to; [`Error::Internal`] if some record cannot be read.
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
            "of {stored} challenges {read} were read: what the others use is not known"
        )));
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use gauntlet_coordination::Coordination;
    use gauntlet_domain::{
        Assignment, Challenge, ChallengeId, Identity, Instance, InstanceKey, LockOptions, Phase, Pinned, PoolBounds,
        SourceId, Strategy, Target,
    };

    use super::*;

    fn pinned(digest: &str) -> Pinned {
        Pinned { reference: "registry.test/web:1".to_owned(), digest: digest.to_owned() }
    }

    #[tokio::test]
    async fn what_challenges_instances_and_updates_refer_to_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        assert_eq!(in_use(&store).await.unwrap(), BTreeSet::new());
        let id = ChallengeId::new("web").unwrap();
        let challenge = Challenge {
            id: id.clone(),
            scenario: pinned("challenge"),
            timeout: None,
            until: None,
            additional: BTreeMap::new(),
            bounds: PoolBounds::default(),
            revision: 1,
            content_revision: 1,
            rollout: None,
            deleting: false,
            traceparent: None,
        };
        store.insert_challenge(&challenge).await.unwrap();
        let target = Target {
            identity: Identity::from_bits(2),
            scenario: pinned("target"),
            revision: 2,
            strategy: Strategy::BlueGreen,
        };
        let instance = Instance {
            key: InstanceKey { challenge: id.clone(), assignment: Assignment::Source(SourceId::new("me").unwrap()) },
            identity: Identity::from_bits(1),
            phase: Phase::Provisioning,
            since: Timestamp::UNIX_EPOCH,
            last_renew: Timestamp::UNIX_EPOCH,
            until: None,
            scenario: pinned("instance"),
            applied_revision: 1,
            additional: BTreeMap::new(),
            connection_info: String::new(),
            flags: Vec::new(),
            target: Some(target),
            traceparent: None,
        };
        let stored = store.challenge(&id).await.unwrap().unwrap();
        let _held = store.begin_create(&stored, &instance, None, &LockOptions::default()).await.unwrap();
        let expected = ["challenge", "instance", "target"].map(str::to_owned);
        assert_eq!(in_use(&store).await.unwrap(), BTreeSet::from(expected));
    }
}
