//! Which limits an instance reached.

use std::{fmt, io, sync::Arc, time::Duration};

use gauntlet_domain::{ChallengeId, Fact, Facts, Limits};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{
    cgroup::Usage,
    instance_dir::InstanceDir,
    record::{self, End, Exit, STATE, State},
};

/// An instance that waited for more than this part of its run has reached its share of the CPU.
const THROTTLED_PART: u32 = 10;

/// A limit that an instance reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exceeded {
    /// A process was killed because the instance's memory was full.
    Memory,
    /// A process or thread was not created because there were too many.
    Processes,
    /// Processes waited for a large part of the run because the share of the CPU was used up.
    CpuQuota,
    /// The program used up the CPU time of a process.
    Cpu,
    /// The program was ended because a file became too large.
    Disk,
}

impl Exceeded {
    /// The limit's name in `scenario.yaml` and in telemetry.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Processes => "processes",
            Self::CpuQuota => "cpu_quota",
            Self::Cpu => "cpu",
            Self::Disk => "disk",
        }
    }

    /// With the limit's value, for the operator.
    fn describe(self, limits: &Limits) -> String {
        let name = self.name();
        let (value, unit) = match self {
            Self::Memory => (limits.memory, " bytes"),
            Self::Processes => (limits.processes, ""),
            Self::CpuQuota => (limits.cpu_quota, "%"),
            Self::Cpu => (limits.cpu_seconds, "s"),
            Self::Disk => (limits.disk, " bytes"),
        };
        value.map_or(name.to_owned(), |value| format!("{name} ({value}{unit})"))
    }
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Returns the limits that were reached, by what an instance used and how its program exited.
fn exceeded(usage: &Usage, exit: Option<Exit>, ran_for: Duration) -> Vec<Exceeded> {
    let by = |signal: Signal| exit == Some(Exit::Signal(signal.as_raw()));
    [
        (usage.oom_kills > 0, Exceeded::Memory),
        (usage.forks_refused > 0, Exceeded::Processes),
        (usage.throttled * THROTTLED_PART > ran_for, Exceeded::CpuQuota),
        (by(Signal::XCPU), Exceeded::Cpu),
        (by(Signal::XFSZ), Exceeded::Disk),
    ]
    .into_iter()
    .filter_map(|(reached, limit)| reached.then_some(limit))
    .collect()
}

/// Adds the limits that were reached to the end of an instance, and to its reason.
pub(super) fn explain(end: &mut End, limits: &Limits) {
    end.exceeded = exceeded(&end.usage, end.exit, end.ran_for);
    if !end.exceeded.is_empty() {
        let reached: Vec<_> = end.exceeded.iter().map(|limit| limit.describe(limits)).collect();
        end.reason = format!("{}; it reached its limits: {}", end.reason, reached.join(", "));
    }
}

/// Counts the limits that instances reached.
#[derive(Clone, Default)]
pub(super) struct Reporter(Option<Arc<dyn Facts>>);

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "facts" } else { "no facts" })
    }
}

impl Reporter {
    pub(super) fn new(facts: Arc<dyn Facts>) -> Self {
        Self(Some(facts))
    }

    /// Reports how an instance ended on the current span, and counts the limits that it reached, once for each end, however often it is reported.
    /// The instance has no supervisor. Blocks.
    pub(super) fn report(&self, instance: &InstanceDir, mut state: State) -> io::Result<()> {
        let Some(end) = &mut state.end else { return Ok(()) };
        let exceeded: Vec<_> = end.exceeded.iter().map(|limit| limit.name()).collect();
        let span = tracing::Span::current();
        span.record("instance.end", &end.reason);
        if exceeded.is_empty() || std::mem::replace(&mut end.counted, true) {
            return Ok(());
        }
        let limits = exceeded.join(",");
        span.record("instance.exceeded", &limits);
        tracing::warn!(
            instance.identity = instance.identity(),
            instance.exceeded = limits,
            reason = end.reason,
            "an instance reached its limits"
        );
        if let (Some(facts), Ok(challenge)) = (&self.0, ChallengeId::new(instance.challenge())) {
            for limit in exceeded {
                facts.record(Fact::LimitReached { challenge: challenge.clone(), limit });
            }
        }
        record::write(&instance.dir, STATE, &state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reached_limits_are_named_with_their_values() {
        let limits = Limits { memory: Some(1 << 20), cpu_quota: Some(50), ..Limits::default() };
        let mut end =
            End { reason: "was ended by signal 9".to_owned(), ran_for: Duration::from_secs(5), ..End::default() };
        explain(&mut end, &limits);
        assert_eq!((end.reason.as_str(), end.exceeded.len()), ("was ended by signal 9", 0));
        end.usage = Usage { oom_kills: 1, forks_refused: 2, throttled: Duration::from_secs(1), ..Usage::default() };
        explain(&mut end, &limits);
        assert_eq!(end.exceeded, [Exceeded::Memory, Exceeded::Processes, Exceeded::CpuQuota]);
        let reason = "was ended by signal 9; it reached its limits: memory (1048576 bytes), processes, cpu_quota (50%)";
        assert_eq!(end.reason, reason);
    }

    #[test]
    fn signals_of_the_kernel_tell_the_limit() {
        let by =
            |signal: Signal| exceeded(&Usage::default(), Some(Exit::Signal(signal.as_raw())), Duration::from_secs(1));
        assert_eq!(by(Signal::XCPU), [Exceeded::Cpu]);
        assert_eq!(by(Signal::XFSZ), [Exceeded::Disk]);
        assert_eq!(by(Signal::KILL), []);
    }
}
