//! An instance: one running copy of a challenge, claimed by a source or waiting in the pool.

use jiff::Timestamp;

use crate::{Additional, ChallengeId, Identity, Outputs, Pinned, SourceId};

/// The key under which an instance is stored: one for each pair of challenge and source, and one for each pooled instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceKey {
    /// The challenge.
    pub challenge: ChallengeId,
    /// Who has the instance.
    pub assignment: Assignment,
}

/// Who has an instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Assignment {
    /// A source has claimed it.
    Source(SourceId),
    /// It waits in the pool. The identity is the instance's first one: an update may give its resources another.
    Pool(Identity),
}

impl Assignment {
    /// The source that has claimed the instance.
    pub fn source(&self) -> Option<&SourceId> {
        match self {
            Self::Source(source) => Some(source),
            Self::Pool(_) => None,
        }
    }

    /// Whether the instance waits in the pool.
    pub fn is_pooled(&self) -> bool {
        matches!(self, Self::Pool(_))
    }
}

/// An instance, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The key under which it is stored.
    pub key: InstanceKey,
    /// The label of its resources.
    pub identity: Identity,
    /// What is being done with it, or what went wrong.
    pub phase: Phase,
    /// When it was created or claimed.
    pub since: Timestamp,
    /// When it was last renewed; at first, when it was created or claimed.
    pub last_renew: Timestamp,
    /// When it expires; never if `None`.
    pub until: Option<Timestamp>,
    /// The scenario that it runs.
    pub scenario: Pinned,
    /// The last revision of the challenge that was applied to it.
    pub applied_revision: u64,
    /// Its own template values, which override the challenge's.
    pub additional: Additional,
    /// How players reach it.
    pub connection_info: String,
    /// The flags that solve it. Secret.
    pub flags: Vec<String>,
    /// The id of the key that its flags are derived from, for as long as it exists; `None` if an earlier build created it.
    pub flag_key: Option<String>,
    /// An update that has been recorded and not yet applied.
    pub target: Option<Target>,
    /// The trace of the call that created it, in W3C traceparent form.
    pub traceparent: Option<String>,
}

/// What an update will make of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The label of its resources after the update. A new one if the update replaces them.
    pub identity: Identity,
    /// The scenario that it will run.
    pub scenario: Pinned,
    /// The revision of the challenge that it will have applied.
    pub revision: u64,
    /// How the update reaches it.
    pub strategy: Strategy,
}

/// How an update reaches a running instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Changes the running resources.
    #[default]
    UpdateInPlace,
    /// Launches the new resources, then removes the old ones.
    BlueGreen,
    /// Removes the old resources, then launches the new ones.
    Recreate,
}

/// What is being done with an instance. In a working phase (provisioning, updating, deleting), a replica owns the instance, or its owner
/// crashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Being launched for the first time.
    Provisioning,
    /// Running.
    Ready,
    /// On its way to its [`Target`].
    Updating,
    /// Being deleted.
    Deleting,
    /// An operation failed and will be retried.
    Failed(Failure),
}

/// A failed operation on an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The operation that failed.
    pub during: Operation,
    /// Why it failed, for operators.
    pub reason: String,
    /// When it failed first.
    pub since: Timestamp,
    /// How many attempts have failed.
    pub attempts: u32,
    /// When the next attempt is due.
    pub retry_at: Timestamp,
}

/// An operation on an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Create: launched, or claimed from a pool.
    Create,
    /// Renew: its timeout was restarted.
    Renew,
    /// Update: moved to another scenario or other template values.
    Update,
    /// Delete: its resources and its record were removed.
    Delete,
}

impl Operation {
    /// The name on metrics and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Renew => "renew",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// A phase without its details: its name on metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PhaseName {
    /// As [`Phase::Provisioning`].
    Provisioning,
    /// As [`Phase::Ready`].
    Ready,
    /// As [`Phase::Updating`].
    Updating,
    /// As [`Phase::Deleting`].
    Deleting,
    /// As [`Phase::Failed`].
    Failed,
}

impl PhaseName {
    /// The text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::Ready => "ready",
            Self::Updating => "updating",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
        }
    }
}

impl From<&Phase> for PhaseName {
    fn from(phase: &Phase) -> Self {
        match phase {
            Phase::Provisioning => Self::Provisioning,
            Phase::Ready => Self::Ready,
            Phase::Updating => Self::Updating,
            Phase::Deleting => Self::Deleting,
            Phase::Failed(_) => Self::Failed,
        }
    }
}

impl Phase {
    /// Whether an operation is under way, or was when its owner crashed.
    pub fn is_working(&self) -> bool {
        matches!(self, Self::Provisioning | Self::Updating | Self::Deleting)
    }
}

impl Instance {
    /// Whether the instance has expired at `now`.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// Whether clients of the v1 API see the instance: it is claimed, and its source has been given it.
    pub fn is_visible(&self) -> bool {
        !self.key.assignment.is_pooled()
            && self.phase != Phase::Provisioning
            && (self.phase == Phase::Ready || self.was_handed_out())
    }

    /// Whether this is the rest of a create that failed and could not be undone.
    pub(crate) fn is_failed_create(&self) -> bool {
        matches!(self.phase, Phase::Failed(_)) && !self.was_handed_out()
    }

    /// Whether the source was ever given the instance: only then is it known how to reach it.
    fn was_handed_out(&self) -> bool {
        !self.connection_info.is_empty() || !self.flags.is_empty()
    }

    pub(crate) fn mark_ready(&mut self, outputs: Outputs) {
        self.connection_info = outputs.connection_info;
        self.flags = outputs.flags;
        self.phase = Phase::Ready;
    }

    pub(crate) fn apply_target(&mut self, target: Target) {
        self.identity = target.identity;
        self.scenario = target.scenario;
        self.applied_revision = target.revision;
        self.target = None;
    }

    /// Every identity that the instance's resources may have: the current one and, during an update, the new one.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        let next = self.target.as_ref().map(|target| &target.identity).filter(|next| **next != self.identity);
        std::iter::once(&self.identity).chain(next)
    }
}
