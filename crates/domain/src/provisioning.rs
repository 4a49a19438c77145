//! Work on the resources of an instance that this replica owns: launch, update, tear down. Every function here ends with a commit under the
//! instance's lock guard. The use cases and recovery share them.

use crate::{
    Additional, Call, Challenge, ChallengeId, Error, Failure, Gauntlet, Identity, Instance, InstanceKey, Intent,
    LaunchRequest, LockGuard, Operation, Outcome, Outputs, Phase, Pinned, PreparedScenario, Result, Strategy, Target,
    expiry,
};

/// How often an instance is launched while other programs take its ports.
const MAX_LAUNCH_ATTEMPTS: usize = 3;

/// A launch that is ready to run.
struct Launch {
    /// Kept to render again if a port is taken.
    prepared: PreparedScenario,
    request: LaunchRequest,
}

/// What to do with an instance that already runs under the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LaunchMode {
    /// Keep it.
    KeepRunning,
    /// Replace it if it runs from another plan.
    ReplaceRunning,
}

/// What to do with an instance whose update failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UpdateFallback {
    /// Tear it down: nobody has used it yet.
    TearDown,
    /// Keep it ready with its old resources if the update did not change them; otherwise as [`UpdateFallback::Retry`].
    KeepOld,
    /// Mark it failed and retry later: nobody knows how far the update got.
    Retry,
}

/// A failed update.
struct UpdateFailure {
    error: Error,
    /// Whether the old resources still run as before, and no others do.
    old_intact: bool,
}

impl From<Error> for UpdateFailure {
    fn from(error: Error) -> Self {
        Self { error, old_intact: false }
    }
}

impl Gauntlet {
    /// Launches an instance whose intent is recorded, waits until it is ready, and commits it. On failure, removes its resources and its
    /// record.
    pub(crate) async fn provision(
        &self,
        call: &Call,
        guard: LockGuard,
        challenge: &Challenge,
        mut instance: Instance,
    ) -> Result<Instance> {
        let launch = self.launch(&guard, challenge, &instance, &instance.identity, &instance.scenario);
        match guard.run(launch).await {
            Ok(outputs) => {
                instance.mark_ready(outputs);
                self.commit_instance(guard, instance).await
            }
            // The replica that recovers the instance decides what becomes of it.
            Err(error @ Error::Fenced(_)) => Err(error),
            Err(error) => Err(self.undo_create(call, guard, instance, error).await),
        }
    }

    /// Tears down what a failed create launched. Returns why the create failed and, if the tear-down failed too, both reasons: the operator
    /// needs both.
    async fn undo_create(&self, call: &Call, guard: LockGuard, instance: Instance, error: Error) -> Error {
        match self.tear_down(call, guard, instance, Operation::Create).await {
            Ok(()) => error,
            Err(fenced @ Error::Fenced(_)) => fenced,
            Err(undo) => {
                let detail =
                    format!("{error}; removing the incomplete instance failed too and will be retried: {undo}");
                Error::Provision { step: "undo", detail }
            }
        }
    }

    /// Removes all resources of an instance, then its record. On failure the record stays, marked as failed during `during`.
    pub(crate) async fn tear_down(
        &self,
        call: &Call,
        guard: LockGuard,
        mut instance: Instance,
        during: Operation,
    ) -> Result<()> {
        match guard.run(self.remove_resources(&guard, &instance)).await {
            Ok(()) => guard.commit(Outcome::Remove).await,
            Err(error @ Error::Fenced(_)) => Err(error),
            Err(error) => {
                if during == Operation::Create {
                    // No client has seen the instance, and none may see it now: see `Instance::is_visible`.
                    instance.connection_info.clear();
                    instance.flags.clear();
                }
                Err(self.commit_failure(call, guard, instance, during, error).await)
            }
        }
    }

    /// Deletes a stored instance, after waiting for its owner. Succeeds if the instance is gone by then.
    pub(crate) async fn delete_by_key(&self, call: &Call, key: InstanceKey) -> Result<()> {
        let options = self.deadline(call).lock_options(call);
        let result = match self.store.begin(&key, Intent::Delete, &options).await {
            Err(Error::Conflict) => return Ok(()),
            Err(error) => Err(error),
            Ok((guard, instance)) => self.tear_down(call, guard, instance, Operation::Delete).await,
        };
        self.record_operation(&key.challenge, Operation::Delete, result)
    }

    /// Moves an instance to its target by the target's strategy, and commits it. On failure, does what `fallback` says.
    pub(crate) async fn apply_update(
        &self,
        call: &Call,
        guard: LockGuard,
        challenge: &Challenge,
        mut instance: Instance,
        fallback: UpdateFallback,
    ) -> Result<Instance> {
        let Some(target) = instance.target.clone() else {
            return Err(Error::Internal(format!("instance {} is updating without a target", instance.identity)));
        };
        let update = async {
            Ok(match target.strategy {
                Strategy::UpdateInPlace => self.update_in_place(&guard, challenge, &instance, &target).await,
                Strategy::BlueGreen => self.replace_blue_green(&guard, challenge, &instance, &target).await,
                Strategy::Recreate => self.recreate(&guard, challenge, &instance, &target).await,
            })
        };
        match guard.run(update).await? {
            Ok(outputs) => {
                instance.apply_target(target);
                instance.mark_ready(outputs);
                self.commit_instance(guard, instance).await
            }
            Err(UpdateFailure { error: error @ Error::Fenced(_), .. }) => Err(error),
            Err(UpdateFailure { error, old_intact }) => match fallback {
                UpdateFallback::TearDown => Err(self.undo_create(call, guard, instance, error).await),
                UpdateFallback::KeepOld if old_intact => {
                    // `applied_revision` stays behind the challenge's revision, so that the next update tries again.
                    instance.phase = Phase::Ready;
                    instance.target = None;
                    self.commit_instance(guard, instance).await?;
                    Err(error)
                }
                UpdateFallback::KeepOld | UpdateFallback::Retry => {
                    Err(self.commit_failure(call, guard, instance, Operation::Update, error).await)
                }
            },
        }
    }

    /// Changes the running resources.
    async fn update_in_place(
        &self,
        guard: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        target: &Target,
    ) -> Result<Outputs, UpdateFailure> {
        let launch = self
            .prepare_launch(guard, challenge, instance, &target.identity, &target.scenario)
            .await
            .map_err(|error| UpdateFailure { error, old_intact: true })?;
        let outputs = self.run_launch(launch, LaunchMode::ReplaceRunning).await?;
        // Another update may have given the instance a new identity after this target was chosen.
        if instance.identity != target.identity {
            self.remove_identity(guard, instance, &instance.identity).await?;
        }
        Ok(outputs)
    }

    /// Launches the new resources, then removes the old ones.
    async fn replace_blue_green(
        &self,
        guard: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        target: &Target,
    ) -> Result<Outputs, UpdateFailure> {
        match self.launch(guard, challenge, instance, &target.identity, &target.scenario).await {
            Ok(outputs) => {
                self.remove_identity(guard, instance, &instance.identity).await?;
                Ok(outputs)
            }
            Err(error @ Error::Fenced(_)) => Err(error.into()),
            Err(error) => {
                let undone = self.remove_identity(guard, instance, &target.identity).await;
                Err(UpdateFailure { error, old_intact: undone.is_ok() })
            }
        }
    }

    /// Removes the old resources, then launches the new ones.
    async fn recreate(
        &self,
        guard: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        target: &Target,
    ) -> Result<Outputs, UpdateFailure> {
        self.remove_resources(guard, instance).await?;
        Ok(self.launch(guard, challenge, instance, &target.identity, &target.scenario).await?)
    }

    async fn launch(
        &self,
        guard: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        identity: &Identity,
        scenario: &Pinned,
    ) -> Result<Outputs> {
        let launch = self.prepare_launch(guard, challenge, instance, identity, scenario).await?;
        self.run_launch(launch, LaunchMode::KeepRunning).await
    }

    /// Prepares the scenario, reserves its ports and renders its plan. Does not disturb what runs under the identity.
    async fn prepare_launch(
        &self,
        guard: &LockGuard,
        challenge: &Challenge,
        instance: &Instance,
        identity: &Identity,
        scenario: &Pinned,
    ) -> Result<Launch> {
        let additional = challenge.merge_additional(&instance.additional);
        let prepared = self.scenarios.prepare(scenario, identity, instance.flag_key.as_deref(), &additional).await?;
        let request = self.reserve_and_render(&prepared, &challenge.id, guard.token).await?;
        Ok(Launch { prepared, request })
    }

    /// Reserves the ports of a prepared scenario and renders its plan for them.
    async fn reserve_and_render(
        &self,
        prepared: &PreparedScenario,
        challenge: &ChallengeId,
        generation: u64,
    ) -> Result<LaunchRequest> {
        let identity = &prepared.identity;
        let placement = self.provisioner.reserve(challenge, identity, generation, &prepared.ports).await?;
        let plan = self.scenarios.render(prepared, &placement).await?;
        Ok(LaunchRequest {
            challenge: challenge.clone(),
            identity: identity.clone(),
            generation,
            digest: prepared.scenario.digest.clone(),
            placement,
            plan,
        })
    }

    /// Launches an instance. If another program takes one of its ports, reserves another port and tries again.
    async fn run_launch(&self, launch: Launch, mode: LaunchMode) -> Result<Outputs> {
        let Launch { prepared, mut request } = launch;
        let mut attempt = 1;
        loop {
            let launched = match mode {
                LaunchMode::KeepRunning => self.provisioner.up(&request).await,
                LaunchMode::ReplaceRunning => self.provisioner.update(&request).await,
            };
            match launched {
                Err(Error::PortTaken { .. }) if attempt < MAX_LAUNCH_ATTEMPTS => {}
                launched => return launched,
            }
            attempt += 1;
            request = self.reserve_and_render(&prepared, &request.challenge, request.generation).await?;
        }
    }

    /// Removes the resources of every identity that the instance may have.
    async fn remove_resources(&self, guard: &LockGuard, instance: &Instance) -> Result<()> {
        for identity in instance.identities() {
            self.remove_identity(guard, instance, identity).await?;
        }
        Ok(())
    }

    async fn remove_identity(&self, guard: &LockGuard, instance: &Instance, identity: &Identity) -> Result<()> {
        self.provisioner.down(&instance.key.challenge, identity, guard.token).await
    }

    async fn commit_instance(&self, guard: LockGuard, instance: Instance) -> Result<Instance> {
        guard.commit(Outcome::Put(Box::new(instance.clone()))).await?;
        Ok(instance)
    }

    /// Marks an instance as failed and schedules the next retry. Returns the error to report: `error`, or why it could not be recorded.
    async fn commit_failure(
        &self,
        call: &Call,
        guard: LockGuard,
        mut instance: Instance,
        during: Operation,
        error: Error,
    ) -> Error {
        let (since, attempts) = match &instance.phase {
            Phase::Failed(before) => (before.since, before.attempts.saturating_add(1)),
            _ => (call.now, 1),
        };
        let delay = self
            .settings
            .retry_initial_delay
            .saturating_mul(1 << attempts.saturating_sub(1).min(16))
            .min(self.settings.retry_max_delay);
        let retry_at = expiry(call.now, Some(call.jitter(delay)), None).unwrap_or(call.now);
        instance.phase = Phase::Failed(Failure { during, reason: error.to_string(), since, attempts, retry_at });
        match self.commit_instance(guard, instance).await {
            Ok(_) => error,
            Err(unrecorded) => unrecorded,
        }
    }
}

/// A new instance of a challenge, still to be launched: without an expiry, without template values of its own.
pub(crate) fn new_instance(
    call: &Call,
    challenge: &Challenge,
    key: InstanceKey,
    identity: Identity,
    flag_key: Option<String>,
) -> Instance {
    Instance {
        key,
        identity,
        phase: Phase::Provisioning,
        since: call.now,
        last_renew: call.now,
        until: None,
        scenario: challenge.scenario.clone(),
        applied_revision: challenge.revision,
        additional: Additional::new(),
        connection_info: String::new(),
        flags: Vec::new(),
        flag_key,
        target: None,
        traceparent: call.traceparent.clone(),
    }
}
