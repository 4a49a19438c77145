//! The two protocols that all else stands on, as small as they can be said, in every order that three clients, one crash and one expired
//! lease allow.

mod lock;
mod work;

use std::{fmt::Debug, hash::Hash};

use stateright::{Checker as _, Model};

/// Looks at every state there is; answers how many, or panics with the shortest way to one that breaks a property.
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

/// Whether a property is broken somewhere.
fn breaks<M>(model: M, property: &'static str) -> bool
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + PartialEq + Clone + Send + Sync,
    M::Action: Debug + PartialEq + Clone,
{
    model.checker().spawn_bfs().join().discovery(property).is_some()
}
