//! Instances that end by themselves are brought up again when they do, not when the reconciler next comes by.

use std::time::Duration;

use futures::{StreamExt as _, stream::FuturesUnordered};
use gauntlet_domain::{Found, Gauntlet, ReconcileReport, Result};
use gauntlet_provision::process::Ends;

use crate::{call::call_now, reconciler::run_reconcile, signals::Signals, tasks::Tasks};

/// Brought up again at once. The others wait; the kernel remembers them.
const AT_ONCE: usize = 16;
/// Before one that was not to be brought up is looked at once more.
const PAUSE: Duration = Duration::from_secs(1);

/// Watches for as long as the manager runs. What cannot be brought up now is left to the reconciler.
pub(crate) fn start(tasks: &Tasks, gauntlet: &Gauntlet, signals: &Signals, mut ends: Ends) {
    let (gauntlet, signals) = (gauntlet.clone(), signals.clone());
    tasks.spawn("ends", |stop| async move {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = under_way.next() => {}
                found = ends.next(), if under_way.len() < AT_ONCE => match found {
                    Ok(found) => {
                        under_way.push(run_reconcile(bring_back(&gauntlet, found), &signals));
                    }
                    Err(error) => tracing::warn!(%error, "an instance that ended is left to the reconciler"),
                },
            }
        }
    });
}

/// One that ended the moment it was ready may not be recorded as ready yet: it is looked at twice.
async fn bring_back(gauntlet: &Gauntlet, found: Found) -> Result<ReconcileReport> {
    let done = gauntlet.reconcile_instance(&call_now(), found.clone()).await?;
    if done.restarted + done.orphans_removed + done.failures.len() > 0 {
        return Ok(done);
    }
    tokio::time::sleep(PAUSE).await;
    gauntlet.reconcile_instance(&call_now(), found).await
}
