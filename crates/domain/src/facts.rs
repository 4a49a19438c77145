//! What happened, as typed facts: the one place from which counters are fed.

use crate::{ChallengeId, Error};

/// What was done to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Brought up, or claimed.
    Create,
    /// Given more time.
    Renew,
    /// Moved to another scenario or other values.
    Update,
    /// Taken down.
    Delete,
}

impl Operation {
    /// Its name on metrics and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Renew => "renew",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OperationOutcome {
    /// As asked.
    Ok,
    /// The request could not be granted.
    Refused(&'static str),
    /// A fault on our side.
    Failed(&'static str),
}

impl OperationOutcome {
    /// The outcome of a result.
    pub fn of<T>(result: &Result<T, Error>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(error) if error.is_fault() => Self::Failed(error.code()),
            Err(error) => Self::Refused(error.code()),
        }
    }

    /// Its name on metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused(_) => "refused",
            Self::Failed(_) => "failed",
        }
    }
}

/// The name of a phase, on metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PhaseName {
    /// Being brought up.
    Provisioning,
    /// Running.
    Ready,
    /// Being changed.
    Updating,
    /// Being taken down.
    Deleting,
    /// Waiting for another try.
    Failed,
}

impl PhaseName {
    /// Its text.
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

impl From<&crate::Phase> for PhaseName {
    fn from(phase: &crate::Phase) -> Self {
        match phase {
            crate::Phase::Provisioning => Self::Provisioning,
            crate::Phase::Ready => Self::Ready,
            crate::Phase::Updating => Self::Updating,
            crate::Phase::Deleting => Self::Deleting,
            crate::Phase::Failed(_) => Self::Failed,
        }
    }
}

/// What recovery did with work that a crash had left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecoveryAction {
    /// Finished it: the instance runs.
    Adopted,
    /// Undid it: nothing runs.
    TakenDown,
    /// Brought back what had ended by itself.
    Restarted,
}

impl RecoveryAction {
    /// Its name on metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adopted => "adopted",
            Self::TakenDown => "taken_down",
            Self::Restarted => "restarted",
        }
    }
}

/// Something that happened and is worth counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// An operation on an instance ended.
    InstanceOperation {
        /// The challenge.
        challenge: ChallengeId,
        /// What was done.
        operation: Operation,
        /// How it ended.
        outcome: OperationOutcome,
    },
    /// A create looked into a pool.
    PoolClaim {
        /// The challenge.
        challenge: ChallengeId,
        /// Whether one was there.
        hit: bool,
    },
    /// Recovery finished or undid what a crash had left.
    Recovered {
        /// The phase it was left in.
        phase: PhaseName,
        /// What was done.
        action: RecoveryAction,
    },
}

/// Where facts go. Must not block.
pub trait Facts: Send + Sync {
    /// Takes note of one.
    fn record(&self, fact: Fact);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_tells_the_callers_fault_from_ours() {
        let outcome = |result: Result<(), Error>| OperationOutcome::of(&result).name();
        assert_eq!(outcome(Ok(())), "ok");
        assert_eq!(outcome(Err(Error::InvalidUpdateMask(Vec::new()))), "refused");
        assert_eq!(outcome(Err(Error::Internal("disk".to_owned()))), "failed");
    }
}
