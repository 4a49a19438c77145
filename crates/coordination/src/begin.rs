//! Taking ownership of instances: the transactions that record an intent and put the owner key, and rewrites that need no owner.

use std::sync::{Arc, atomic::Ordering};

use gauntlet_domain::{
    Challenge, ChallengeId, Error, Instance, InstanceKey, Intent, LockGuard, LockKind, LockOptions, Phase, PhaseName,
    Result, Stored, Version,
};

use crate::{
    commit::{guard, reindex},
    core::Core,
    decode::version_of,
    keys::Layout,
    kv::{Compare, Condition, KeyRange, KeyValue, Kv, Op, Txn},
    locks::{Blockers, LockWait, oldest_in_queue},
    owned_key::{OwnedKey, Subject},
    records,
    replica_cache::written,
};

impl<K: Kv> Core<K> {
    pub(crate) async fn begin_create(
        self: &Arc<Self>,
        challenge: &Stored<Challenge>,
        intent: &Instance,
        pool: Option<Version>,
        options: &LockOptions,
    ) -> Result<LockGuard> {
        let (layout, id) = (&self.layout, &challenge.value.id);
        let (key, bounds) = (&intent.key, challenge.value.bounds);
        let counted = bounds.min() > 0 && (key.assignment.is_pooled() || bounds.max() > 0);
        let mut wait = challenge_lock_wait(id, options);
        loop {
            let lease = self.lease().await?;
            let live = self.live_key(lease, options, layout.owner(key), None);
            let queue = layout.queue(LockKind::Challenge, id);
            let mut success = vec![live.put(), Op::put(layout.instance(key), records::write_instance(intent))];
            success.extend(layout.instance_index(intent).into_iter().map(|(key, value)| Op::put(key, value)));
            success.extend(counted.then(|| Op::put(layout.pool(id), "")));
            let mut compare = vec![
                Compare::mod_revision(layout.challenge(id), challenge.version.0),
                Compare::absent(layout.record_and_intent(key)),
                Compare::absent(KeyRange::key(layout.owner(key))),
                Compare::absent(queue.clone()),
            ];
            if let Some(version) = pool {
                compare.extend([Compare::exists(layout.pool(id)), Compare::mod_revision(layout.pool(id), version.0)]);
            }
            let failure = [
                Op::get(KeyRange::key(layout.owner(key))),
                oldest_in_queue(&queue),
                Op::get_keys(KeyRange::key(layout.pool(id))),
            ];
            let failure = failure.into_iter().chain(self.snapshot_ops(key)).collect();
            let subject = Subject::Instance(Box::new(intent.clone()));
            let (owned, mut response) = self.put_live(live, subject, Txn { compare, success, failure }, false).await?;
            if let Some(owned) = owned {
                return Ok(guard(self, LockKind::Instance, owned, wait.stats()));
            }
            let (owner, queued) = (response.next_read(), response.next_counted_read());
            let pool_version = version_of(&response.next_read());
            let (snapshot, _) = self.read_snapshot(key, &mut response)?;
            if snapshot.challenge.as_ref().map(|stored| stored.version) != Some(challenge.version)
                || snapshot.instance.is_some()
                || pool.is_some_and(|pool| pool_version != Some(pool))
            {
                self.refresh_cache(key, &snapshot);
                return Err(Error::Conflict);
            }
            wait.wait_for(self, Blockers::owner(owner).and_queue(queue, queued, response.revision)).await?;
        }
    }

    pub(crate) async fn claim(
        self: &Arc<Self>,
        challenge: &Stored<Challenge>,
        pooled: &Stored<Instance>,
        claimed: &Instance,
        options: &LockOptions,
    ) -> Result<Option<LockGuard>> {
        let (layout, id) = (&self.layout, &challenge.value.id);
        let (from, to) = (&pooled.value.key, &claimed.key);
        // So that no other call of this replica tries to claim the same instance.
        self.cache.remove_instance(from);
        let mut wait = challenge_lock_wait(id, options);
        let working = claimed.phase.is_working();
        loop {
            let lease = self.lease().await?;
            let live = self.live_key(lease, options, layout.owner(to), None);
            let queue = layout.queue(LockKind::Challenge, id);
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
                    mod_revision_at_most(layout.record_and_intent(from), pooled.version),
                    Compare::absent(KeyRange::key(layout.owner(from))),
                    Compare::absent(layout.record_and_intent(to)),
                    Compare::absent(KeyRange::key(layout.owner(to))),
                    Compare::absent(queue.clone()),
                ],
                success,
                failure: [
                    Op::get_keys(layout.record_and_intent(from)),
                    Op::get_keys(KeyRange::key(layout.owner(from))),
                    Op::get(KeyRange::key(layout.owner(to))),
                    oldest_in_queue(&queue),
                ]
                .into_iter()
                .chain(self.snapshot_ops(to))
                .collect(),
            };
            let mut response = if working {
                let subject = Subject::Instance(Box::new(claimed.clone()));
                match self.put_live(live, subject, txn, false).await? {
                    (Some(owned), _) => return Ok(Some(guard(self, LockKind::Instance, owned, wait.stats()))),
                    (None, response) => response,
                }
            } else {
                self.write(txn).await?
            };
            if response.succeeded {
                self.cache.put_instance(&written(claimed.clone(), response.revision));
                return Ok(None);
            }
            let pooled_changed = version_of(&response.next_read()) != Some(pooled.version);
            let pooled_owned = !response.next_read().is_empty();
            let (owner, queued) = (response.next_read(), response.next_counted_read());
            let (snapshot, _) = self.read_snapshot(to, &mut response)?;
            let changed = snapshot.challenge.as_ref().map(|stored| stored.version) != Some(challenge.version);
            if changed || pooled_changed || pooled_owned || snapshot.instance.is_some() {
                self.refresh_cache(to, &snapshot);
                return Err(Error::Conflict);
            }
            wait.wait_for(self, Blockers::owner(owner).and_queue(queue, queued, response.revision)).await?;
        }
    }

    pub(crate) async fn begin(
        self: &Arc<Self>,
        key: &InstanceKey,
        intent: Intent,
        options: &LockOptions,
    ) -> Result<(LockGuard, Instance)> {
        let layout = &self.layout;
        let mut wait = instance_wait(key, options);
        // A record whose intent key is there, which the next try replaces by one record without an intent key.
        let mut interrupted: Option<Stored<Instance>> = None;
        loop {
            let lease = self.lease().await?;
            let live = self.live_key(lease, options, layout.owner(key), None);
            let mut compare = vec![
                Compare::exists(layout.instance(key)),
                // A delayed request must not take an instance that was created after it was sent.
                Compare::create_revision_at_most(layout.instance(key), self.last_revision.load(Ordering::Relaxed)),
                Compare::absent(KeyRange::key(layout.owner(key))),
            ];
            let mut success = vec![Op::get(KeyRange::key(layout.working(key))), live.put()];
            match (&intent, interrupted.take()) {
                (Intent::Recover, _) => compare.push(Compare::exists(layout.working(key))),
                // The new intent is put beside the record, which need not be read.
                (Intent::Update(_) | Intent::Delete, None) => {
                    let target = if let Intent::Update(target) = &intent { Some(target) } else { None };
                    compare.push(Compare::absent(KeyRange::key(layout.intent(key))));
                    success.push(Op::put(layout.intent(key), records::write_intent(target)));
                    success.push(Op::put(layout.working(key), working_phase(&intent).name()));
                }
                (Intent::Update(_) | Intent::Delete, Some(before)) => {
                    compare.push(mod_revision_at_most(layout.record_and_intent(key), before.version));
                    let mut record = before.value;
                    apply_intent(&mut record, &intent);
                    success.push(Op::put(layout.instance(key), records::write_instance(&record)));
                    success.push(Op::delete(layout.intent(key)));
                    success.push(Op::put(layout.working(key), working_phase(&intent).name()));
                }
            }
            success.push(Op::get(layout.record_and_intent(key)));
            let failure = vec![
                Op::get(layout.record_and_intent(key)),
                Op::get(KeyRange::key(layout.owner(key))),
                Op::get_keys(KeyRange::key(layout.working(key))),
            ];
            // Replaced by the instance once its record is read.
            let subject = Subject::Lock(LockKind::Instance, key.challenge.clone());
            let (owned, mut response) = self.put_live(live, subject, Txn { compare, success, failure }, false).await?;
            if let Some(mut owned) = owned {
                let (working, whole) = (response.next_read(), response.next_read());
                let phase = working.first().map(|kv| Layout::parse_working(&kv.value));
                if matches!(intent, Intent::Update(_)) && phase == Some(PhaseName::Deleting) {
                    self.undo_begin(owned, key, working).await?;
                    return Err(Error::Conflict);
                }
                let instance = match self.read_instance(key, &whole) {
                    Ok(Some(stored)) => stored.value,
                    Ok(None) => return Err(Error::Conflict),
                    Err(_) if intent == Intent::Recover => {
                        // Logs the record once.
                        let _ = self.readable(&whole);
                        return Err(Error::Conflict);
                    }
                    Err(error) => {
                        self.undo_begin(owned, key, working).await?;
                        return Err(error);
                    }
                };
                owned.subject = Subject::Instance(Box::new(instance.clone()));
                return Ok((guard(self, LockKind::Instance, owned, wait.stats()), instance));
            }
            let (whole, owner, working) = (response.next_read(), response.next_read(), response.next_read());
            if whole.is_empty() || (intent == Intent::Recover && (!owner.is_empty() || working.is_empty())) {
                return Err(Error::Conflict);
            }
            if owner.is_empty() && intent != Intent::Recover {
                let found = self.read_instance(key, &whole)?;
                let deleting = found.as_ref().is_some_and(|found| found.value.phase == Phase::Deleting);
                if deleting && matches!(intent, Intent::Update(_)) {
                    return Err(Error::Conflict);
                }
                // Without an intent key, the instance was created after `last_revision`: the next try compares with that.
                interrupted = found.filter(|_| whole.len() > 1);
            }
            wait.wait_for(self, Blockers::owner(owner)).await?;
        }
    }

    pub(crate) async fn rewrite(
        self: &Arc<Self>,
        read: &Stored<Instance>,
        instance: &Instance,
        options: &LockOptions,
    ) -> Result<()> {
        let (layout, key) = (&self.layout, &read.value.key);
        if instance.key != *key {
            return Err(Error::Internal(format!("the record of {key:?} cannot be rewritten as {:?}", instance.key)));
        }
        let mut wait = instance_wait(key, options);
        let old_index = layout.instance_index(&read.value);
        loop {
            let mut success =
                vec![Op::put(layout.instance(key), records::write_instance(instance)), Op::delete(layout.intent(key))];
            success.extend(reindex(old_index.clone(), layout.instance_index(instance)));
            let txn = Txn {
                compare: vec![
                    Compare::exists(layout.instance(key)),
                    mod_revision_at_most(layout.record_and_intent(key), read.version),
                    Compare::absent(KeyRange::key(layout.owner(key))),
                ],
                success,
                failure: [Op::get(KeyRange::key(layout.owner(key)))]
                    .into_iter()
                    .chain(self.snapshot_ops(key))
                    .collect(),
            };
            let mut response = self.write(txn).await?;
            if response.succeeded {
                self.cache.put_instance(&written(instance.clone(), response.revision));
                return Ok(());
            }
            let owner = response.next_read();
            if owner.is_empty() {
                self.refresh_cache(key, &self.read_snapshot(key, &mut response)?.0);
                return Err(Error::Conflict);
            }
            wait.wait_for(self, Blockers::owner(owner)).await?;
        }
    }

    /// Undoes an intent that was put beside a record which proved unreadable or is being deleted, and releases the ownership. After a crash
    /// before this, the intent stands, and is carried out by a version that can read the record.
    async fn undo_begin(self: &Arc<Self>, owned: OwnedKey, key: &InstanceKey, working: Vec<KeyValue>) -> Result<()> {
        let layout = &self.layout;
        let mut success = vec![Op::delete(&owned.live.key), Op::delete(layout.intent(key))];
        success.push(match working.into_iter().next() {
            Some(before) => Op::put(before.key, before.value),
            None => Op::delete(layout.working(key)),
        });
        let txn = Txn { compare: vec![owned.still_owned()], success, failure: Vec::new() };
        self.finish(owned, txn, |_| None).await.map(|_| ())
    }
}

/// A wait by a call that cannot proceed while a challenge's lock is held.
fn challenge_lock_wait(id: &ChallengeId, options: &LockOptions) -> LockWait {
    LockWait::new(options, LockKind::Challenge, id, || format!("the challenge lock of {id:?}"))
}

/// A wait for the owner of an instance.
fn instance_wait(key: &InstanceKey, options: &LockOptions) -> LockWait {
    let what = || format!("the instance {:?} of {:?}", key.assignment, key.challenge);
    LockWait::new(options, LockKind::Instance, &key.challenge, what)
}

fn mod_revision_at_most(range: KeyRange, version: Version) -> Compare {
    Compare { range, condition: Condition::ModRevisionAtMost(version.0) }
}

fn working_phase(intent: &Intent) -> PhaseName {
    if *intent == Intent::Delete { PhaseName::Deleting } else { PhaseName::Updating }
}

fn apply_intent(instance: &mut Instance, intent: &Intent) {
    match intent {
        Intent::Update(target) => {
            instance.phase = Phase::Updating;
            instance.target = Some(target.clone());
        }
        Intent::Delete => instance.phase = Phase::Deleting,
        Intent::Recover => {}
    }
}
