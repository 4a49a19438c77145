//! Concurrent calls for the same thing share one future.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};

/// Work in progress, by key.
///
/// # Cancel safety
/// Dropping the last future of a key drops the work.
pub(crate) struct Flights<K, T: Clone>(Mutex<BTreeMap<K, WeakShared<BoxFuture<'static, T>>>>);

impl<K, T: Clone> Default for Flights<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Ord, T: Clone> Flights<K, T> {
    /// Joins the work for `key`, or starts `work`.
    pub(crate) fn join(&self, key: K, work: impl FnOnce() -> BoxFuture<'static, T>) -> Shared<BoxFuture<'static, T>> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.upgrade().is_some());
        let running = flights.get(&key).and_then(WeakShared::upgrade);
        running.unwrap_or_else(|| {
            let flight = work().shared();
            flights.extend(flight.downgrade().map(|weak| (key, weak)));
            flight
        })
    }
}
