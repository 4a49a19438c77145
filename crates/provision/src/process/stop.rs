//! Stops an instance completely.

use std::{fs::File, io, time::Duration};

use gauntlet_domain::{Error, Result};
use rustix::process::Signal;
use tokio::time::Instant;

use super::{
    Process,
    blocking::{blocking, failed, readable},
    instance_dir::InstanceDir,
    procfs, read,
    record::{RECORD, Record, STATE, State},
    try_supervisor_lock,
};

/// How long killed processes may take to exit.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(6);
/// The pause before checking again a supervisor that has not recorded its process id yet, or a lock that another manager has taken for a moment.
const PAUSE: Duration = Duration::from_millis(1);

impl Process {
    /// Stops everything that runs of the instance. Returns the supervisor lock: while it is held, no supervisor can start.
    ///
    /// A supervisor that takes more than [`KILL_TIMEOUT`] longer than the instance's grace period is killed.
    pub(super) async fn stop(&self, instance: &InstanceDir) -> Result<File> {
        let grace = read::<Record>(instance, RECORD).await.ok().flatten().map_or(self.config.grace, |r| r.launch.grace);
        let started = Instant::now();
        let (kill_at, give_up_at) = (started + grace + KILL_TIMEOUT, started + grace + 2 * KILL_TIMEOUT);
        let mut sent = None;
        let lock = loop {
            let locking = instance.clone();
            if let Some(lock) = blocking(move || try_supervisor_lock(&locking)).await? {
                break lock;
            }
            let now = Instant::now();
            if now >= give_up_at {
                let detail = "its supervisor does not exit, or runs in a PID namespace that this manager does not see";
                return Err(Error::Provision { step: "stop", detail: detail.to_owned() });
            }
            let (signal, until) = if now < kill_at { (Signal::TERM, kill_at) } else { (Signal::KILL, give_up_at) };
            let signalled = || failed("stop", "signalling its supervisor");
            let supervisor = match read::<State>(instance, STATE).await? {
                Some(state) => procfs::open_pidfd(state.supervisor).map_err(signalled())?,
                None => None,
            };
            match supervisor {
                Some(supervisor) => {
                    if sent != Some(signal) {
                        procfs::send_signal(&supervisor, signal).map_err(signalled())?;
                        sent = Some(signal);
                    }
                    let supervisor = readable(supervisor).map_err(signalled())?;
                    let _ = tokio::time::timeout_at(until, supervisor.readable()).await;
                }
                None => tokio::time::sleep(PAUSE).await,
            }
        };
        if let Some(state) = read::<State>(instance, STATE).await.unwrap_or(None) {
            let (instance, reporter, span) = (instance.clone(), self.reporter.clone(), tracing::Span::current());
            blocking(move || {
                let _entered = span.entered();
                kill_leftovers(&instance, &state).map_err(failed("stop", "killing what its supervisor left"))?;
                reporter.report(&instance, state).map_err(failed("stop", "recording how it ended"))
            })
            .await?;
        }
        Ok(lock)
    }
}

/// Reaps the supervisor, and kills the processes that it left if it was killed. Blocks.
fn kill_leftovers(instance: &InstanceDir, state: &State) -> io::Result<()> {
    procfs::reap(state.supervisor);
    // No process survives a reboot.
    if state.end.as_ref().is_some_and(|end| end.complete) || state.boot != procfs::boot() {
        return Ok(());
    }
    let contained = state.isolation.has_namespaces();
    if contained && let Some(first) = state.child {
        // Process 1: when it has exited, so has every process of its PID namespace.
        procfs::kill(first, KILL_TIMEOUT)?;
    }
    let found = match &state.group {
        Some(group) => group.kill(KILL_TIMEOUT)?,
        None if contained => false,
        // The only search of all processes.
        None => procfs::kill_marked(&instance.dir, state, KILL_TIMEOUT)? > 0,
    };
    if found {
        tracing::warn!(instance.identity = instance.identity(), "killed processes that a killed supervisor had left");
    }
    Ok(())
}
