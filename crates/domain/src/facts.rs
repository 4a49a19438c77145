//! What happened, as typed facts. All counters are fed from them.

use crate::{ChallengeId, Error, Operation, PhaseName};

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OperationOutcome {
    /// It succeeded.
    Ok,
    /// The request was refused; the error's code.
    Refused(&'static str),
    /// A fault of the server; the error's code.
    Failed(&'static str),
}

impl OperationOutcome {
    /// Returns the outcome that a result stands for.
    pub fn of<T>(result: &Result<T, Error>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(error) if error.is_fault() => Self::Failed(error.code()),
            Err(error) => Self::Refused(error.code()),
        }
    }

    /// The name on metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused(_) => "refused",
            Self::Failed(_) => "failed",
        }
    }
}

/// What recovery did with unfinished work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecoveryAction {
    /// It finished the work: the instance runs.
    Adopted,
    /// It undid the work: the instance's resources are removed.
    TakenDown,
    /// It restarted an instance that had exited by itself.
    Restarted,
}

impl RecoveryAction {
    /// The name on metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adopted => "adopted",
            Self::TakenDown => "taken_down",
            Self::Restarted => "restarted",
        }
    }
}

/// An event that is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// An operation on an instance ended.
    InstanceOperation {
        /// The challenge.
        challenge: ChallengeId,
        /// The operation.
        operation: Operation,
        /// How it ended.
        outcome: OperationOutcome,
    },
    /// A create took an instance from a pool, or found the pool empty.
    PoolClaim {
        /// The challenge.
        challenge: ChallengeId,
        /// Whether the pool had an instance.
        hit: bool,
    },
    /// An instance ended that had reached one of its limits.
    LimitReached {
        /// The challenge.
        challenge: ChallengeId,
        /// The limit's name in `scenario.yaml`.
        limit: &'static str,
    },
    /// Recovery finished or undid unfinished work on an instance.
    Recovered {
        /// The instance's phase before.
        phase: PhaseName,
        /// What recovery did.
        action: RecoveryAction,
    },
}

/// The port to whatever counts facts.
pub trait Facts: Send + Sync {
    /// Records a fact. Must not block.
    fn record(&self, fact: Fact);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_distinguishes_client_errors_from_server_faults() {
        let outcome = |result: Result<(), Error>| OperationOutcome::of(&result).name();
        assert_eq!(outcome(Ok(())), "ok");
        assert_eq!(outcome(Err(Error::InvalidUpdateMask(Vec::new()))), "refused");
        assert_eq!(outcome(Err(Error::Internal("disk".to_owned()))), "failed");
    }
}
