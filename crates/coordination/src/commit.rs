//! Commits: the transactions that write an outcome and release the lock in one step.

use std::sync::Arc;

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_domain::{
    Challenge, ChallengeId, Change, Error, LockGuard, LockKind, Outcome, Ownership, Result, WaitStats,
};

use crate::{
    core::Core,
    decode::written_at,
    kv::{Compare, KeyRange, KeyValue, Kv, KvError, Op, Txn, TxnResponse},
    owned_key::{OwnedKey, Subject},
    records,
    replica_cache::written,
};

/// The adapter's side of a [`LockGuard`].
struct Owned<K: Kv> {
    core: Arc<Core<K>>,
    key: OwnedKey,
}

/// A guard of `key`.
pub(crate) fn guard<K: Kv>(core: &Arc<Core<K>>, kind: LockKind, key: OwnedKey, waited: WaitStats) -> LockGuard {
    LockGuard::new(kind, key.token, waited, Box::new(Owned { core: core.clone(), key }))
}

#[async_trait]
impl<K: Kv> Ownership for Owned<K> {
    fn lost(&self) -> BoxFuture<'static, ()> {
        self.key.live.lease.lost().boxed()
    }

    async fn commit(self: Box<Self>, change: Change) -> Result<()> {
        let Self { core, key } = *self;
        match change {
            Change::None => core.release(key).await,
            Change::UpdateChallenge(challenge) => core.update_challenge(key, *challenge).await,
            Change::RemoveChallenge => core.remove_challenge(key).await,
            Change::Instance(outcome) => core.commit_instance(key, outcome).await,
        }
    }
}

impl<K: Kv> Core<K> {
    async fn release(self: &Arc<Self>, key: OwnedKey) -> Result<()> {
        if key.live.lease.is_lost() {
            // The key goes with the lease, and every write under it was fenced by its own transaction.
            return Ok(());
        }
        if key.is_unused() {
            // No write under this lock is in flight, so a waiter of this replica need not wait for the deletion.
            self.watch_cache.mark_releasing(&key.live.key, key.token);
        }
        let txn = key.deletion();
        // A refused deletion means that the key is gone already.
        self.finish(key, txn, |_| Some(0)).await.map(|_| ())
    }

    async fn update_challenge(self: &Arc<Self>, key: OwnedKey, challenge: Challenge) -> Result<()> {
        let id = locked_challenge(&key)?;
        if *id != challenge.id {
            return Err(Error::Internal(format!("{} cannot write the challenge {:?}", key.subject, challenge.id)));
        }
        let layout = &self.layout;
        let record_key = layout.challenge(id);
        let record = records::write_challenge(&challenge);
        let mut success = vec![Op::put(&record_key, record.clone()), Op::delete(&key.live.key)];
        success.extend(
            layout
                .challenge_index(&challenge)
                .into_iter()
                .map(|(key, indexed)| if indexed { Op::put(key, "") } else { Op::delete(key) }),
        );
        let txn = Txn {
            compare: vec![key.still_owned(), Compare::exists(&record_key)],
            success,
            failure: vec![Op::get(KeyRange::key(&record_key)), Op::get_keys(KeyRange::key(&key.live.key))],
        };
        let token = key.token;
        let applied = move |reads: &[Vec<KeyValue>]| written_at(reads.first()?, &record);
        let mut response = self.finish(key, txn, applied).await?;
        if response.succeeded {
            self.cache.put_challenge(&written(challenge, response.revision));
            return Ok(());
        }
        let stored = !response.next_read().is_empty();
        let owned = response.next_read().first().is_some_and(|kv| kv.create_revision == token);
        Err(if owned && !stored { Error::ChallengeNotFound(challenge.id) } else { fenced(LockKind::Challenge, token) })
    }

    async fn remove_challenge(self: &Arc<Self>, key: OwnedKey) -> Result<()> {
        let id = locked_challenge(&key)?.clone();
        let layout = &self.layout;
        let record_key = layout.challenge(&id);
        let mut success = vec![Op::delete(&record_key), Op::delete(&key.live.key)];
        success.extend(layout.all_challenge_index(&id).map(Op::delete));
        let txn = Txn {
            compare: vec![key.still_owned(), Compare::absent(layout.instances_of(&id))],
            success,
            failure: vec![Op::get_keys(KeyRange::key(&record_key)), Op::get_keys(KeyRange::key(&key.live.key))],
        };
        let token = key.token;
        let removed = |reads: &[Vec<KeyValue>]| reads.first()?.is_empty().then_some(0);
        let mut response = self.finish(key, txn, removed).await?;
        if response.succeeded {
            self.cache.remove_challenge(&id);
            return Ok(());
        }
        let _record = response.next_read();
        let owned = response.next_read().first().is_some_and(|kv| kv.create_revision == token);
        Err(if owned { Error::Conflict } else { fenced(LockKind::Challenge, token) })
    }

    async fn commit_instance(self: &Arc<Self>, key: OwnedKey, outcome: Outcome) -> Result<()> {
        let layout = &self.layout;
        let before = match &key.subject {
            Subject::Instance(before) => before,
            other => return Err(Error::Internal(format!("{other} cannot commit an instance"))),
        };
        let instance_key = before.key.clone();
        let record_key = layout.instance(&instance_key);
        let old_index = layout.instance_index(before);
        let mut success = vec![Op::delete(&key.live.key), Op::delete(layout.intent(&instance_key))];
        let record = match &outcome {
            Outcome::Remove => {
                success.push(Op::delete(&record_key));
                success.extend(old_index.into_iter().map(|(key, _)| Op::delete(key)));
                None
            }
            Outcome::Put(instance) if instance.key == instance_key => {
                let record = records::write_instance(instance);
                success.push(Op::put(&record_key, record.clone()));
                success.extend(reindex(old_index, layout.instance_index(instance)));
                Some(record)
            }
            Outcome::Put(instance) => {
                return Err(Error::Internal(format!("{} cannot write {:?}", key.subject, instance.key)));
            }
        };
        let token = key.token;
        let failure = vec![Op::get(layout.record_and_intent(&instance_key))];
        let txn = Txn { compare: vec![key.still_owned()], success, failure };
        let applied = move |reads: &[Vec<KeyValue>]| match &record {
            None => reads.first()?.is_empty().then_some(0),
            Some(record) => written_at(reads.first()?, record),
        };
        let response = self.finish(key, txn, applied).await?;
        if !response.succeeded {
            return Err(fenced(LockKind::Instance, token));
        }
        match outcome {
            Outcome::Put(instance) => self.cache.put_instance(&written(*instance, response.revision)),
            Outcome::Remove => self.cache.remove_instance(&instance_key),
        }
        Ok(())
    }

    /// Runs the transaction that releases an owned key. If its outcome is unknown it is run once more, which is safe because it can succeed
    /// only once. If it is refused then, `applied` tells from the reads of the failure branch at which revision the first run succeeded, if
    /// it did.
    pub(crate) async fn finish(
        self: &Arc<Self>,
        key: OwnedKey,
        txn: Txn,
        applied: impl Fn(&[Vec<KeyValue>]) -> Option<u64> + Send + 'static,
    ) -> Result<TxnResponse> {
        if key.live.lease.is_lost() {
            return Err(match key.subject {
                Subject::Lock(kind, _) => fenced(kind, key.token),
                Subject::Instance(_) => fenced(LockKind::Instance, key.token),
            });
        }
        let core = self.clone();
        self.detached(async move {
            let response = match core.txn(txn.clone()).await {
                Err(KvError::Ambiguous(detail)) => {
                    tracing::warn!(detail, "the outcome of a commit is unknown, running it again");
                    core.txn(txn).await.map(|response| match applied(&response.reads) {
                        Some(revision) if !response.succeeded => TxnResponse { succeeded: true, revision, ..response },
                        _ => response,
                    })
                }
                response => response,
            };
            // On an error the reaper deletes the key, and reconciliation finds the unfinished work.
            let response = response.map_err(|error| core.error(error))?;
            if response.succeeded {
                core.mark_deleted(&key);
            }
            Ok(response)
        })
        .await
    }
}

/// The challenge whose own lock `key` is.
fn locked_challenge(key: &OwnedKey) -> Result<&ChallengeId> {
    match &key.subject {
        Subject::Lock(LockKind::Challenge, id) => Ok(id),
        other => Err(Error::Internal(format!("{other} cannot write a challenge"))),
    }
}

/// The lock was lost.
pub(crate) fn fenced(kind: LockKind, token: u64) -> Error {
    Error::Fenced(format!("{} (token {token})", kind.name()))
}

/// Replaces old index keys by new ones. Touches no key twice, and none that stays the same.
pub(crate) fn reindex(old: Vec<(String, String)>, new: Vec<(String, String)>) -> Vec<Op> {
    let stale = old.iter().filter(|(key, _)| !new.iter().any(|(kept, _)| kept == key));
    let mut ops: Vec<Op> = stale.map(|(key, _)| Op::delete(key)).collect();
    ops.extend(new.into_iter().filter(|entry| !old.contains(entry)).map(|(key, value)| Op::put(key, value)));
    ops
}
