//! The domain's store, as transactions on the key-value port.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use async_trait::async_trait;
use futures::{TryStreamExt as _, stream};
use gauntlet_domain::{
    Assignment, Census, Challenge, ChallengeId, Error, Instance, InstanceKey, Intent, LockGuard, LockKind, LockOptions,
    Outcome, Phase, PhaseName, Pool, Result, Snapshot, SourceId, Store, Stored, Stream, Unfinished, Version,
};
use jiff::Timestamp;

use crate::{
    Coordination,
    ending::{fenced, ticket},
    keys::Layout,
    kv::{Compare, Condition, Get, KeyRange, KeyValue, Kv, Op, Txn},
    locks::{Ahead, Patience, held, in_queue},
    memory::{POOLED, written},
    reads::{Indexed, Instances, Scan},
    records,
    ticket::Of,
};

#[async_trait]
impl<K: Kv> Store for Coordination<K> {
    fn backend(&self) -> &'static str {
        self.core.kv.name()
    }

    async fn ping(&self) -> Result<()> {
        let nothing = Get { range: self.core.layout.rollouts(), limit: 1, keys_only: true };
        self.core.kv.page(nothing, None).await.map(|_| ()).map_err(|error| self.core.error(error))
    }

    async fn insert_challenge(&self, challenge: &Challenge) -> Result<()> {
        let layout = &self.core.layout;
        let key = layout.challenge(&challenge.id);
        let mut success = vec![Op::put(&key, records::write_challenge(challenge))];
        success.extend(
            layout.challenge_index(challenge).into_iter().filter(|(_, has)| *has).map(|(key, _)| Op::put(key, "")),
        );
        let txn = Txn { compare: vec![Compare::absent(KeyRange::key(key))], success, failure: Vec::new() };
        let result = self.core.write(txn).await?;
        if !result.succeeded {
            return Err(Error::ChallengeExists(challenge.id.clone()));
        }
        self.core.memory.challenge(&written(challenge.clone(), result.revision));
        Ok(())
    }

    async fn challenge(&self, id: &ChallengeId) -> Result<Option<Stored<Challenge>>> {
        let mut read = self.core.read(vec![Op::get(KeyRange::key(self.core.layout.challenge(id)))]).await?;
        let challenge = self.core.read_challenge(id, read.next_read())?;
        match &challenge {
            Some(challenge) => self.core.memory.challenge(challenge),
            None => self.core.memory.forget_challenge(id),
        }
        Ok(challenge)
    }

    async fn snapshot(&self, id: &ChallengeId, source: &SourceId) -> Result<Snapshot> {
        let core = &self.core;
        let key = InstanceKey { challenge: id.clone(), assignment: Assignment::Source(source.clone()) };
        let mut read = core.read(core.snapshot_ops(&key).into()).await?;
        let (mut snapshot, cut) = core.read_snapshot(&key, &mut read)?;
        if snapshot.pooled.is_empty() && cut {
            // None among the first: look on. A claim compares versions, so reading later is no harm.
            let mut all = Instances::new(Scan::values(core, core.layout.pooled_of(id), None));
            while snapshot.pooled.len() < POOLED
                && let Some(stored) = all.next().await?
            {
                snapshot.pooled.extend(Some(stored).filter(|stored| stored.value.phase == Phase::Ready));
            }
        }
        core.memory.snapshot(&snapshot);
        Ok(snapshot)
    }

    fn cached_snapshot(&self, id: &ChallengeId, source: &SourceId) -> Option<Snapshot> {
        self.core.memory.cached_snapshot(id, source)
    }

    fn challenges(&self) -> Stream<'_, (Challenge, Vec<Instance>)> {
        let challenges = Scan::values(&self.core, self.core.layout.challenges(), None);
        Box::pin(stream::try_unfold((challenges, None), move |(mut challenges, mut instances)| async move {
            if instances.is_none() {
                let at = challenges.at().await?;
                instances = Some((Instances::new(Scan::instances(&self.core, at)), None));
            }
            while let Some(kv) = challenges.next().await? {
                let Some(challenge) = self.core.readable_challenge(&kv) else { continue };
                let mut own = Vec::new();
                // Both are in order of the challenge's id.
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
        let mut read = self.core.read(vec![Op::get(self.core.layout.record_and_intent(key))]).await?;
        self.core.read_instance(key, &read.next_read())
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
        // The index is of one revision, the instances are of now: one that was renewed meanwhile is not expired.
        Box::pin(expired.try_filter(move |instance| std::future::ready(instance.expired(now))))
    }

    async fn pool(&self, id: &ChallengeId, claimed: usize, pooled: usize) -> Result<Pool> {
        let layout = &self.core.layout;
        let some = |range, limit: usize, keys_only| Op::Get(Get { range, limit: limit.max(1), keys_only });
        let mut read = self
            .core
            .read(vec![
                Op::get_keys(KeyRange::key(layout.pool(id))),
                // Each may have an intent.
                some(layout.claimed_of(id), claimed.saturating_mul(2), true),
                some(layout.pool_index(id), pooled, true),
                some(layout.pool_working(id), pooled, false),
            ])
            .await?;
        let version = version(&read.next_read()).unwrap_or(Version(0));
        let records = read.next_read();
        let records = records.iter().filter(|kv| layout.parse_instance(&kv.key).is_none_or(|(_, intent)| !intent));
        let claimed = records.count().min(claimed);
        let pooled = read.next_read();
        let working: BTreeMap<InstanceKey, PhaseName> = read
            .next_read()
            .into_iter()
            .filter_map(|kv| Some((layout.parse_instance_key(&kv.key)?, Layout::parse_working(&kv.value))))
            .collect();
        let phase = |key: &InstanceKey| working.get(key).copied().unwrap_or(PhaseName::Ready);
        let pooled = pooled.iter().filter_map(|kv| layout.parse_pooled(&kv.key)).map(|key| (phase(&key), key));
        Ok(Pool { version, claimed, pooled: pooled.map(|(phase, key)| (key, phase)).collect() })
    }

    async fn lock(&self, kind: LockKind, id: &ChallengeId, by: &LockOptions) -> Result<LockGuard> {
        self.core.acquire(kind, id, by).await
    }

    async fn release(&self, held: LockGuard) -> Result<()> {
        let ticket = ticket(&held)?;
        if ticket.live.lease.is_lost() {
            // Given up already; what was done under it was fenced by itself.
            return Ok(());
        }
        if ticket.unused() {
            // Nothing done under it can come later than this: who is next here need not wait for the key to go.
            self.core.mirror.leaving(&ticket.live.key, ticket.token);
        }
        let txn = ticket.removal();
        // Whoever removed the key, it is gone.
        self.core.finish(held, txn, |_| Some(0)).await.map(|_| ())
    }

    async fn update_challenge(&self, held: LockGuard, challenge: &Challenge) -> Result<()> {
        let layout = &self.core.layout;
        let ticket = self.core.lock_on(&held, &challenge.id)?;
        let key = layout.challenge(&challenge.id);
        let record = records::write_challenge(challenge);
        let mut success = vec![Op::put(&key, record.clone()), Op::delete(&ticket.live.key)];
        success.extend(
            layout
                .challenge_index(challenge)
                .into_iter()
                .map(|(key, has)| if has { Op::put(key, "") } else { Op::delete(key) }),
        );
        let txn = Txn {
            compare: vec![ticket.stands(), Compare::exists(&key)],
            success,
            failure: vec![Op::get(KeyRange::key(&key)), Op::get_keys(KeyRange::key(&ticket.live.key))],
        };
        let (token, id) = (held.token, challenge.id.clone());
        let applied = move |read: &[Vec<KeyValue>]| written_at(read.first()?, &record);
        let mut result = self.core.finish(held, txn, applied).await?;
        if result.succeeded {
            self.core.memory.challenge(&written(challenge.clone(), result.revision));
            return Ok(());
        }
        let stored = !result.next_read().is_empty();
        let stands = result.next_read().first().is_some_and(|kv| kv.create_revision == token);
        Err(if stands && !stored { Error::ChallengeNotFound(id) } else { fenced(LockKind::Challenge, token) })
    }

    async fn remove_challenge(&self, held: LockGuard, id: &ChallengeId) -> Result<()> {
        let layout = &self.core.layout;
        let ticket = self.core.lock_on(&held, id)?;
        let key = layout.challenge(id);
        let mut success = vec![Op::delete(&key), Op::delete(&ticket.live.key)];
        success.extend(layout.all_challenge_index(id).map(Op::delete));
        let txn = Txn {
            compare: vec![ticket.stands(), Compare::absent(layout.instances_of(id))],
            success,
            failure: vec![Op::get_keys(KeyRange::key(&key)), Op::get_keys(KeyRange::key(&ticket.live.key))],
        };
        let token = held.token;
        let removed = |read: &[Vec<KeyValue>]| read.first()?.is_empty().then_some(0);
        let mut result = self.core.finish(held, txn, removed).await?;
        if result.succeeded {
            self.core.memory.forget_challenge(id);
            return Ok(());
        }
        let _challenge = result.next_read();
        let stands = result.next_read().first().is_some_and(|kv| kv.create_revision == token);
        Err(if stands { Error::Conflict } else { fenced(LockKind::Challenge, token) })
    }

    async fn begin_create(
        &self,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        by: &LockOptions,
    ) -> Result<LockGuard> {
        let (core, layout, id) = (&self.core, &self.core.layout, &challenge.value.id);
        let (key, bounds) = (&intent.key, challenge.value.bounds);
        let counts = bounds.min() > 0 && (key.assignment.is_pooled() || bounds.max() > 0);
        let mut patience = Patience::new(by, LockKind::Challenge, id, || format!("the challenge lock of {id:?}"));
        loop {
            let lease = core.lease().await?;
            let live = core.live_key(lease, by, layout.owner(key), None);
            let writers = layout.queue(LockKind::Challenge, id);
            let mut success = vec![live.put(), Op::put(layout.instance(key), records::write_instance(intent))];
            success.extend(layout.instance_index(intent).into_iter().map(|(key, value)| Op::put(key, value)));
            success.extend(counts.then(|| Op::put(layout.pool(id), "")));
            let mut compare = vec![
                Compare::mod_revision(layout.challenge(id), challenge.version.0),
                Compare::absent(layout.record_and_intent(key)),
                Compare::absent(KeyRange::key(layout.owner(key))),
                Compare::absent(writers.clone()),
            ];
            if let Some(version) = pool {
                compare.extend([Compare::exists(layout.pool(id)), Compare::mod_revision(layout.pool(id), version.0)]);
            }
            let failure = [
                Op::get(KeyRange::key(layout.owner(key))),
                in_queue(&writers),
                Op::get_keys(KeyRange::key(layout.pool(id))),
            ];
            let txn = Txn { compare, success, failure: failure.into_iter().chain(core.snapshot_ops(key)).collect() };
            let of = Of::Instance(Box::new(intent.clone()));
            let (taken, mut result) = core.take(live, of, txn, false).await?;
            if let Some(ticket) = taken {
                return Ok(held(LockKind::Instance, ticket, patience));
            }
            let (owner, queued) = (result.next_read(), result.next_counted_read());
            let counted = version(&result.next_read());
            let (snapshot, _) = core.read_snapshot(key, &mut result)?;
            if snapshot.challenge.as_ref().map(|stored| stored.version) != Some(challenge.version)
                || snapshot.instance.is_some()
                || pool.is_some_and(|pool| counted != Some(pool))
            {
                core.met(key, &snapshot);
                return Err(Error::Conflict);
            }
            let ahead = Ahead::owner(owner).and_queue(writers, queued, result.revision);
            patience.wait(core, ahead).await?;
        }
    }

    async fn claim(
        &self,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        by: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        let (core, layout, id) = (&self.core, &self.core.layout, &challenge.value.id);
        let (from, to) = (&pooled.value.key, &claimed.key);
        // Nobody else here is to try for the same one.
        core.memory.forget_instance(from);
        let mut patience = Patience::new(by, LockKind::Challenge, id, || format!("the challenge lock of {id:?}"));
        let working = claimed.phase.is_working();
        loop {
            let lease = core.lease().await?;
            let live = core.live_key(lease, by, layout.owner(to), None);
            let writers = layout.queue(LockKind::Challenge, id);
            let mut success = vec![
                Op::Delete(layout.record_and_intent(from)),
                Op::put(layout.instance(to), records::write_instance(claimed)),
            ];
            success.extend(working.then(|| live.put()));
            success.extend(layout.instance_index(&pooled.value).into_iter().map(|(key, _)| Op::delete(key)));
            success.extend(layout.instance_index(claimed).into_iter().map(|(key, value)| Op::put(key, value)));
            let txn = Txn {
                compare: vec![
                    Compare::mod_revision(layout.challenge(id), challenge.version.0),
                    Compare::exists(layout.instance(from)),
                    not_after(layout.record_and_intent(from), pooled.version),
                    Compare::absent(KeyRange::key(layout.owner(from))),
                    Compare::absent(layout.record_and_intent(to)),
                    Compare::absent(KeyRange::key(layout.owner(to))),
                    Compare::absent(writers.clone()),
                ],
                success,
                failure: [
                    Op::get_keys(layout.record_and_intent(from)),
                    Op::get_keys(KeyRange::key(layout.owner(from))),
                    Op::get(KeyRange::key(layout.owner(to))),
                    in_queue(&writers),
                ]
                .into_iter()
                .chain(core.snapshot_ops(to))
                .collect(),
            };
            let mut result = if working {
                let of = Of::Instance(Box::new(claimed.clone()));
                match core.take(live, of, txn, false).await? {
                    (Some(ticket), _) => return Ok(Some(held(LockKind::Instance, ticket, patience))),
                    (None, result) => result,
                }
            } else {
                core.write(txn).await?
            };
            if result.succeeded {
                core.memory.instance(&written(claimed.clone(), result.revision));
                return Ok(None);
            }
            let pooled_changed = version(&result.next_read()) != Some(pooled.version);
            let pooled_owned = !result.next_read().is_empty();
            let (owner, queued) = (result.next_read(), result.next_counted_read());
            let (snapshot, _) = core.read_snapshot(to, &mut result)?;
            let changed = snapshot.challenge.as_ref().map(|stored| stored.version) != Some(challenge.version);
            if changed || pooled_changed || pooled_owned || snapshot.instance.is_some() {
                core.met(to, &snapshot);
                return Err(Error::Conflict);
            }
            patience.wait(core, Ahead::owner(owner).and_queue(writers, queued, result.revision)).await?;
        }
    }

    async fn begin(&self, key: &InstanceKey, begin: Intent, by: &LockOptions) -> Result<(LockGuard, Instance)> {
        let (core, layout) = (&self.core, &self.core.layout);
        let mut patience = waiting_for(key, by);
        // What an owner that is gone had been doing, if the record alone does not tell.
        let mut left: Option<Stored<Instance>> = None;
        loop {
            let lease = core.lease().await?;
            let live = core.live_key(lease, by, layout.owner(key), None);
            let mut compare = vec![
                Compare::exists(layout.instance(key)),
                // However late this is delivered: it is not for an instance that is begun after it was sent.
                Compare::create_revision_at_most(layout.instance(key), core.seen.load(Ordering::Relaxed)),
                Compare::absent(KeyRange::key(layout.owner(key))),
            ];
            let mut success = vec![Op::get(KeyRange::key(layout.working(key))), live.put()];
            match (&begin, left.take()) {
                (Intent::Recover, _) => compare.push(Compare::exists(layout.working(key))),
                // Nothing of before would be lost: the new intent goes beside a record that needs no reading.
                (Intent::Update(_) | Intent::Delete, None) => {
                    let target = if let Intent::Update(target) = &begin { Some(target) } else { None };
                    compare.push(Compare::absent(KeyRange::key(layout.intent(key))));
                    success.push(Op::put(layout.intent(key), records::write_intent(target)));
                    success.push(Op::put(layout.working(key), working_on(&begin).name()));
                }
                (Intent::Update(_) | Intent::Delete, Some(before)) => {
                    compare.push(not_after(layout.record_and_intent(key), before.version));
                    let mut record = before.value;
                    begun(&mut record, &begin);
                    success.push(Op::put(layout.instance(key), records::write_instance(&record)));
                    success.push(Op::delete(layout.intent(key)));
                    success.push(Op::put(layout.working(key), working_on(&begin).name()));
                }
            }
            success.push(Op::get(layout.record_and_intent(key)));
            let failure = vec![
                Op::get(layout.record_and_intent(key)),
                Op::get(KeyRange::key(layout.owner(key))),
                Op::get_keys(KeyRange::key(layout.working(key))),
            ];
            // Its instance is put in below, once it is read.
            let of = Of::Lock(LockKind::Instance, key.challenge.clone());
            let (taken, mut result) = core.take(live, of, Txn { compare, success, failure }, false).await?;
            if let Some(mut ticket) = taken {
                let (working, whole) = (result.next_read(), result.next_read());
                let was = working.first().map(|kv| Layout::parse_working(&kv.value));
                if matches!(begin, Intent::Update(_)) && was == Some(PhaseName::Deleting) {
                    self.take_back(held(LockKind::Instance, ticket, patience), key, working).await?;
                    return Err(Error::Conflict);
                }
                let value = match core.read_instance(key, &whole) {
                    Ok(Some(stored)) => stored.value,
                    Ok(None) => return Err(Error::Conflict),
                    Err(_) if begin == Intent::Recover => {
                        // Reports it, once.
                        let _ = core.readable(&whole);
                        return Err(Error::Conflict);
                    }
                    Err(error) => {
                        self.take_back(held(LockKind::Instance, ticket, patience), key, working).await?;
                        return Err(error);
                    }
                };
                ticket.of = Of::Instance(Box::new(value.clone()));
                return Ok((held(LockKind::Instance, ticket, patience), value));
            }
            let (whole, owner, working) = (result.next_read(), result.next_read(), result.next_read());
            if whole.is_empty() || (begin == Intent::Recover && (!owner.is_empty() || working.is_empty())) {
                return Err(Error::Conflict);
            }
            if owner.is_empty() && begin != Intent::Recover {
                let found = core.read_instance(key, &whole)?;
                let goes = found.as_ref().is_some_and(|found| found.value.phase == Phase::Deleting);
                if goes && matches!(begin, Intent::Update(_)) {
                    return Err(Error::Conflict);
                }
                // A record alone was begun since this replica looked last: the next try is for that one.
                left = found.filter(|_| whole.len() > 1);
            }
            patience.wait(core, Ahead::owner(owner)).await?;
        }
    }

    async fn commit(&self, held: LockGuard, key: &InstanceKey, commit: Outcome) -> Result<()> {
        let layout = &self.core.layout;
        let ticket = ticket(&held)?;
        let before = match &ticket.of {
            Of::Instance(before) if before.key == *key => before,
            other => return Err(Error::Internal(format!("an ownership of {other:?} commits nothing to {key:?}"))),
        };
        let (record_key, intent_key) = (layout.instance(key), layout.intent(key));
        let old = layout.instance_index(before);
        let mut success = vec![Op::delete(&ticket.live.key), Op::delete(intent_key)];
        let record = match &commit {
            Outcome::Remove => {
                success.push(Op::delete(&record_key));
                success.extend(old.into_iter().map(|(key, _)| Op::delete(key)));
                None
            }
            Outcome::Put(instance) if instance.key == *key => {
                let record = records::write_instance(instance);
                success.push(Op::put(&record_key, record.clone()));
                success.extend(reindex(old, layout.instance_index(instance)));
                Some(record)
            }
            Outcome::Put(instance) => {
                return Err(Error::Internal(format!("{:?} is not committed to {key:?}", instance.key)));
            }
        };
        let token = held.token;
        let txn =
            Txn { compare: vec![ticket.stands()], success, failure: vec![Op::get(layout.record_and_intent(key))] };
        let applied = move |read: &[Vec<KeyValue>]| match &record {
            None => read.first()?.is_empty().then_some(0),
            Some(record) => written_at(read.first()?, record),
        };
        let result = self.core.finish(held, txn, applied).await?;
        if !result.succeeded {
            return Err(fenced(LockKind::Instance, token));
        }
        match commit {
            Outcome::Put(instance) => self.core.memory.instance(&written(*instance, result.revision)),
            Outcome::Remove => self.core.memory.forget_instance(key),
        }
        Ok(())
    }

    async fn rewrite(&self, read: &Stored<Instance>, instance: &Instance, by: &LockOptions) -> Result<()> {
        let (core, layout, key) = (&self.core, &self.core.layout, &read.value.key);
        if instance.key != *key {
            return Err(Error::Internal(format!("{:?} is not rewritten as {:?}", key, instance.key)));
        }
        let mut patience = waiting_for(key, by);
        let old = layout.instance_index(&read.value);
        loop {
            let mut success =
                vec![Op::put(layout.instance(key), records::write_instance(instance)), Op::delete(layout.intent(key))];
            success.extend(reindex(old.clone(), layout.instance_index(instance)));
            let txn = Txn {
                compare: vec![
                    Compare::exists(layout.instance(key)),
                    not_after(layout.record_and_intent(key), read.version),
                    Compare::absent(KeyRange::key(layout.owner(key))),
                ],
                success,
                failure: [Op::get(KeyRange::key(layout.owner(key)))]
                    .into_iter()
                    .chain(core.snapshot_ops(key))
                    .collect(),
            };
            let mut result = core.write(txn).await?;
            if result.succeeded {
                core.memory.instance(&written(instance.clone(), result.revision));
                return Ok(());
            }
            let owner = result.next_read();
            if owner.is_empty() {
                core.met(key, &core.read_snapshot(key, &mut result)?.0);
                return Err(Error::Conflict);
            }
            patience.wait(core, Ahead::owner(owner)).await?;
        }
    }

    async fn unfinished(&self, now: Timestamp) -> Result<Vec<Unfinished>> {
        let (core, layout) = (&self.core, &self.core.layout);
        let mut working = Scan::values(core, layout.all_working(), None);
        let at = working.at().await?;
        let live = Scan::keys(core, layout.live(), at.clone()).all().await?;
        let owned = |key: &str| live.binary_search_by(|kv| kv.key.as_str().cmp(key)).is_ok();
        let locked = |keys: &KeyRange| {
            let first = live.partition_point(|kv| kv.key < keys.start);
            live.get(first).zip(keys.end.as_ref()).is_some_and(|(kv, to)| kv.key < *to)
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
        // By the indexes alone: no record is read.
        let mut instances = Scan::instance_keys(core, None);
        let at = instances.at().await?;
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

fn waiting_for(key: &InstanceKey, by: &LockOptions) -> Patience {
    let what = || format!("the instance {:?} of {:?}", key.assignment, key.challenge);
    Patience::new(by, LockKind::Instance, &key.challenge, what)
}

impl<K: Kv> Coordination<K> {
    /// Undoes the intent that was put beside a record which proved unreadable or on its way out, and gives the ownership up. Should a crash
    /// come first, the intent stands: what was asked for is then done, by a build that can read the record.
    async fn take_back(&self, held: LockGuard, key: &InstanceKey, working: Vec<KeyValue>) -> Result<()> {
        let layout = &self.core.layout;
        let ticket = ticket(&held)?;
        let mut success = vec![Op::delete(&ticket.live.key), Op::delete(layout.intent(key))];
        success.push(match working.into_iter().next() {
            Some(before) => Op::put(before.key, before.value),
            None => Op::delete(layout.working(key)),
        });
        let txn = Txn { compare: vec![ticket.stands()], success, failure: Vec::new() };
        self.core.finish(held, txn, |_| None).await.map(|_| ())
    }
}

fn not_after(range: KeyRange, version: Version) -> Compare {
    Compare { range, condition: Condition::ModRevisionAtMost(version.0) }
}

fn version(whole: &[KeyValue]) -> Option<Version> {
    whole.iter().map(|kv| kv.mod_revision).max().map(Version)
}

/// At which revision a record was written, if it is stored, and with no intent.
fn written_at(whole: &[KeyValue], record: &[u8]) -> Option<u64> {
    match whole {
        [kv] if kv.value == record => Some(kv.mod_revision),
        _ => None,
    }
}

fn working_on(begin: &Intent) -> PhaseName {
    if *begin == Intent::Delete { PhaseName::Deleting } else { PhaseName::Updating }
}

fn begun(instance: &mut Instance, begin: &Intent) {
    match begin {
        Intent::Update(target) => {
            instance.phase = Phase::Updating;
            instance.target = Some(target.clone());
        }
        Intent::Delete => instance.phase = Phase::Deleting,
        Intent::Recover => {}
    }
}

/// Replaces old index keys with new ones, touching none twice and none that stays.
fn reindex(old: Vec<(String, String)>, new: Vec<(String, String)>) -> Vec<Op> {
    let stale = old.iter().filter(|(key, _)| !new.iter().any(|(kept, _)| kept == key));
    let mut ops: Vec<Op> = stale.map(|(key, _)| Op::delete(key)).collect();
    ops.extend(new.into_iter().filter(|entry| !old.contains(entry)).map(|(key, value)| Op::put(key, value)));
    ops
}
