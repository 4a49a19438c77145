//! The domain's store, implemented once over the key-value port. Reads are here and in [`scan`](crate::scan); taking ownership is in
//! [`begin`](crate::begin), locking in [`locks`](crate::locks) and releasing in [`commit`](crate::commit).

use std::collections::BTreeMap;

use async_trait::async_trait;
use futures::{TryStreamExt as _, stream};
use gauntlet_domain::{
    Assignment, Census, Challenge, ChallengeId, Error, Instance, InstanceKey, Intent, LockGuard, LockKind, LockOptions,
    Phase, PhaseName, Pool, Result, Snapshot, SourceId, Store, Stored, Stream, Unfinished, Version,
};
use jiff::Timestamp;

use crate::{
    Coordination,
    decode::version_of,
    keys::Layout,
    kv::{Compare, Get, KeyRange, Kv, Op, Txn},
    records,
    replica_cache::{MAX_POOLED, written},
    scan::{Indexed, Instances, Scan},
};

#[async_trait]
impl<K: Kv> Store for Coordination<K> {
    fn backend(&self) -> &'static str {
        self.core.kv.name()
    }

    async fn ping(&self) -> Result<()> {
        let one_key = Get { range: self.core.layout.rollouts(), limit: 1, keys_only: true };
        self.core.kv.page(one_key, None).await.map(|_| ()).map_err(|error| self.core.error(error))
    }

    async fn insert_challenge(&self, challenge: &Challenge) -> Result<()> {
        let layout = &self.core.layout;
        let key = layout.challenge(&challenge.id);
        let mut success = vec![Op::put(&key, records::write_challenge(challenge))];
        let index = layout.challenge_index(challenge);
        success.extend(index.into_iter().filter(|(_, indexed)| *indexed).map(|(key, _)| Op::put(key, "")));
        let txn = Txn { compare: vec![Compare::absent(KeyRange::key(key))], success, failure: Vec::new() };
        let response = self.core.write(txn).await?;
        if !response.succeeded {
            return Err(Error::ChallengeExists(challenge.id.clone()));
        }
        self.core.cache.put_challenge(&written(challenge.clone(), response.revision));
        Ok(())
    }

    async fn challenge(&self, id: &ChallengeId) -> Result<Option<Stored<Challenge>>> {
        let mut response = self.core.read(vec![Op::get(KeyRange::key(self.core.layout.challenge(id)))]).await?;
        let challenge = self.core.read_challenge(id, response.next_read())?;
        match &challenge {
            Some(challenge) => self.core.cache.put_challenge(challenge),
            None => self.core.cache.remove_challenge(id),
        }
        Ok(challenge)
    }

    async fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Result<Snapshot> {
        let core = &self.core;
        let key = InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) };
        let mut response = core.read(core.snapshot_ops(&key).into()).await?;
        let (mut snapshot, more) = core.read_snapshot(&key, &mut response)?;
        if snapshot.pooled.is_empty() && more {
            // None of the first pooled instances is ready. A claim compares versions, so the rest may be read at a later revision.
            let mut pooled = Instances::new(Scan::values(core, core.layout.pooled_of(id), None));
            while snapshot.pooled.len() < MAX_POOLED
                && let Some(stored) = pooled.next().await?
            {
                snapshot.pooled.extend(Some(stored).filter(|stored| stored.value.phase == Phase::Ready));
            }
        }
        core.cache.put_snapshot(&snapshot);
        Ok(snapshot)
    }

    fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot> {
        self.core.cache.snapshot(id, source)
    }

    fn challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)> {
        let challenges = Scan::values(&self.core, self.core.layout.challenges(), None);
        Box::pin(stream::try_unfold((challenges, None), move |(mut challenges, mut instances)| async move {
            if instances.is_none() {
                let at = challenges.snapshot().await?;
                instances = Some((Instances::new(Scan::instances(&self.core, at)), None));
            }
            while let Some(kv) = challenges.next().await? {
                let Some(challenge) = self.core.readable_challenge(&kv) else { continue };
                let mut own = Vec::new();
                // Both scans are in order of the challenge's id.
                if let Some((scan, peeked)) = &mut instances {
                    loop {
                        let next: Option<Stored<Instance>> = match peeked.take() {
                            Some(next) => Some(next),
                            None => scan.next().await?,
                        };
                        match next {
                            Some(next) if next.value.key.challenge < challenge.value.id => {}
                            Some(next) if next.value.key.challenge == challenge.value.id => own.push(next.value),
                            later => {
                                *peeked = later;
                                break;
                            }
                        }
                    }
                }
                return Ok(Some(((challenge.value, own), (challenges, instances))));
            }
            Ok(None)
        }))
    }

    async fn instance(&self, key: &InstanceKey) -> Result<Option<Stored<Instance>>> {
        let mut response = self.core.read(vec![Op::get(self.core.layout.record_and_intent(key))]).await?;
        self.core.read_instance(key, &response.next_read())
    }

    fn instances_of(&self, id: &ChallengeId) -> Stream<'_, Stored<Instance>> {
        let instances = Instances::new(Scan::values(&self.core, self.core.layout.instances_of(id), None));
        Box::pin(stream::try_unfold(instances, |mut instances| async move {
            Ok(instances.next().await?.map(|stored| (stored, instances)))
        }))
    }

    async fn all_readable(&self, id: &ChallengeId) -> Result<()> {
        Instances::new(Scan::values(&self.core, self.core.layout.instances_of(id), None)).all_readable().await
    }

    fn instances_by_source(&self, source: Option<&SourceId>) -> Stream<'_, Instance> {
        match source {
            None => {
                let instances = Instances::new(Scan::instances(&self.core, None));
                Box::pin(stream::try_unfold(instances, |mut instances| async move {
                    while let Some(stored) = instances.next().await? {
                        if !stored.value.key.assignment.is_pooled() {
                            return Ok(Some((stored.value, instances)));
                        }
                    }
                    Ok(None)
                }))
            }
            Some(source) => {
                let index = Scan::keys(&self.core, self.core.layout.by_source(source), None);
                Box::pin(Indexed::new(index, Layout::parse_by_source).stream())
            }
        }
    }

    fn expired(&self, now: Timestamp) -> Stream<'_, Instance> {
        let index = Scan::keys(&self.core, self.core.layout.expired(now), None);
        let expired = Indexed::new(index, Layout::parse_instance_key).stream();
        // The index is read at one revision, each instance later: one that was renewed in between has not expired.
        Box::pin(expired.try_filter(move |instance| std::future::ready(instance.is_expired(now))))
    }

    async fn pool(&self, id: &ChallengeId, claimed: usize, pooled: usize) -> Result<Pool> {
        let layout = &self.core.layout;
        let first = |range, limit: usize, keys_only| Op::Get(Get { range, limit: limit.max(1), keys_only });
        let mut response = self
            .core
            .read(vec![
                Op::get_keys(KeyRange::key(layout.pool(id))),
                // Each instance may have an intent key.
                first(layout.claimed_of(id), claimed.saturating_mul(2), true),
                first(layout.pool_index(id), pooled, true),
                first(layout.pool_working(id), pooled, false),
            ])
            .await?;
        let version = version_of(&response.next_read()).unwrap_or(Version(0));
        let records = response.next_read();
        let records = records.iter().filter(|kv| layout.parse_instance(&kv.key).is_none_or(|(_, intent)| !intent));
        let claimed = records.count().min(claimed);
        let pooled = response.next_read();
        let working: BTreeMap<InstanceKey, PhaseName> = response
            .next_read()
            .into_iter()
            .filter_map(|kv| Some((layout.parse_instance_key(&kv.key)?, Layout::parse_working(&kv.value))))
            .collect();
        let phase = |key: &InstanceKey| working.get(key).copied().unwrap_or(PhaseName::Ready);
        let pooled = pooled.iter().filter_map(|kv| layout.parse_pooled(&kv.key)).map(|key| (phase(&key), key));
        Ok(Pool { version, claimed, pooled: pooled.map(|(phase, key)| (key, phase)).collect() })
    }

    async fn lock(&self, kind: LockKind, id: &ChallengeId, options: &LockOptions) -> Result<LockGuard> {
        self.core.lock(kind, id, options).await
    }

    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        options: &LockOptions,
    ) -> Result<LockGuard> {
        self.core.begin_create(challenge, intent, pool, options).await
    }

    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        options: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        self.core.claim(challenge, pooled, claimed, options).await
    }

    async fn begin(&self, key: &InstanceKey, intent: Intent, options: &LockOptions) -> Result<(LockGuard, Instance)> {
        self.core.begin(key, intent, options).await
    }

    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, options: &LockOptions) -> Result<()> {
        self.core.rewrite(read, instance, options).await
    }

    async fn unfinished(&self, now: Timestamp) -> Result<Vec<Unfinished>> {
        let (core, layout) = (&self.core, &self.core.layout);
        let mut working = Scan::values(core, layout.all_working(), None);
        let at = working.snapshot().await?;
        let live = Scan::keys(core, layout.live(), at.clone()).all().await?;
        let owned = |key: &str| live.binary_search_by(|kv| kv.key.as_str().cmp(key)).is_ok();
        let locked = |queue: &KeyRange| {
            let first = live.partition_point(|kv| kv.key < queue.start);
            live.get(first).zip(queue.end.as_ref()).is_some_and(|(kv, end)| kv.key < *end)
        };
        let mut unfinished = Vec::new();
        while let Some(kv) = working.next().await? {
            let Some(key) = layout.parse_instance_key(&kv.key) else { continue };
            let retry_at = std::str::from_utf8(&kv.value).ok().and_then(|text| text.parse::<Timestamp>().ok());
            if retry_at.is_none_or(|retry_at| retry_at <= now) && !owned(&layout.owner(&key)) {
                unfinished.push(Unfinished::Instance(key));
            }
        }
        for kv in Scan::keys(core, layout.rollouts(), at).all().await? {
            let Some(id) = layout.parse_index(&kv.key) else { continue };
            if !locked(&layout.queue(LockKind::Rollout, &id)) {
                unfinished.push(Unfinished::Challenge(id));
            }
        }
        Ok(unfinished)
    }

    async fn pools(&self) -> Result<Vec<ChallengeId>> {
        let mut keys = Scan::keys(&self.core, self.core.layout.pools(), None);
        let mut pools: Vec<ChallengeId> = Vec::new();
        while let Some(kv) = keys.next().await? {
            if let Some(id) = self.core.layout.parse_index(&kv.key)
                && pools.last() != Some(&id)
            {
                pools.push(id);
            }
        }
        Ok(pools)
    }

    async fn census(&self, now: Timestamp) -> Result<Census> {
        let (core, layout) = (&self.core, &self.core.layout);
        // Counts by the indexes: no record is read.
        let mut instances = Scan::instance_keys(core, None);
        let at = instances.snapshot().await?;
        let mut working = Scan::values(core, layout.all_working(), at.clone());
        let mut census = Census {
            challenges: core.count(layout.challenges(), at.clone()).await?,
            overdue: core.count(layout.expired(now), at).await?,
            ..Census::default()
        };
        while let Some(kv) = instances.next().await? {
            if let Some((key, false)) = layout.parse_instance(&kv.key) {
                let pooled = key.assignment.is_pooled();
                *census.instances.entry((key.challenge, PhaseName::Ready, pooled)).or_default() += 1;
            }
        }
        while let Some(kv) = working.next().await? {
            let Some(key) = layout.parse_instance_key(&kv.key) else { continue };
            let (challenge, pooled) = (key.challenge, key.assignment.is_pooled());
            if let Some(ready) = census.instances.get_mut(&(challenge.clone(), PhaseName::Ready, pooled)) {
                *ready = ready.saturating_sub(1);
                *census.instances.entry((challenge, Layout::parse_working(&kv.value), pooled)).or_default() += 1;
            }
        }
        census.instances.retain(|_, count| *count > 0);
        Ok(census)
    }
}
