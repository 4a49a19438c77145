//! What the store promises, as tests that run on every backend.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod budget;
mod faults;
mod instances;
mod locks;
#[path = "../../simulation/tests/etcd.rs"]
#[allow(dead_code, unreachable_pub, reason = "the simulation uses the rest")]
mod model;
#[path = "../benches/coordination/nothing.rs"]
pub(crate) mod nothing;
mod queries;
mod rig;
mod versions;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::TryStreamExt as _;
use gauntlet_domain::{
    Assignment, Challenge, ChallengeId, Error, Failure, Identity, Instance, InstanceKey, Intent, LockKind, LockOptions,
    Operation, Outcome, Phase, PhaseName, Pinned, PoolBounds, Rollout, SourceId, Store as _, Stored, Strategy, Target,
    Unfinished, Version,
};
use jiff::Timestamp;
use rig::{Fault, Rig, Tested};

use crate::{Coordination, kv::Kv as _, kv::Op, kv::Txn, records, scan::Scan};

/// Runs each test on each backend.
macro_rules! contract {
    ($($area:ident { $($name:ident),+ $(,)? })+) => {
        mod embedded {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::rig::EmbeddedRig::start()).await;
                }
            )+)+
        }
        /// On the etcd that managers are simulated on.
        mod simulated {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::rig::SimulatedRig::start()).await;
                }
            )+)+
        }
        mod etcd {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$area::$name(&super::rig::EtcdRig::start()).await;
                }
            )+)+
        }
    };
}

contract! {
    locks {
        a_free_lock_is_taken_at_once,
        a_lock_is_handed_on_in_order_of_asking,
        a_lock_never_reenters,
        locks_of_different_challenges_and_kinds_do_not_meet,
        who_waits_learns_who_held,
        who_waits_can_be_asked,
        patience_ends_with_busy_and_leaves_no_key,
        names_are_used_again,
        a_lock_goes_on_here_while_its_key_is_removed,
        without_patience_nothing_queues,
        a_cancelled_acquire_leaves_nothing,
        a_dropped_lock_is_given_up,
        a_lock_is_shared_by_replicas,
        fences_grow,
        who_holds_a_contended_lock_is_alone,
    }
    instances {
        a_seat_is_taken_once,
        a_changed_challenge_conflicts,
        a_create_waits_for_the_challenge_lock,
        an_instance_begins_only_in_the_pool_that_was_counted,
        creates_beside_a_pool_without_an_upper_bound_do_not_hold_it_up,
        a_create_that_waits_reads_some_of_those_ahead,
        closing_and_creating_never_miss_each_other,
        a_pooled_instance_is_claimed_once,
        a_claim_with_values_is_owned,
        a_claim_of_what_changed_conflicts,
        a_delete_takes_the_instance_as_it_is,
        an_update_sets_the_target,
        an_owner_is_waited_for,
        what_an_owner_left_is_kept_by_the_next,
        what_was_being_deleted_is_not_updated,
        a_rewrite_needs_the_version_it_read,
        a_rewrite_waits_for_the_owner,
        nothing_begins_where_nothing_is,
        a_dropped_ownership_is_given_up,
        a_cancelled_begin_leaves_no_owner,
    }
    queries {
        a_challenge_is_inserted_once,
        a_challenge_changes_under_its_lock,
        a_challenge_with_instances_is_not_removed,
        a_survey_answers_all_at_once,
        a_survey_finds_the_ready_behind_the_others,
        all_is_listed_over_many_pages,
        challenges_come_in_order_with_their_instances,
        a_source_finds_its_own,
        the_expired_are_found,
        a_list_is_of_one_revision,
        a_list_goes_on_where_its_revision_is_compacted,
        a_census_counts,
        pools_are_found,
        a_pool_is_counted_by_its_keys,
        the_unreadable_hides_no_other,
        a_hundred_pages_are_listed_one_at_a_time,
        any_text_is_an_id,
        a_sweep_costs_what_has_expired,
        a_store_is_named_once,
    }
    versions {
        a_newer_instance_is_left_alone,
        a_newer_pooled_instance_counts,
        a_newer_challenge_is_left_alone,
    }
    faults {
        a_lost_lease_cannot_commit,
        a_lost_lease_is_noticed_and_replaced,
        the_first_to_meet_a_lost_lease_goes_on_under_the_next,
        a_crash_leaves_work_that_is_found,
        a_failure_is_found_when_it_is_due,
        an_unfinished_rollout_is_found,
        an_unknown_commit_is_resolved,
        a_commit_that_stays_unknown_is_left_to_recovery,
        an_unknown_acquisition_is_given_up,
        an_acquisition_that_comes_to_be_late_is_given_up,
        a_late_deletion_leaves_what_was_created_since,
        a_guard_commits_only_what_it_locks,
        shutdown_gives_up_what_is_owned,
        a_dropped_store_gives_up_what_it_owned,
        a_lease_that_is_not_kept_alive_runs_out,
        what_a_lost_lease_holds_goes_though_no_revoke_succeeds,
        a_lost_lease_is_replaced_while_it_is_revoked,
        shutdown_does_not_wait_for_a_hung_keep_alive,
        shutdown_waits_for_writes_under_way,
    }
    budget {
        each_operation_keeps_its_budget,
        each_use_case_keeps_its_budget,
        a_commit_that_was_resolved_costs_nothing_later,
        what_is_remembered_is_never_trusted,
        a_thousand_waiters_share_one_watch,
    }
}

pub(crate) fn id(text: &str) -> ChallengeId {
    ChallengeId::new(text).unwrap()
}

fn source(text: &str) -> SourceId {
    SourceId::new(text).unwrap()
}

pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn pinned() -> Pinned {
    Pinned { reference: "registry.test/web:1".to_owned(), digest: format!("sha256:{}", "ab".repeat(32)) }
}

pub(crate) fn challenge(name: &str) -> Challenge {
    Challenge {
        id: id(name),
        scenario: pinned(),
        timeout: Some(Duration::from_secs(60)),
        until: None,
        additional: BTreeMap::new(),
        bounds: PoolBounds::default(),
        revision: 1,
        content_revision: 1,
        rollout: None,
        deleting: false,
        traceparent: None,
    }
}

pub(crate) fn instance_key(challenge: &str, name: &str) -> InstanceKey {
    InstanceKey { challenge: id(challenge), assignment: Assignment::Source(source(name)) }
}

fn pooled_key(challenge: &str, bits: u64) -> InstanceKey {
    InstanceKey { challenge: id(challenge), assignment: Assignment::Pool(Identity::from_bits(bits)) }
}

pub(crate) fn instance(key: InstanceKey, phase: Phase) -> Instance {
    let identity = match &key.assignment {
        Assignment::Pool(identity) => identity.clone(),
        Assignment::Source(_) => Identity::from_bits(7),
    };
    Instance {
        key,
        identity,
        phase,
        since: at(10),
        last_renew: at(10),
        until: Some(at(70)),
        scenario: pinned(),
        applied_revision: 1,
        additional: BTreeMap::new(),
        connection_info: String::new(),
        flags: Vec::new(),
        target: None,
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
    }
}

fn target(bits: u64) -> Target {
    Target { identity: Identity::from_bits(bits), scenario: pinned(), revision: 2, strategy: Strategy::BlueGreen }
}

/// Waits no longer than a test may take.
fn patient() -> LockOptions {
    LockOptions {
        traceparent: Some("00-11111111111111111111111111111111-2222222222222222-01".to_owned()),
        timeout: Duration::from_secs(30),
    }
}

fn at_once() -> LockOptions {
    LockOptions::default()
}

fn short() -> LockOptions {
    LockOptions { traceparent: None, timeout: Duration::from_millis(50) }
}

/// Polls until it holds; fails when it does not within half a minute.
async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[expect(private_bounds, reason = "for the tests here alone")]
impl<T: Tested> Coordination<T> {
    /// Every key there is.
    async fn all_keys(&self) -> Vec<String> {
        let all = Scan::keys(&self.core, self.core.layout.all_keys(), None).all().await.unwrap();
        all.into_iter().map(|kv| kv.key).collect()
    }

    /// The keys of who owns or waits.
    async fn live_keys(&self) -> Vec<String> {
        let all = Scan::keys(&self.core, self.core.layout.live(), None).all().await.unwrap();
        all.into_iter().map(|kv| kv.key).collect()
    }

    async fn stored(&self, name: &str) -> Stored<Challenge> {
        self.challenge(&id(name)).await.unwrap().unwrap()
    }

    async fn at(&self, key: &InstanceKey) -> Stored<Instance> {
        self.instance(key).await.unwrap().unwrap()
    }

    /// A challenge, stored.
    async fn with(&self, name: &str) -> Stored<Challenge> {
        self.insert_challenge(&challenge(name)).await.unwrap();
        self.stored(name).await
    }

    /// An instance, through its whole creation.
    async fn ready(&self, challenge: &Stored<Challenge>, key: InstanceKey) -> Stored<Instance> {
        let held =
            self.begin_create(challenge, &instance(key.clone(), Phase::Provisioning), None, &patient()).await.unwrap();
        let ready = instance(key.clone(), Phase::Ready);
        held.commit(Outcome::Put(Box::new(ready))).await.unwrap();
        self.at(&key).await
    }

    /// Stores instances as they are, and their index keys, without the steps.
    async fn put(&self, instances: &[Instance]) {
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

    /// Puts raw bytes in a key's place.
    async fn garble(&self, key: String, value: &str) {
        self.core.kv.txn(Txn { success: vec![Op::put(key, value)], ..Txn::default() }).await.unwrap();
    }

    /// Ends the lease behind the store's back, as if it had run out.
    async fn revoke(&self) {
        let lease = self.core.lease().await.unwrap();
        self.core.kv.revoke(lease.id).await.unwrap();
    }

    /// The index is what follows from the records, no more and no less; and nothing is owned.
    async fn check(&self) {
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
