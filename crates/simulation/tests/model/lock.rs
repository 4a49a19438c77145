//! The lock: one key for each acquisition, in order of creation, observed through a watch cache that lags behind. Within a replica, the lock is
//! handed over before the key of the last holder is removed.

use stateright::{Model, Property};

use super::{breaks, check};

const CLIENTS: usize = 3;

/// The replica of each client, and a flaw that the check has to find.
#[derive(Clone)]
struct Lock {
    replicas: [usize; CLIENTS],
    without: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The comparison of the token in the commit.
    Fence,
    /// The expiry of a crashed client's keys with its lease.
    Lease,
    /// The order of waiters.
    Queue,
    /// The rule that a handover within a replica goes to the next waiter of all replicas.
    Next,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Client {
    Idle,
    /// Its key, and the keys that it waits for.
    Waiting {
        own: u8,
        ahead: Vec<u8>,
    },
    Held {
        own: u8,
    },
    /// It releases the lock without a write; its key is being removed.
    Leaving {
        own: u8,
    },
    /// It has committed, was refused, or knows that its lease has expired.
    Done,
    Dead,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    revision: u8,
    /// The stored keys: create revision and client.
    keys: Vec<(u8, usize)>,
    /// Of each replica.
    leases: [bool; CLIENTS],
    clients: [Client; CLIENTS],
    /// What each has seen through its watch cache.
    mirrors: [Vec<u8>; CLIENTS],
    crashes: u8,
    expiries: u8,
    /// A client committed without owning the lock.
    stale: bool,
    /// A client overtook an earlier one.
    overtaken: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Acquire(usize),
    Sync(usize),
    Enter(usize),
    Commit(usize),
    Leave(usize),
    Remove(usize),
    Notice(usize),
    /// Of a replica.
    Crash(usize),
    Expire(usize),
}

impl Lock {
    /// The stored keys that a new acquisition would wait for.
    fn blocking(&self, state: &State) -> Vec<u8> {
        let blocks = |(created, of): &(u8, usize)| {
            let held = matches!(state.clients[*of], Client::Held { own } if own == *created);
            self.without != Some(Part::Queue) || held
        };
        state.keys.iter().filter(|key| blocks(key)).map(|(created, _)| *created).collect()
    }

    fn leaving(state: &State, key: u8) -> Option<usize> {
        (0..CLIENTS).find(|client| state.clients[*client] == Client::Leaving { own: key })
    }

    /// Whether a waiting client proceeds: according to its watch cache, the keys ahead are removed, or are being released by its own replica.
    fn goes_on(&self, state: &State, client: usize, ahead: &[u8]) -> bool {
        let here = |key: u8| Self::leaving(state, key).is_some_and(|of| self.replicas[of] == self.replicas[client]);
        let gone = |key: u8| !state.mirrors[client].contains(&key) || here(key);
        match self.without {
            Some(Part::Next) => ahead.iter().all(|key| gone(*key)) || ahead.iter().any(|key| here(*key)),
            _ => ahead.iter().all(|key| gone(*key)),
        }
    }

    /// The clients of a replica.
    fn of(&self, replica: usize) -> impl Iterator<Item = usize> {
        (0..CLIENTS).filter(move |client| self.replicas[*client] == replica)
    }

    /// The holders according to the store.
    fn holders(state: &State) -> impl Iterator<Item = usize> {
        let holds = |client: &usize| matches!(state.clients[*client], Client::Held { own } if state.keys.contains(&(own, *client)));
        (0..CLIENTS).filter(holds)
    }
}

impl Model for Lock {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            revision: 0,
            keys: Vec::new(),
            leases: [true; CLIENTS],
            clients: [const { Client::Idle }; CLIENTS],
            mirrors: [const { Vec::new() }; CLIENTS],
            crashes: 1,
            expiries: 1,
            stale: false,
            overtaken: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let stored: Vec<u8> = state.keys.iter().map(|(created, _)| *created).collect();
        for client in 0..CLIENTS {
            let lives = !matches!(state.clients[client], Client::Done | Client::Dead);
            match &state.clients[client] {
                Client::Idle => actions.push(Action::Acquire(client)),
                Client::Waiting { ahead, .. } => {
                    if self.goes_on(state, client, ahead) {
                        actions.push(Action::Enter(client));
                    }
                    if state.mirrors[client] != stored {
                        actions.push(Action::Sync(client));
                    }
                }
                Client::Held { .. } => actions.extend([Action::Commit(client), Action::Leave(client)]),
                Client::Leaving { .. } => actions.push(Action::Remove(client)),
                Client::Done | Client::Dead => {}
            }
            if lives && !state.leases[self.replicas[client]] {
                actions.push(Action::Notice(client));
            }
        }
        for replica in 0..CLIENTS {
            let clients = || self.of(replica).map(|client| &state.clients[client]);
            let lives = clients().any(|client| !matches!(client, Client::Done | Client::Dead));
            if lives && state.crashes > 0 {
                actions.push(Action::Crash(replica));
            }
            let expires = clients().any(|client| *client == Client::Dead) || (lives && state.expiries > 0);
            if state.leases[replica] && expires && self.without != Some(Part::Lease) {
                actions.push(Action::Expire(replica));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Acquire(client) => {
                if !state.leases[self.replicas[client]] {
                    state.clients[client] = Client::Done;
                    return Some(state);
                }
                let ahead = self.blocking(&state);
                state.revision += 1;
                let own = state.revision;
                state.keys.push((own, client));
                // Read in the same transaction. The watch cache continues from there.
                state.mirrors[client] = state.keys.iter().map(|(created, _)| *created).collect();
                state.clients[client] =
                    if ahead.is_empty() { Client::Held { own } } else { Client::Waiting { own, ahead } };
                state.overtaken |= matches!(state.clients[client], Client::Held { .. }) && Self::earlier(&state, own);
            }
            Action::Sync(client) => state.mirrors[client] = state.keys.iter().map(|(created, _)| *created).collect(),
            Action::Enter(client) => {
                let Client::Waiting { own, .. } = state.clients[client] else { return None };
                state.clients[client] = Client::Held { own };
                state.overtaken |= Self::earlier(&state, own);
            }
            Action::Commit(client) => {
                let Client::Held { own } = state.clients[client] else { return None };
                let owns = state.keys.contains(&(own, client));
                state.stale |= !owns && self.without == Some(Part::Fence);
                state.keys.retain(|(created, _)| *created != own);
                state.clients[client] = Client::Done;
            }
            Action::Leave(client) => {
                let Client::Held { own } = state.clients[client] else { return None };
                state.clients[client] = Client::Leaving { own };
            }
            Action::Remove(client) => {
                let Client::Leaving { own } = state.clients[client] else { return None };
                state.keys.retain(|(created, _)| *created != own);
                state.clients[client] = Client::Done;
            }
            Action::Notice(client) => state.clients[client] = Client::Done,
            Action::Crash(replica) => {
                state.crashes -= 1;
                self.of(replica).for_each(|client| state.clients[client] = Client::Dead);
            }
            Action::Expire(replica) => {
                if self.of(replica).all(|client| state.clients[client] != Client::Dead) {
                    state.expiries -= 1;
                }
                state.leases[replica] = false;
                state.keys.retain(|(_, of)| self.replicas[*of] != replica);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("who holds it is alone", |_, state: &State| Self::holders(state).count() < 2),
            Property::always("nothing stale is committed", |_, state: &State| !state.stale),
            Property::always("no client is overtaken", |_, state: &State| !state.overtaken),
            Property::eventually("everybody is served", |_, state: &State| {
                state.clients.iter().all(|client| matches!(client, Client::Done | Client::Dead))
            }),
        ]
    }
}

impl Lock {
    /// Whether an older key of an unfinished client is stored.
    fn earlier(state: &State, own: u8) -> bool {
        state.keys.iter().any(|(created, _)| *created < own && Self::leaving(state, *created).is_none())
    }
}

/// Each client in its own replica; the first and the last in one; all in one.
const REPLICAS: [[usize; CLIENTS]; 3] = [[0, 1, 2], [0, 1, 0], [0, 0, 0]];

#[test]
fn the_lock_is_safe_and_serves_everybody() {
    for replicas in REPLICAS {
        let states = check(Lock { replicas, without: None });
        println!("replicas {replicas:?}: {states} states");
        assert!(states > 100);
    }
}

#[test]
fn the_lock_needs_each_of_its_parts() {
    let breaks = |replicas, part, promise| breaks(Lock { replicas, without: Some(part) }, promise);
    let (apart, shared) = ([0, 1, 2], [0, 1, 0]);
    assert!(breaks(apart, Part::Fence, "nothing stale is committed"));
    assert!(breaks(apart, Part::Lease, "everybody is served"));
    assert!(breaks(apart, Part::Queue, "no client is overtaken"));
    assert!(breaks(shared, Part::Next, "who holds it is alone"));
}
