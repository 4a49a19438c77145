//! Ending an instance, whole.

use std::{fs::File, io, time::Duration};

use gauntlet_domain::{Error, Result};
use rustix::process::Signal;
use tokio::time::Instant;

use super::{
    KILL_PATIENCE, Process,
    cgroup::Group,
    free,
    home::{Home, blocking, failed, readable},
    procfs, read,
    record::{RECORD, Record, STATE, State},
};

/// How long to wait for a supervisor that has only begun and has not said yet who it is, and for a lock that somebody looks at.
const PAUSE: Duration = Duration::from_millis(1);

impl Process {
    /// Ends whatever runs. Answers the supervisor's lock: as long as it is held none can start.
    ///
    /// A supervisor may take a few seconds longer than the instance's grace before it is killed itself.
    pub(super) async fn stop(&self, home: &Home) -> Result<File> {
        let grace = read::<Record>(home, RECORD).await.ok().flatten().map_or(self.config.grace, |r| r.launch.grace);
        let began = Instant::now();
        let (told, killed) = (began + grace + KILL_PATIENCE, began + grace + 2 * KILL_PATIENCE);
        let mut sent = None;
        let lock = loop {
            let taken = home.clone();
            if let Some(lock) = blocking(move || free(&taken)).await? {
                break lock;
            }
            let (signal, until) = if Instant::now() < told { (Signal::TERM, told) } else { (Signal::KILL, killed) };
            if Instant::now() >= killed {
                let detail = "its supervisor does not end, or runs where this manager does not see it".to_owned();
                return Err(Error::Provision { step: "stop", detail });
            }
            let signalled = || failed("stop", "signalling its supervisor");
            let shim = match read::<State>(home, STATE).await? {
                Some(state) => procfs::open(state.shim).map_err(signalled())?,
                None => None,
            };
            match shim {
                Some(shim) => {
                    if sent != Some(signal) {
                        procfs::signal(&shim, signal).map_err(signalled())?;
                        sent = Some(signal);
                    }
                    let shim = readable(shim).map_err(signalled())?;
                    let _ = tokio::time::timeout_at(until, shim.readable()).await;
                }
                None => tokio::time::sleep(PAUSE).await,
            }
        };
        if let Some(state) = read::<State>(home, STATE).await.unwrap_or(None) {
            let home = home.clone();
            blocking(move || {
                end_what_is_left(&home, &state).map_err(failed("stop", "ending what its supervisor left"))
            })
            .await?;
        }
        Ok(lock)
    }
}

/// Ends what a supervisor that was killed has left. Blocks.
fn end_what_is_left(home: &Home, state: &State) -> io::Result<()> {
    procfs::reap(state.shim);
    // After a reboot there is nothing left to end.
    if state.end.as_ref().is_some_and(|end| end.whole) || state.boot != procfs::boot() {
        return Ok(());
    }
    let mut found = match &state.cgroup {
        Some(path) => Group::new(path.clone()).end(KILL_PATIENCE)?,
        None => false,
    };
    if !state.gathered {
        // The one search of all processes: for what had not been put into a group when its supervisor was killed.
        found |= procfs::sweep(&home.dir, state, KILL_PATIENCE)? > 0;
    }
    if found {
        tracing::warn!(instance.identity = home.identity(), "ended what a killed supervisor had left");
    }
    Ok(())
}
