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
pub(crate) fn start(tasks: &Tasks, gauntlet: &Gauntlet, signals: &Signals, mut exits: Ends) {
    let (gauntlet, signals) = (gauntlet.clone(), signals.clone());
    tasks.spawn("exits", |stop| async move {
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = running.next() => {}
                exited = exits.next(), if running.len() < MAX_CONCURRENT => match exited {
                    Ok(instance) => {
                        running.push(run_reconcile(restart(&gauntlet, instance), &signals));
                    }
                    Err(error) => tracing::warn!(%error, "cannot check an instance that may have exited; the reconciler will"),
                },
            }
        }
    });
}

/// Restarts the instance if its record says that it should run. Checks a second time if the first check had nothing to do: an instance that exited
/// as soon as it was ready may not be recorded as ready yet.
async fn restart(gauntlet: &Gauntlet, instance: ProvisionedInstance) -> Result<ReconcileReport> {
    let report = gauntlet.reconcile_instance(&call_now(), instance.clone()).await?;
    if report.restarted + report.orphans_removed + report.failures.len() > 0 {
        return Ok(report);
    }
    tokio::time::sleep(RECHECK_DELAY).await;
    gauntlet.reconcile_instance(&call_now(), instance).await
}
