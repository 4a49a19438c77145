//! Restarts instances as soon as they exit by themselves, without waiting for the next reconcile pass.

use std::time::Duration;

use futures::{StreamExt as _, stream::FuturesUnordered};
use gauntlet_domain::{Gauntlet, ProvisionedInstance, ReconcileReport, Result};
use gauntlet_provision::process::Ends;

use crate::{call::call_now, reconciler::run_reconcile, signals::Signals, tasks::Tasks};

/// How many instances are handled concurrently. Further exits stay queued in the kernel.
const MAX_CONCURRENT: usize = 16;
/// The pause before an instance that did not need a restart is checked again.
const RECHECK_DELAY: Duration = Duration::from_secs(1);

/// Watches for exits until the tasks stop. The reconciler handles instances that cannot be restarted now.
pub(crate) fn start(tasks: &Tasks, gauntlet: &Gauntlet, signals: &Signals, mut ends: Ends) {
    let (gauntlet, signals) = (gauntlet.clone(), signals.clone());
    tasks.spawn("ends", |stop| async move {
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = running.next() => {}
                found = ends.next(), if running.len() < MAX_CONCURRENT => match found {
                    Ok(found) => {
                        running.push(run_reconcile(bring_back(&gauntlet, found), &signals));
                    }
                    Err(error) => tracing::warn!(%error, "cannot check an instance that may have exited; the reconciler will"),
                },
            }
        }
    });
}

/// Checks the instance twice if need be: one that exited as soon as it was ready may not be recorded as ready yet.
async fn bring_back(gauntlet: &Gauntlet, found: ProvisionedInstance) -> Result<ReconcileReport> {
    let done = gauntlet.reconcile_instance(&call_now(), found.clone()).await?;
    if done.restarted + done.orphans_removed + done.failures.len() > 0 {
        return Ok(done);
    }
    tokio::time::sleep(RECHECK_DELAY).await;
    gauntlet.reconcile_instance(&call_now(), found).await
}
