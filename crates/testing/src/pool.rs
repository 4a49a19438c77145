//! Maintaining a pool as the manager does, in the foreground.

use futures::StreamExt as _;
use gauntlet_domain::{Call, ChallengeId, Gauntlet, Result};

/// How many instances are launched or deleted at once.
const CONCURRENCY: usize = 8;

/// Brings the pool of a challenge within its bounds, and returns once the instances that it lacked are ready: runs the jobs of
/// [`Gauntlet::plan_pool`] and plans again while there is more to do.
///
/// # Errors
/// Those of planning, and the first failure of a job; the other jobs of the same plan have been run then.
pub async fn maintain_pool(gauntlet: &Gauntlet, call: &Call, id: &ChallengeId) -> Result<()> {
    loop {
        let plan = gauntlet.plan_pool(call, id, CONCURRENCY).await?;
        let idle = plan.jobs.is_empty();
        let jobs = plan.jobs.into_iter().map(|job| gauntlet.run_pool_job(call, job));
        let results: Vec<_> = futures::stream::iter(jobs).buffer_unordered(CONCURRENCY).collect().await;
        results.into_iter().collect::<Result<()>>()?;
        if !plan.more || idle {
            return Ok(());
        }
    }
}
