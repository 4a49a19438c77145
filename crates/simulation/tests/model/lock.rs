//! A model of the lock. Each acquisition creates a key, and the keys are served in order of creation. Clients observe them through watch
//! caches that lag behind. Within a replica, the lock is handed over before the key of the previous holder is removed.

use stateright::{Model, Property};

use super::{breaks, check};

const CLIENTS: usize = 3;

/// The replica of each client, and a part to leave out, which the check must detect.
#[derive(Clone)]
struct Lock {
    replicas: [usize; CLIENTS],
    without: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The comparison of the fencing token in the commit.
    Token,
    /// The expiry of a crashed client's keys with its lease.
    Lease,
    /// The order of waiters.
    Queue,
    /// The rule that a handover within a replica goes only to the next waiter of all replicas.
    Handover,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Client {
    Idle,
    /// It waits for the keys `ahead` of its own.
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
    /// It has committed, its commit was rejected, or it knows that its lease has expired.
    Done,
    Dead,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    revision: u8,
    /// The stored keys: create revision and client.
    keys: Vec<(u8, usize)>,
    /// Whether the lease of each replica is alive.
    leases: [bool; CLIENTS],
    clients: [Client; CLIENTS],
    /// The keys in the watch cache of each client.
    caches: [Vec<u8>; CLIENTS],
    crashes: u8,
    expiries: u8,
    /// A client has committed without owning the lock.
    stale: bool,
    /// A client has overtaken an earlier one.
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
    /// The argument of `Crash` and `Expire` is a replica.
    Crash(usize),
    Expire(usize),
}

impl Lock {
    /// Returns the stored keys that a new acquisition must wait for.
    fn blocking(&self, state: &State) -> Vec<u8> {
        let blocks = |(created, of): &(u8, usize)| {
            let held = matches!(state.clients[*of], Client::Held { own } if own == *created);
            self.without != Some(Part::Queue) || held
        };
        state.keys.iter().filter(|key| blocks(key)).map(|(created, _)| *created).collect()
    }

    /// Returns the client that is releasing this key.
    fn leaving(state: &State, key: u8) -> Option<usize> {
        (0..CLIENTS).find(|client| state.clients[*client] == Client::Leaving { own: key })
    }

    /// Whether a waiting client acquires the lock: every key ahead of it is absent from its watch cache or is being released by its own replica.
    fn can_enter(&self, state: &State, client: usize, ahead: &[u8]) -> bool {
        let handed_over =
            |key: u8| Self::leaving(state, key).is_some_and(|of| self.replicas[of] == self.replicas[client]);
        let released = |key: u8| !state.caches[client].contains(&key) || handed_over(key);
        match self.without {
            Some(Part::Handover) => ahead.iter().all(|key| released(*key)) || ahead.iter().any(|key| handed_over(*key)),
            _ => ahead.iter().all(|key| released(*key)),
        }
    }

    /// Returns the clients of a replica.
    fn clients_of(&self, replica: usize) -> impl Iterator<Item = usize> {
        (0..CLIENTS).filter(move |client| self.replicas[*client] == replica)
    }

    /// Returns the holders whose keys are stored.
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
            caches: [const { Vec::new() }; CLIENTS],
            crashes: 1,
            expiries: 1,
            stale: false,
            overtaken: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let stored: Vec<u8> = state.keys.iter().map(|(created, _)| *created).collect();
        for client in 0..CLIENTS {
            let is_running = !matches!(state.clients[client], Client::Done | Client::Dead);
            match &state.clients[client] {
                Client::Idle => actions.push(Action::Acquire(client)),
                Client::Waiting { ahead, .. } => {
                    if self.can_enter(state, client, ahead) {
                        actions.push(Action::Enter(client));
                    }
                    if state.caches[client] != stored {
                        actions.push(Action::Sync(client));
                    }
                }
                Client::Held { .. } => actions.extend([Action::Commit(client), Action::Leave(client)]),
                Client::Leaving { .. } => actions.push(Action::Remove(client)),
                Client::Done | Client::Dead => {}
            }
            if is_running && !state.leases[self.replicas[client]] {
                actions.push(Action::Notice(client));
            }
        }
        for replica in 0..CLIENTS {
            let clients = || self.clients_of(replica).map(|client| &state.clients[client]);
            let has_running = clients().any(|client| !matches!(client, Client::Done | Client::Dead));
            if has_running && state.crashes > 0 {
                actions.push(Action::Crash(replica));
            }
            let expires = clients().any(|client| *client == Client::Dead) || (has_running && state.expiries > 0);
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
                // The transaction also reads the queue, and the watch cache continues from that revision.
                state.caches[client] = state.keys.iter().map(|(created, _)| *created).collect();
                state.clients[client] =
                    if ahead.is_empty() { Client::Held { own } } else { Client::Waiting { own, ahead } };
                state.overtaken |= matches!(state.clients[client], Client::Held { .. }) && Self::earlier(&state, own);
            }
            Action::Sync(client) => state.caches[client] = state.keys.iter().map(|(created, _)| *created).collect(),
            Action::Enter(client) => {
                let Client::Waiting { own, .. } = state.clients[client] else { return None };
                state.clients[client] = Client::Held { own };
                state.overtaken |= Self::earlier(&state, own);
            }
            Action::Commit(client) => {
                let Client::Held { own } = state.clients[client] else { return None };
                let owns = state.keys.contains(&(own, client));
                state.stale |= !owns && self.without == Some(Part::Token);
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
                self.clients_of(replica).for_each(|client| state.clients[client] = Client::Dead);
            }
            Action::Expire(replica) => {
                if self.clients_of(replica).all(|client| state.clients[client] != Client::Dead) {
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
            Property::always("at most one client holds the lock", |_, state: &State| Self::holders(state).count() < 2),
            Property::always("no stale commit succeeds", |_, state: &State| !state.stale),
            Property::always("no client is overtaken", |_, state: &State| !state.overtaken),
            Property::eventually("every client finishes", |_, state: &State| {
                state.clients.iter().all(|client| matches!(client, Client::Done | Client::Dead))
            }),
        ]
    }
}

impl Lock {
    /// Whether an older key is stored whose client is not releasing it.
    fn earlier(state: &State, own: u8) -> bool {
        state.keys.iter().any(|(created, _)| *created < own && Self::leaving(state, *created).is_none())
    }
}

/// Each client in its own replica; the first and the last in the same replica; all in the same replica.
const REPLICAS: [[usize; CLIENTS]; 3] = [[0, 1, 2], [0, 1, 0], [0, 0, 0]];

#[test]
fn lock_is_exclusive_fair_and_live() {
    for replicas in REPLICAS {
        let states = check(Lock { replicas, without: None });
        println!("replicas {replicas:?}: {states} states");
        assert!(states > 100);
    }
}

#[test]
fn lock_needs_each_of_its_parts() {
    let breaks = |replicas, part, property| breaks(Lock { replicas, without: Some(part) }, property);
    let (apart, shared) = ([0, 1, 2], [0, 1, 0]);
    assert!(breaks(apart, Part::Token, "no stale commit succeeds"));
    assert!(breaks(apart, Part::Lease, "every client finishes"));
    assert!(breaks(apart, Part::Queue, "no client is overtaken"));
    assert!(breaks(shared, Part::Handover, "at most one client holds the lock"));
}
