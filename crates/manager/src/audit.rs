//! The audit log: a record for every change that a caller makes or is refused, with the target [`TARGET`].

use gauntlet_domain::{ChallengeId, SourceId};

use crate::{
    caller::{Caller, Denial},
    peer::PeerAddress,
};

/// The target of the records. A log filter names it to keep them apart, or on: `LOG_LEVEL=warn,gauntlet::audit=info`.
pub(crate) const TARGET: &str = "gauntlet::audit";

/// What is changed.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// The method of the RPC.
    pub(crate) operation: &'static str,
    pub(crate) challenge: ChallengeId,
    /// For a change of an instance.
    pub(crate) source: Option<SourceId>,
}

impl Change {
    pub(crate) fn of_challenge(operation: &'static str, challenge: &ChallengeId) -> Self {
        Self { operation, challenge: challenge.clone(), source: None }
    }

    pub(crate) fn of_instance(operation: &'static str, challenge: &ChallengeId, source: &SourceId) -> Self {
        Self { operation, challenge: challenge.clone(), source: Some(source.clone()) }
    }

    /// Records how the change ended: `ok` or the code of the error.
    fn record(&self, caller: &Caller, outcome: &'static str) {
        let source = self.source.as_ref().map(SourceId::as_str);
        record(caller, self.operation, Some(self.challenge.as_str()), source, outcome);
    }

    /// Checks that the caller may make the change now, and returns the record of the change, which is written when it ends. A refusal is recorded at
    /// once.
    pub(crate) fn begin(self, caller: &Caller) -> Result<Pending, Denial> {
        let checked = caller
            .check(&self.challenge)
            .and_then(|()| self.source.as_ref().map_or(Ok(()), |source| caller.count_change(source)));
        let record = Pending { change: self, caller: caller.clone(), outcome: "INTERRUPTED" };
        match checked {
            Ok(()) => Ok(record),
            Err(denial) => {
                record.end(denial.code());
                Err(denial)
            }
        }
    }
}

/// A change that has begun. Is recorded when it is dropped, so that a change that panics or is cut off at shutdown is recorded too.
pub(crate) struct Pending {
    change: Change,
    caller: Caller,
    outcome: &'static str,
}

impl Pending {
    pub(crate) fn end(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.change.record(&self.caller, self.outcome);
    }
}

/// Records a change that was refused before its message was read.
pub(crate) fn record_refusal(caller: &Caller, operation: &'static str, outcome: &'static str) {
    record(caller, operation, None, None, outcome);
}

fn record(
    caller: &Caller,
    operation: &'static str,
    challenge: Option<&str>,
    source: Option<&str>,
    outcome: &'static str,
) {
    let principal = &caller.principal;
    let token_id = principal.kind.token_id().map(|id| id.to_string());
    tracing::info!(
        target: TARGET,
        {
            enduser.id = principal.name.as_str(),
            access.kind = principal.kind.as_str(),
            access.token_id = token_id,
            client.address = address(caller.address),
            access.operation = operation,
            challenge.id = challenge,
            source.id = source,
            outcome,
        },
        "change"
    );
}

/// The address of a peer without its port, which says nothing about who it is.
pub(crate) fn address(address: PeerAddress) -> String {
    match address {
        PeerAddress::Tcp(address) => address.ip().to_canonical().to_string(),
        unix @ PeerAddress::Unix { .. } => unix.to_string(),
    }
}
