//! A rolling upgrade: a newer build writes records that this build cannot read.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeUpdate, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Result,
};

use super::{
    noop::{NoopProvisioner, call_now, gauntlet_with},
    *,
};

const NEWER: &str = r#"{"v":2,"shape":"of another kind"}"#;

/// A provisioner that lists fixed instances and records which ones are stopped.
struct ListingProvisioner {
    found: Vec<ProvisionedInstance>,
    stopped: Mutex<Vec<Identity>>,
}

#[async_trait]
impl Provisioner for ListingProvisioner {
    fn name(&self) -> &'static str {
        "listing"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        NoopProvisioner.up(request).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        NoopProvisioner.update(request).await
    }

    async fn down(&self, _: &ChallengeId, identity: &Identity, _: u64) -> Result<()> {
        self.stopped.lock().unwrap().push(identity.clone());
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        Ok(self.found.clone())
    }
}

impl ListingProvisioner {
    fn running(found: &[(&str, u64)]) -> Arc<Self> {
        let found = found.iter().map(|(challenge, bits)| ProvisionedInstance {
            challenge: challenge_id(challenge),
            identity: Identity::from_bits(*bits),
            generation: 1,
            alive: true,
        });
        Arc::new(Self { found: found.collect(), stopped: Mutex::default() })
    }

    fn stopped(&self) -> Vec<Identity> {
        std::mem::take(&mut self.stopped.lock().unwrap())
    }
}

fn instance_with(key: InstanceKey, phase: Phase, bits: u64) -> Instance {
    Instance { identity: Identity::from_bits(bits), ..instance(key, phase) }
}

#[expect(private_bounds, reason = "for the tests here alone")]
impl<T: TestKv> Coordination<T> {
    /// Every stored key and value, once no ownership is left.
    async fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        eventually("nothing is owned", || async { self.live_keys().await.is_empty() }).await;
        let all = Scan::values(&self.core, self.core.layout.all_keys(), None).all().await.unwrap();
        all.into_iter().map(|kv| (kv.key, kv.value)).collect()
    }

    /// Stores an instance as a newer build would.
    async fn put_newer(&self, instance: &Instance) {
        self.put_instances(std::slice::from_ref(instance)).await;
        self.put_raw(self.core.layout.instance(&instance.key), NEWER).await;
    }

    /// Deletes an instance as a newer build would.
    async fn remove_newer(&self, instance: &Instance) {
        let layout = &self.core.layout;
        let mut success = vec![Op::delete(layout.instance(&instance.key))];
        success.extend(layout.instance_index(instance).into_iter().map(|(key, _)| Op::delete(key)));
        self.core.kv.txn(Txn { success, ..Txn::default() }).await.unwrap();
    }
}

/// Asserts that the error names the record and asks for a newer build.
fn assert_names<T: std::fmt::Debug>(result: std::result::Result<T, Error>, key: &str) {
    match result {
        Err(Error::Internal(text)) => {
            assert!(text.contains(key) && text.contains("version 2") && text.contains("newer build"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

pub(super) async fn newer_instance_record_is_left_alone(fixture: &impl Fixture) {
    let store = Arc::new(fixture.replica("a"));
    let provisioner = ListingProvisioner::running(&[("web", 7), ("web", 9), ("other", 99)]);
    let gauntlet = gauntlet_with(store.clone(), provisioner.clone());
    let web = store.add_challenge("web").await;
    let alice = instance_with(source_key("web", "alice"), Phase::Ready, 7);
    let carol = instance_with(source_key("web", "carol"), Phase::Updating, 9);
    store.put_instances(&[instance_with(source_key("web", "bob"), Phase::Ready, 8)]).await;
    store.put_newer(&alice).await;
    store.put_newer(&carol).await;
    let before = store.contents().await;

    // Listings leave out these records and no others.
    let all: Vec<_> = gauntlet.query_instances(None).try_collect().await.unwrap();
    assert_eq!(all.iter().map(|instance| instance.key.clone()).collect::<Vec<_>>(), [source_key("web", "bob")]);
    let expired: Vec<_> = gauntlet.expired_instances(timestamp(5000)).try_collect().await.unwrap();
    assert_eq!(expired, all);
    assert_eq!(gauntlet.query_instances(Some(&source_id("alice"))).try_collect::<Vec<_>>().await.unwrap(), []);
    assert_eq!(gauntlet.retrieve_challenge(&challenge_id("web")).await.unwrap().1, all);

    // Every operation on these instances is rejected.
    let (web_id, who) = (challenge_id("web"), source_id("alice"));
    assert_names(gauntlet.create_instance(&call_now(), &web_id, &who, BTreeMap::new()).await, "web s alice");
    assert_names(gauntlet.retrieve_instance(&web_id, &who).await, "web s alice");
    assert_names(gauntlet.renew_instance(&call_now(), &web_id, &who).await, "web s alice");
    assert_names(gauntlet.delete_instance(&call_now(), &web_id, &who).await, "web s alice");
    assert_names(gauntlet.delete_instance(&call_now(), &web_id, &source_id("carol")).await, "web s carol");
    let intent = instance(source_key("web", "alice"), Phase::Provisioning);
    assert!(store.begin_create(&web, &intent, None, &long_timeout()).await.is_err());
    assert_eq!(store.contents().await, before);

    // Their resources are not orphans, and their work is not unfinished. A real orphan is removed.
    let done = gauntlet.reconcile(&call_now()).await.unwrap();
    assert_eq!((done.recovered, done.orphans_removed, done.failures.len()), (0, 1, 1), "{done:?}");
    assert_names(Err::<(), _>(done.failures[0].clone()), "web s alice");
    assert_eq!(provisioner.stopped(), [Identity::from_bits(99)]);
    assert_eq!(store.contents().await, before);

    // An update reaches the other instances, and its rollout stays recorded for these.
    let update = ChallengeUpdate { timeout: Some(None), ..ChallengeUpdate::default() };
    let updated = gauntlet.update_challenge(&call_now(), &web_id, update).await.unwrap();
    assert_eq!((updated.instances[0].applied_revision, updated.failures.len()), (2, 1));
    assert!(store.stored_challenge("web").await.value.rollout.is_some());

    // A deletion removes the other instances and keeps these.
    assert_names(gauntlet.delete_challenge(&call_now(), &web_id).await, "web s alice");
    assert_eq!(provisioner.stopped(), [Identity::from_bits(8)]);
    let left = store.contents().await;
    for key in [&alice.key, &carol.key] {
        assert_eq!(left[&store.core.layout.instance(key)], NEWER.as_bytes());
    }
    assert!(store.stored_challenge("web").await.value.deleting);

    // The deletion finishes once the newer build has removed its instances.
    store.remove_newer(&alice).await;
    store.remove_newer(&carol).await;
    let done = gauntlet.reconcile(&call_now()).await.unwrap();
    assert_eq!((done.resumed, done.failures.len()), (1, 0), "{done:?}");
    assert_eq!(store.challenge(&web_id).await.unwrap(), None);
    store.check_invariants().await;
}

pub(super) async fn newer_pooled_instance_record_counts(fixture: &impl Fixture) {
    let store = Arc::new(fixture.replica("a"));
    let gauntlet = gauntlet_with(store.clone(), ListingProvisioner::running(&[]));
    store.insert_challenge(&Challenge { bounds: PoolBounds::new(1, 1).unwrap(), ..challenge("web") }).await.unwrap();
    store.put_newer(&Instance { until: None, ..instance(pool_key("web", 1), Phase::Ready) }).await;
    let before = store.contents().await;
    gauntlet_testing::maintain_pool(&gauntlet, &call_now(), &challenge_id("web")).await.unwrap();
    assert_eq!(store.contents().await, before, "no second pooled instance");
}

pub(super) async fn newer_challenge_record_is_left_alone(fixture: &impl Fixture) {
    let store = Arc::new(fixture.replica("a"));
    let gauntlet = gauntlet_with(store.clone(), ListingProvisioner::running(&[("web", 7)]));
    store.add_challenge("web").await;
    store.put_instances(&[instance_with(source_key("web", "alice"), Phase::Updating, 7)]).await;
    store.put_raw(store.core.layout.challenge(&challenge_id("web")), NEWER).await;
    let before = store.contents().await;
    let web = challenge_id("web");
    assert_eq!(store.insert_challenge(&challenge("web")).await, Err(Error::ChallengeExists(web.clone())));
    assert_names(gauntlet.retrieve_challenge(&web).await, "challenges web");
    assert_names(
        gauntlet.create_instance(&call_now(), &web, &source_id("bob"), BTreeMap::new()).await,
        "challenges web",
    );
    assert_names(gauntlet.update_challenge(&call_now(), &web, ChallengeUpdate::default()).await, "challenges web");
    assert_names(gauntlet.delete_challenge(&call_now(), &web).await, "challenges web");
    let done = gauntlet.reconcile(&call_now()).await.unwrap();
    assert_eq!((done.recovered, done.orphans_removed), (0, 0), "{done:?}");
    assert_eq!(store.contents().await, before);
}
