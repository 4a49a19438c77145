use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Mutex,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use gauntlet_domain::{
    ChallengeId, Error, Identity, LaunchRequest, Outputs, Placement, PortSpec, ProvisionedInstance, Provisioner, Result,
};

use crate::gate::{Gate, Gates};

/// A call of the provisioner, as hooks see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvisionerCall {
    /// `reserve`, `up`, `update`, `down` or `list`.
    pub operation: &'static str,
    /// The instance, except for `list`.
    pub instance: Option<(ChallengeId, Identity)>,
}

impl ProvisionerCall {
    /// The challenge of the instance, except for `list`.
    pub fn challenge(&self) -> Option<&ChallengeId> {
        self.instance.as_ref().map(|(challenge, _)| challenge)
    }
}

/// An instance that the fake runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeInstance {
    /// The generation that launched it last.
    pub generation: u64,
    /// The digest of the scenario that it runs.
    pub digest: String,
    /// False once it has exited by itself.
    pub alive: bool,
}

/// How many `up` calls a challenge has had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaunchCounts {
    /// Under way now.
    pub current: usize,
    /// The most that were under way at once.
    pub peak: usize,
    /// All that began.
    pub total: usize,
}

type Hook = Box<dyn Fn(ProvisionerCall) -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// Runs instances as entries of a map, and refuses calls of a generation older than the last one it saw for the identity, as a real one does.
///
/// A call passes in this order: the gate of its operation ([`FakeProvisioner::hold`]), refusals ([`FakeProvisioner::refuse`]), the hook set by
/// [`FakeProvisioner::before`], its effect, and the hook set by [`FakeProvisioner::after`].
#[derive(Default)]
pub struct FakeProvisioner {
    state: Mutex<State>,
    gates: Gates,
    before: Option<Hook>,
    after: Option<Hook>,
}

#[derive(Default)]
struct State {
    instances: BTreeMap<(ChallengeId, Identity), FakeInstance>,
    /// The newest generation seen for each identity, those taken down included.
    generations: BTreeMap<(ChallengeId, Identity), u64>,
    refused: BTreeSet<&'static str>,
    launches: BTreeMap<ChallengeId, LaunchCounts>,
}

impl FakeProvisioner {
    /// Runs `hook` before a call has its effect; an error fails the call without the effect.
    #[must_use]
    pub fn before(
        self,
        hook: impl Fn(ProvisionerCall) -> BoxFuture<'static, Result<()>> + Send + Sync + 'static,
    ) -> Self {
        Self { before: Some(Box::new(hook)), ..self }
    }

    /// Runs `hook` after a call had its effect; an error fails the call all the same.
    #[must_use]
    pub fn after(
        self,
        hook: impl Fn(ProvisionerCall) -> BoxFuture<'static, Result<()>> + Send + Sync + 'static,
    ) -> Self {
        Self { after: Some(Box::new(hook)), ..self }
    }

    /// Refuses these operations (`reserve`, `up`, `update`, `down`, `list`) from now on, and no others: they fail with [`Error::Unavailable`].
    pub fn refuse(&self, operations: impl IntoIterator<Item = &'static str>) {
        self.state.lock().unwrap().refused = operations.into_iter().collect();
    }

    /// Stops the next call of this operation until the gate is opened.
    pub fn hold(&self, operation: &'static str) -> Gate {
        self.gates.close(operation)
    }

    /// Makes an instance exit by itself: it is listed, but not alive.
    ///
    /// # Panics
    /// When no instance of that identity runs.
    pub fn exit(&self, identity: &Identity) {
        let mut state = self.state.lock().unwrap();
        let instance =
            state.instances.iter_mut().find(|((_, of), _)| of == identity).expect("an instance of that identity");
        instance.1.alive = false;
    }

    /// Every instance that was launched and not taken down, those that exited included.
    pub fn instances(&self) -> BTreeMap<(ChallengeId, Identity), FakeInstance> {
        self.state.lock().unwrap().instances.clone()
    }

    /// The identities of the instances that are alive, and the digests of their scenarios.
    pub fn running(&self) -> Vec<(Identity, String)> {
        let state = self.state.lock().unwrap();
        let alive = state.instances.iter().filter(|(_, instance)| instance.alive);
        alive.map(|((_, identity), instance)| (identity.clone(), instance.digest.clone())).collect()
    }

    /// The `up` calls that a challenge has had.
    pub fn launches(&self, challenge: &ChallengeId) -> LaunchCounts {
        self.state.lock().unwrap().launches.get(challenge).copied().unwrap_or_default()
    }

    async fn call(
        &self,
        operation: &'static str,
        instance: Option<(ChallengeId, Identity)>,
        effect: impl FnOnce(&mut State) -> Result<()> + Send,
    ) -> Result<()> {
        self.gates.pass(operation).await;
        if self.state.lock().unwrap().refused.contains(operation) {
            return Err(Error::Unavailable { what: "provisioner", detail: format!("{operation} is refused") });
        }
        let call = ProvisionerCall { operation, instance };
        if let Some(before) = &self.before {
            before(call.clone()).await?;
        }
        effect(&mut self.state.lock().unwrap())?;
        match &self.after {
            Some(after) => after(call).await,
            None => Ok(()),
        }
    }

    async fn launch(&self, operation: &'static str, request: &LaunchRequest, keeps_running: bool) -> Result<Outputs> {
        let key = (request.challenge.clone(), request.identity.clone());
        let launch = |state: &mut State| {
            state.admit(&key, request.generation)?;
            let running = state.instances.get(&key).filter(|instance| instance.alive && keeps_running);
            let digest = running.map_or_else(|| request.digest.clone(), |instance| instance.digest.clone());
            state.instances.insert(key.clone(), FakeInstance { generation: request.generation, digest, alive: true });
            Ok(())
        };
        self.call(operation, Some(key.clone()), launch).await?;
        let flags = match request.plan.flags.as_slice() {
            [] => vec!["flag".to_owned()],
            flags => flags.to_vec(),
        };
        Ok(Outputs { connection_info: format!("http://{}.test", request.identity), flags })
    }
}

impl State {
    /// Notes the generation, unless a newer one was seen.
    fn admit(&mut self, key: &(ChallengeId, Identity), generation: u64) -> Result<()> {
        let newest = self.generations.entry(key.clone()).or_insert(generation);
        if *newest > generation {
            return Err(Error::Fenced(format!("instance {}", key.1)));
        }
        *newest = generation;
        Ok(())
    }
}

/// Counts an `up` call as under way until it returns or is dropped.
struct Launching<'a> {
    provisioner: &'a FakeProvisioner,
    challenge: &'a ChallengeId,
}

impl<'a> Launching<'a> {
    fn begin(provisioner: &'a FakeProvisioner, challenge: &'a ChallengeId) -> Self {
        let mut state = provisioner.state.lock().unwrap();
        let counts = state.launches.entry(challenge.clone()).or_default();
        counts.current += 1;
        counts.total += 1;
        counts.peak = counts.peak.max(counts.current);
        Self { provisioner, challenge }
    }
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        let mut state = self.provisioner.state.lock().unwrap();
        state.launches.entry(self.challenge.clone()).or_default().current -= 1;
    }
}

impl fmt::Debug for FakeProvisioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeProvisioner").field("instances", &self.instances()).finish_non_exhaustive()
    }
}

#[async_trait]
impl Provisioner for FakeProvisioner {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn reserve(
        &self,
        challenge: &ChallengeId,
        identity: &Identity,
        generation: u64,
        _: &[PortSpec],
    ) -> Result<Placement> {
        let key = (challenge.clone(), identity.clone());
        self.call("reserve", Some(key.clone()), |state| state.admit(&key, generation)).await?;
        Ok(Placement::default())
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        let _launching = Launching::begin(self, &request.challenge);
        self.launch("up", request, true).await
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.launch("update", request, false).await
    }

    async fn down(&self, challenge: &ChallengeId, identity: &Identity, generation: u64) -> Result<()> {
        let key = (challenge.clone(), identity.clone());
        let remove = |state: &mut State| {
            state.admit(&key, generation)?;
            state.instances.remove(&key);
            Ok(())
        };
        self.call("down", Some(key.clone()), remove).await
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        self.call("list", None, |_| Ok(())).await?;
        let found =
            |((challenge, identity), instance): (&(ChallengeId, Identity), &FakeInstance)| ProvisionedInstance {
                challenge: challenge.clone(),
                identity: identity.clone(),
                generation: instance.generation,
                alive: instance.alive,
            };
        Ok(self.state.lock().unwrap().instances.iter().map(found).collect())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use gauntlet_domain::LaunchPlan;

    use super::*;
    use crate::fixtures::challenge_id;

    fn request(generation: u64, digest: &str) -> LaunchRequest {
        LaunchRequest {
            challenge: challenge_id("web"),
            identity: Identity::from_bits(1),
            generation,
            digest: digest.to_owned(),
            placement: Placement::default(),
            plan: LaunchPlan::default(),
        }
    }

    #[tokio::test]
    async fn up_keeps_what_runs_and_update_replaces_it() {
        let fake = FakeProvisioner::default();
        fake.up(&request(1, "a")).await.unwrap();
        fake.up(&request(2, "b")).await.unwrap();
        let identity = Identity::from_bits(1);
        assert_eq!(fake.running(), [(identity.clone(), "a".to_owned())]);
        fake.update(&request(3, "b")).await.unwrap();
        assert_eq!(fake.running(), [(identity.clone(), "b".to_owned())]);
        fake.exit(&identity);
        assert_eq!(fake.running(), []);
        fake.up(&request(4, "c")).await.unwrap();
        assert_eq!(fake.running(), [(identity.clone(), "c".to_owned())]);
        fake.down(&challenge_id("web"), &identity, 5).await.unwrap();
        assert_eq!(fake.list().await.unwrap(), []);
        assert_eq!(fake.launches(&challenge_id("web")), LaunchCounts { current: 0, peak: 1, total: 3 });
    }

    #[tokio::test]
    async fn older_generations_change_nothing() {
        let fake = FakeProvisioner::default();
        let (web, identity) = (challenge_id("web"), Identity::from_bits(1));
        fake.up(&request(2, "a")).await.unwrap();
        assert!(matches!(fake.down(&web, &identity, 1).await, Err(Error::Fenced(_))));
        fake.down(&web, &identity, 3).await.unwrap();
        assert!(matches!(fake.up(&request(2, "a")).await, Err(Error::Fenced(_))));
        assert!(matches!(fake.reserve(&web, &identity, 2, &[]).await, Err(Error::Fenced(_))));
        assert!(fake.instances().is_empty());
    }

    #[tokio::test]
    async fn refusals_and_hooks_fail_calls() {
        let fail = |call: ProvisionerCall| async move { Err(Error::Internal(call.operation.to_owned())) }.boxed();
        let refused = FakeProvisioner::default();
        refused.refuse(["up"]);
        assert!(matches!(refused.up(&request(1, "a")).await, Err(Error::Unavailable { .. })));
        let before = FakeProvisioner::default().before(fail);
        assert_eq!(before.up(&request(1, "a")).await, Err(Error::Internal("up".to_owned())));
        assert!(before.instances().is_empty());
        let after = FakeProvisioner::default().after(fail);
        assert_eq!(after.up(&request(1, "a")).await, Err(Error::Internal("up".to_owned())));
        assert_eq!(after.instances().len(), 1);
    }
}
