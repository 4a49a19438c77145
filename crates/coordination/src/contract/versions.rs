//! A rolling upgrade: beside this build a newer one writes records that this one cannot read.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use gauntlet_domain::{
    ChallengeUpdate, Gauntlet, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Result,
    Settings,
};

use super::{
    nothing::{Nothing, call},
    *,
};

const NEWER: &str = r#"{"v":2,"shape":"of another kind"}"#;

/// A machine on which this runs, and what was taken down.
struct Machine {
    found: Vec<ProvisionedInstance>,
    downs: Mutex<Vec<Identity>>,
}

#[async_trait]
impl Provisioner for Machine {
    fn name(&self) -> &'static str {
        "machine"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        Nothing.up(request).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        Nothing.update(request).await
    }

    async fn down(&self, _: &ChallengeId, identity: &Identity, _: u64) -> Result<()> {
        self.downs.lock().unwrap().push(identity.clone());
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        Ok(self.found.clone())
    }
}

impl Machine {
    fn running(found: &[(&str, u64)]) -> Arc<Self> {
        let found = found.iter().map(|(challenge, bits)| ProvisionedInstance {
            challenge: id(challenge),
            identity: Identity::from_bits(*bits),
            generation: 1,
            alive: true,
        });
        Arc::new(Self { found: found.collect(), downs: Mutex::default() })
    }

    fn downs(&self) -> Vec<Identity> {
        std::mem::take(&mut self.downs.lock().unwrap())
    }
}

fn on<T: Tested>(store: &Arc<Coordination<T>>, machine: &Arc<Machine>) -> Gauntlet {
    Gauntlet::new(store.clone(), machine.clone(), Arc::new(Nothing), Arc::new(Nothing), Settings::default())
}

fn instance_with(key: InstanceKey, phase: Phase, bits: u64) -> Instance {
    Instance { identity: Identity::from_bits(bits), ..instance(key, phase) }
}

#[expect(private_bounds, reason = "for the tests here alone")]
impl<T: Tested> Coordination<T> {
    /// What is stored, once nothing is owned.
    async fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        eventually("nothing is owned", || async { self.live_keys().await.is_empty() }).await;
        let all = Scan::values(&self.core, self.core.layout.all_keys(), None).all().await.unwrap();
        all.into_iter().map(|kv| (kv.key, kv.value)).collect()
    }

    /// Stores an instance as a newer build would.
    async fn put_newer(&self, instance: &Instance) {
        self.put(std::slice::from_ref(instance)).await;
        self.garble(self.core.layout.instance(&instance.key), NEWER).await;
    }

    /// Removes it, as a newer build would.
    async fn remove_newer(&self, instance: &Instance) {
        let layout = &self.core.layout;
        let mut success = vec![Op::delete(layout.instance(&instance.key))];
        success.extend(layout.instance_index(instance).into_iter().map(|(key, _)| Op::delete(key)));
        self.core.kv.txn(Txn { success, ..Txn::default() }).await.unwrap();
    }
}

/// The error says which record, and that a newer build can read it.
fn names<T: std::fmt::Debug>(result: std::result::Result<T, Error>, key: &str) {
    match result {
        Err(Error::Internal(text)) => {
            assert!(text.contains(key) && text.contains("version 2") && text.contains("newer build"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

pub(super) async fn a_newer_instance_is_left_alone(rig: &impl Rig) {
    let store = Arc::new(rig.replica("a"));
    let machine = Machine::running(&[("web", 7), ("web", 9), ("other", 99)]);
    let gauntlet = on(&store, &machine);
    let web = store.with("web").await;
    let alice = instance_with(instance_key("web", "alice"), Phase::Ready, 7);
    let carol = instance_with(instance_key("web", "carol"), Phase::Updating, 9);
    store.put(&[instance_with(instance_key("web", "bob"), Phase::Ready, 8)]).await;
    store.put_newer(&alice).await;
    store.put_newer(&carol).await;
    let before = store.contents().await;

    // Queries leave them out, and only them.
    let all: Vec<_> = gauntlet.query_instances(None).try_collect().await.unwrap();
    assert_eq!(all.iter().map(|instance| instance.key.clone()).collect::<Vec<_>>(), [instance_key("web", "bob")]);
    let expired: Vec<_> = gauntlet.expired_instances(at(5000)).try_collect().await.unwrap();
    assert_eq!(expired, all);
    assert_eq!(gauntlet.query_instances(Some(&source("alice"))).try_collect::<Vec<_>>().await.unwrap(), []);
    assert_eq!(gauntlet.retrieve_challenge(&id("web")).await.unwrap().1, all);

    // Their seats are taken, whatever is asked for.
    let (web_id, who) = (id("web"), source("alice"));
    names(gauntlet.create_instance(&call(), &web_id, &who, BTreeMap::new()).await, "web s alice");
    names(gauntlet.retrieve_instance(&web_id, &who).await, "web s alice");
    names(gauntlet.renew_instance(&call(), &web_id, &who).await, "web s alice");
    names(gauntlet.delete_instance(&call(), &web_id, &who).await, "web s alice");
    names(gauntlet.delete_instance(&call(), &web_id, &source("carol")).await, "web s carol");
    let intent = instance(instance_key("web", "alice"), Phase::Provisioning);
    assert!(store.begin_create(&web, &intent, None, &patient()).await.is_err());
    assert_eq!(store.contents().await, before);

    // Nothing of theirs is taken for an orphan, nor its work for unfinished; what is an orphan goes.
    let done = gauntlet.reconcile(&call()).await.unwrap();
    assert_eq!((done.recovered, done.orphans_removed, done.failures.len()), (0, 1, 1), "{done:?}");
    names(Err::<(), _>(done.failures[0].clone()), "web s alice");
    assert_eq!(machine.downs(), [Identity::from_bits(99)]);
    assert_eq!(store.contents().await, before);

    // An update reaches the others, and stays on record for those that it did not reach.
    let update = ChallengeUpdate { timeout: Some(None), ..ChallengeUpdate::default() };
    let updated = gauntlet.update_challenge(&call(), &web_id, update).await.unwrap();
    assert_eq!((updated.instances[0].applied_revision, updated.failures.len()), (2, 1));
    assert!(store.stored("web").await.value.rollout.is_some());

    // A deletion takes the others down and does not claim the rest.
    names(gauntlet.delete_challenge(&call(), &web_id).await, "web s alice");
    assert_eq!(machine.downs(), [Identity::from_bits(8)]);
    let left = store.contents().await;
    for key in [&alice.key, &carol.key] {
        assert_eq!(left[&store.core.layout.instance(key)], NEWER.as_bytes());
    }
    assert!(store.stored("web").await.value.deleting);

    // Once the newer build has done its part the deletion is finished.
    store.remove_newer(&alice).await;
    store.remove_newer(&carol).await;
    let done = gauntlet.reconcile(&call()).await.unwrap();
    assert_eq!((done.resumed, done.failures.len()), (1, 0), "{done:?}");
    assert_eq!(store.challenge(&web_id).await.unwrap(), None);
    store.check().await;
}

pub(super) async fn a_newer_pooled_instance_counts(rig: &impl Rig) {
    let store = Arc::new(rig.replica("a"));
    let gauntlet = on(&store, &Machine::running(&[]));
    store.insert_challenge(&Challenge { bounds: PoolBounds::new(1, 1).unwrap(), ..challenge("web") }).await.unwrap();
    store.put_newer(&Instance { until: None, ..instance(pooled_key("web", 1), Phase::Ready) }).await;
    let before = store.contents().await;
    gauntlet_testing::maintain_pool(&gauntlet, &call(), &id("web")).await.unwrap();
    assert_eq!(store.contents().await, before, "no second one");
}

pub(super) async fn a_newer_challenge_is_left_alone(rig: &impl Rig) {
    let store = Arc::new(rig.replica("a"));
    let gauntlet = on(&store, &Machine::running(&[("web", 7)]));
    store.with("web").await;
    store.put(&[instance_with(instance_key("web", "alice"), Phase::Updating, 7)]).await;
    store.garble(store.core.layout.challenge(&id("web")), NEWER).await;
    let before = store.contents().await;
    let web = id("web");
    assert_eq!(store.insert_challenge(&challenge("web")).await, Err(Error::ChallengeExists(web.clone())));
    names(gauntlet.retrieve_challenge(&web).await, "challenges web");
    names(gauntlet.create_instance(&call(), &web, &source("bob"), BTreeMap::new()).await, "challenges web");
    names(gauntlet.update_challenge(&call(), &web, ChallengeUpdate::default()).await, "challenges web");
    names(gauntlet.delete_challenge(&call(), &web).await, "challenges web");
    let done = gauntlet.reconcile(&call()).await.unwrap();
    assert_eq!((done.recovered, done.orphans_removed), (0, 0), "{done:?}");
    assert_eq!(store.contents().await, before);
}
