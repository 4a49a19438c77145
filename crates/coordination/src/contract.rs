//! The contract of the store: tests that run on every backend.
//!
//! A backend implements [`fixture::Fixture`] and gets a module in the `contract!` macro below, which runs every test on it. There is no list of
//! exceptions: a backend keeps the whole contract.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod budget;
mod faults;
mod faulty_kv;
mod fixture;
mod instances;
mod locks;
#[path = "../../simulation/tests/etcd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the simulation uses the rest")]
mod model;
#[path = "../benches/coordination/noop.rs"]
pub(crate) mod noop;
mod queries;
mod versions;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use faulty_kv::{Fault, TestKv};
use fixture::Fixture;
use futures::TryStreamExt as _;
use gauntlet_domain::{
    Assignment, Challenge, ChallengeId, Error, Failure, Identity, Instance, InstanceKey, Intent, LockKind, LockOptions,
    Operation, Outcome, Phase, PhaseName, PoolBounds, Rollout, Store as _, Stored, Strategy, Target, Unfinished,
    Version,
};
use gauntlet_testing::{
    eventually,
    fixtures::{REFERENCE, challenge, challenge_id, instance, pinned, pool_key, source_id, source_key, timestamp},
};
use jiff::Timestamp;

use crate::{Coordination, kv::Kv as _, kv::Op, kv::Txn, records, scan::Scan};

/// Runs each test on each backend.
macro_rules! contract {
    ($($area:ident { $($name:ident),+ $(,)? })+) => {
        mod embedded {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::fixture::EmbeddedFixture::start()).await;
                }
            )+)+
        }
        /// The model of etcd that the simulation runs managers on.
        mod simulated {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::fixture::SimulatedFixture::start()).await;
                }
            )+)+
        }
        mod etcd {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::fixture::EtcdFixture::start()).await;
                }
            )+)+
        }
    };
}

contract! {
    locks {
        free_lock_is_acquired_without_waiting,
        lock_is_granted_in_request_order,
        lock_is_not_reentrant,
        locks_of_other_challenges_and_kinds_are_independent,
        waiter_learns_the_previous_holder,
        waits_and_queue_list_the_waiters,
        lock_timeout_returns_busy_and_leaves_no_key,
        key_slots_are_reused,
        local_waiter_gets_the_lock_before_its_key_is_removed,
        zero_lock_timeout_does_not_queue,
        cancelled_acquire_leaves_no_key,
        dropped_lock_is_released,
        lock_excludes_other_replicas,
        fencing_tokens_increase,
        contended_lock_has_one_holder,
    }
    instances {
        instance_key_is_created_once,
        create_with_a_stale_challenge_conflicts,
        create_waits_for_the_challenge_lock,
        refill_with_a_stale_count_conflicts,
        create_beside_an_unbounded_pool_keeps_its_version,
        waiting_create_reads_a_bounded_part_of_the_queue,
        deletion_and_create_never_miss_each_other,
        pooled_instance_is_claimed_once,
        claim_with_an_update_is_owned,
        claim_of_a_changed_instance_conflicts,
        delete_returns_the_current_instance,
        update_sets_the_target,
        begin_waits_for_the_owner,
        next_owner_keeps_the_abandoned_intent,
        instance_being_deleted_rejects_updates,
        rewrite_with_a_stale_version_conflicts,
        rewrite_waits_for_the_owner,
        begin_without_an_instance_conflicts,
        dropped_ownership_is_released,
        cancelled_begin_leaves_no_owner,
    }
    queries {
        challenge_is_inserted_once,
        challenge_is_updated_under_its_lock,
        challenge_with_instances_is_not_removed,
        snapshot_reads_challenge_instance_and_pool,
        snapshot_finds_ready_instances_behind_others,
        instances_are_listed_over_many_pages,
        challenges_are_listed_in_order_with_their_instances,
        source_lists_only_its_own_instances,
        expired_instances_are_found,
        listing_reads_one_revision,
        listing_continues_after_compaction,
        census_counts_by_challenge_phase_and_pool,
        pools_are_listed,
        pool_is_counted_by_its_keys,
        unreadable_records_hide_no_others,
        listing_of_many_pages_holds_one_at_a_time,
        any_text_is_a_valid_id,
        sweep_cost_depends_on_expired_instances_only,
        store_id_is_set_once,
    }
    versions {
        newer_instance_record_is_left_alone,
        newer_pooled_instance_record_counts,
        newer_challenge_record_is_left_alone,
    }
    faults {
        lost_lease_rejects_commits,
        lost_lease_is_noticed_and_replaced,
        acquire_under_a_lost_lease_retries_under_the_next,
        unfinished_work_of_a_crash_is_found,
        failed_instance_is_unfinished_once_its_retry_is_due,
        unfinished_rollout_is_found,
        ambiguous_commit_is_resolved,
        commit_that_stays_ambiguous_is_left_to_recovery,
        ambiguous_acquisition_is_released,
        late_acquisition_is_released,
        late_deletion_spares_a_newer_instance,
        guard_commits_only_what_it_locks,
        shutdown_releases_ownerships,
        dropped_store_releases_ownerships,
        lease_without_keepalive_expires,
        keys_of_a_lost_lease_expire_although_revoking_fails,
        lost_lease_is_replaced_before_its_revocation_returns,
        shutdown_does_not_wait_for_a_hung_keepalive,
        shutdown_waits_for_writes_in_progress,
    }
    budget {
        operations_stay_within_budget,
        use_cases_stay_within_budget,
        resolved_commit_adds_no_later_calls,
        stale_cache_is_never_trusted,
        waiters_share_one_watch,
    }
}

/// An update to the scenario of [`REFERENCE`].
fn target(bits: u64) -> Target {
    Target {
        identity: Identity::from_bits(bits),
        scenario: pinned(REFERENCE),
        revision: 2,
        strategy: Strategy::BlueGreen,
    }
}

/// A lock timeout that no test reaches.
fn long_timeout() -> LockOptions {
    LockOptions {
        traceparent: Some("00-11111111111111111111111111111111-2222222222222222-01".to_owned()),
        timeout: Duration::from_secs(30),
    }
}

/// No waiting at all.
fn no_timeout() -> LockOptions {
    LockOptions::default()
}

/// A lock timeout that ends soon.
fn short_timeout() -> LockOptions {
    LockOptions { traceparent: None, timeout: Duration::from_millis(50) }
}

#[expect(private_bounds, reason = "used by these tests only")]
impl<T: TestKv> Coordination<T> {
    /// Every stored key.
    async fn all_keys(&self) -> Vec<String> {
        let all = Scan::keys(&self.core, self.core.layout.all_keys(), None).all().await.unwrap();
        all.into_iter().map(|kv| kv.key).collect()
    }

    /// The keys of owners and waiters.
    async fn live_keys(&self) -> Vec<String> {
        let all = Scan::keys(&self.core, self.core.layout.live(), None).all().await.unwrap();
        all.into_iter().map(|kv| kv.key).collect()
    }

    async fn stored_challenge(&self, name: &str) -> Stored<Challenge> {
        self.challenge(&challenge_id(name)).await.unwrap().unwrap()
    }

    async fn stored_instance(&self, key: &InstanceKey) -> Stored<Instance> {
        self.instance(key).await.unwrap().unwrap()
    }

    /// Stores a challenge.
    async fn add_challenge(&self, name: &str) -> Stored<Challenge> {
        self.insert_challenge(&challenge(name)).await.unwrap();
        self.stored_challenge(name).await
    }

    /// Creates an instance, with all the steps of a create.
    async fn add_ready_instance(&self, challenge: &Stored<Challenge>, key: InstanceKey) -> Stored<Instance> {
        let guard = self
            .begin_create(challenge, &instance(key.clone(), Phase::Provisioning), None, &long_timeout())
            .await
            .unwrap();
        let ready = instance(key.clone(), Phase::Ready);
        guard.commit(Outcome::Put(Box::new(ready))).await.unwrap();
        self.stored_instance(&key).await
    }

    /// Stores instances and their index keys directly, without the steps of a create.
    async fn put_instances(&self, instances: &[Instance]) {
        for some in instances.chunks(30) {
            let layout = &self.core.layout;
            let mut success = Vec::new();
            for instance in some {
                success.push(Op::put(layout.instance(&instance.key), records::write_instance(instance)));
                success.extend(layout.instance_index(instance).into_iter().map(|(key, value)| Op::put(key, value)));
            }
            self.core.kv.txn(Txn { success, ..Txn::default() }).await.unwrap();
        }
    }

    /// Overwrites a key with raw bytes.
    async fn put_raw(&self, key: String, value: &str) {
        self.core.kv.txn(Txn { success: vec![Op::put(key, value)], ..Txn::default() }).await.unwrap();
    }

    /// Revokes the lease without the replica's knowledge, as if it had expired.
    async fn revoke_lease(&self) {
        let lease = self.core.lease().await.unwrap();
        self.core.kv.revoke(lease.id).await.unwrap();
    }

    /// Asserts that no ownership is left and that the index matches the records exactly.
    async fn check_invariants(&self) {
        eventually("nothing is owned", || async { self.live_keys().await.is_empty() }).await;
        let layout = &self.core.layout;
        let mut expected = BTreeSet::new();
        let all: Vec<_> = self.challenges().try_collect().await.unwrap();
        for (challenge, instances) in all {
            expected.insert(layout.challenge(&challenge.id));
            expected.extend(layout.challenge_index(&challenge).into_iter().filter(|(_, has)| *has).map(|(key, _)| key));
            for instance in instances {
                expected.insert(layout.instance(&instance.key));
                expected.extend(layout.instance_index(&instance).into_iter().map(|(key, _)| key));
            }
        }
        let intent = |key: &str| layout.parse_instance(key).is_some_and(|(_, intent)| intent);
        let found: BTreeSet<String> = self.all_keys().await.into_iter().filter(|key| !intent(key)).collect();
        assert_eq!(found, expected);
    }
}

fn keys_of(instances: &[Stored<Instance>]) -> BTreeSet<InstanceKey> {
    instances.iter().map(|stored| stored.value.key.clone()).collect()
}
