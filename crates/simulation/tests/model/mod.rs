//! Minimal models of the two basic protocols, checked exhaustively with three clients, one crash and one expired lease.

mod lock;
mod work;

use std::{fmt::Debug, hash::Hash};

use stateright::{Checker as _, Model};

/// Visits every reachable state and returns their number. Panics with the shortest path to a state that violates a property.
fn check<M>(model: M) -> usize
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + PartialEq + Clone + Send + Sync,
    M::Action: Debug + PartialEq + Clone,
{
    let checker = model.checker().spawn_bfs().join();
    checker.assert_properties();
    checker.unique_state_count()
}

/// Returns whether a reachable state violates the property.
fn breaks<M>(model: M, property: &'static str) -> bool
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + PartialEq + Clone + Send + Sync,
    M::Action: Debug + PartialEq + Clone,
{
    model.checker().spawn_bfs().join().discovery(property).is_some()
}
