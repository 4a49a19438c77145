//! Bounds the concurrent work for each registry, so that a slow registry delays no other.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{allowed::Host, failure::Failure};

/// The lookups and pulls of one registry that run at a time.
const ACTIVE: usize = 8;
/// Those that wait for one of them to end. Further ones fail at once.
const WAITING: usize = 64;

struct Registry {
    active: Arc<Semaphore>,
    /// Active and waiting.
    all: Arc<Semaphore>,
}

/// The registries with work in progress.
#[derive(Default)]
pub(crate) struct Turns(Mutex<BTreeMap<Host, Weak<Registry>>>);

/// The right to talk to a registry until it is dropped.
pub(crate) struct Turn {
    _active: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
    _registry: Arc<Registry>,
}

impl Turns {
    /// Waits, in order, until fewer than [`ACTIVE`] turns of this registry are taken.
    ///
    /// # Errors
    /// [`WAITING`] others wait already.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the queue.
    pub(crate) async fn of(&self, host: &Host) -> Result<Turn, Failure> {
        let registry = {
            let mut registries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            registries.retain(|_, registry| registry.strong_count() > 0);
            let running = registries.get(host).and_then(Weak::upgrade);
            running.unwrap_or_else(|| {
                let semaphore = |permits| Arc::new(Semaphore::new(permits));
                let registry = Arc::new(Registry { active: semaphore(ACTIVE), all: semaphore(ACTIVE + WAITING) });
                registries.insert(host.clone(), Arc::downgrade(&registry));
                registry
            })
        };
        let busy = || Failure::broken(format!("{} requests wait for it already; try again", ACTIVE + WAITING));
        let all = registry.all.clone().try_acquire_owned().map_err(|_| busy())?;
        let active = registry.active.clone().acquire_owned().await.map_err(|_| busy())?;
        Ok(Turn { _active: active, _all: all, _registry: registry })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use futures::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};

    use super::*;

    #[tokio::test]
    async fn busy_registry_delays_no_other_and_its_queue_is_bounded() {
        let turns = Turns::default();
        let [slow, fast]: [Host; 2] = ["slow.test", "fast.test"].map(|host| host.parse().unwrap());
        let mut taken = Vec::new();
        for _ in 0..ACTIVE {
            taken.push(turns.of(&slow).await.unwrap());
        }
        let mut waiting: FuturesUnordered<_> = (0..WAITING).map(|_| turns.of(&slow)).collect();
        assert!(waiting.next().now_or_never().is_none());
        assert!(turns.of(&slow).now_or_never().expect("the queue is full").is_err());
        assert!(turns.of(&fast).now_or_never().expect("another registry").is_ok());
        taken.pop();
        taken.push(waiting.next().await.unwrap().unwrap());
        drop(taken);
        while let Some(turn) = waiting.next().await {
            drop(turn.unwrap());
        }
    }
}
