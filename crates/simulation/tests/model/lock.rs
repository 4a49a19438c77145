//! The reader-writer lock: a key per acquisition, in order of creation, watched through a mirror that lags.

use stateright::{Model, Property};

use super::{breaks, check};

const CLIENTS: usize = 3;

/// Whether each client wants to write; and what is left out, to see that the check would notice.
#[derive(Clone)]
struct Lock {
    writes: [bool; CLIENTS],
    without: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The token in the commit.
    Fence,
    /// The keys of who is gone go with its lease.
    Lease,
    /// A reader waits for writers that wait.
    Queue,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Client {
    Idle,
    /// Its key, and the keys it waits for.
    Waiting {
        own: u8,
        ahead: Vec<u8>,
    },
    Held {
        own: u8,
    },
    /// Committed, or refused, or aware that its lease is gone.
    Done,
    Dead,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    revision: u8,
    /// What is stored: revision of creation, and whose.
    keys: Vec<(u8, usize)>,
    leases: [bool; CLIENTS],
    clients: [Client; CLIENTS],
    /// What each has seen through its mirror.
    mirrors: [Vec<u8>; CLIENTS],
    crashes: u8,
    expiries: u8,
    /// Somebody committed what it did not own.
    stale: bool,
    /// Somebody came before one who had asked earlier.
    overtaken: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Acquire(usize),
    Sync(usize),
    Enter(usize),
    Commit(usize),
    Notice(usize),
    Crash(usize),
    Expire(usize),
}

impl Lock {
    /// Those of the stored keys that a client's own would wait for.
    fn blocking(&self, state: &State, client: usize) -> Vec<u8> {
        let blocks = |(created, of): &(u8, usize)| {
            let held = matches!(state.clients[*of], Client::Held { own } if own == *created);
            let counts = self.without != Some(Part::Queue) || self.writes[client] || held;
            (self.writes[client] || self.writes[*of]) && counts
        };
        state.keys.iter().filter(|key| blocks(key)).map(|(created, _)| *created).collect()
    }

    /// Those who hold it as far as the store knows.
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
                    if ahead.iter().all(|key| !state.mirrors[client].contains(key)) {
                        actions.push(Action::Enter(client));
                    }
                    if state.mirrors[client] != stored {
                        actions.push(Action::Sync(client));
                    }
                }
                Client::Held { .. } => actions.push(Action::Commit(client)),
                Client::Done | Client::Dead => {}
            }
            if lives && !state.leases[client] {
                actions.push(Action::Notice(client));
            }
            if lives && state.crashes > 0 {
                actions.push(Action::Crash(client));
            }
            let expires = state.clients[client] == Client::Dead || (lives && state.expiries > 0);
            if state.leases[client] && expires && self.without != Some(Part::Lease) {
                actions.push(Action::Expire(client));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Acquire(client) => {
                if !state.leases[client] {
                    state.clients[client] = Client::Done;
                    return Some(state);
                }
                let ahead = self.blocking(&state, client);
                state.revision += 1;
                let own = state.revision;
                state.keys.push((own, client));
                // What was read in the same transaction; the mirror takes it from there.
                state.mirrors[client] = state.keys.iter().map(|(created, _)| *created).collect();
                state.clients[client] =
                    if ahead.is_empty() { Client::Held { own } } else { Client::Waiting { own, ahead } };
                state.overtaken |=
                    matches!(state.clients[client], Client::Held { .. }) && self.earlier(&state, client, own);
            }
            Action::Sync(client) => state.mirrors[client] = state.keys.iter().map(|(created, _)| *created).collect(),
            Action::Enter(client) => {
                let Client::Waiting { own, .. } = state.clients[client] else { return None };
                state.clients[client] = Client::Held { own };
                state.overtaken |= self.earlier(&state, client, own);
            }
            Action::Commit(client) => {
                let Client::Held { own } = state.clients[client] else { return None };
                let owns = state.keys.contains(&(own, client));
                state.stale |= !owns && self.without == Some(Part::Fence);
                state.keys.retain(|(created, _)| *created != own);
                state.clients[client] = Client::Done;
            }
            Action::Notice(client) => state.clients[client] = Client::Done,
            Action::Crash(client) => {
                state.crashes -= 1;
                state.clients[client] = Client::Dead;
            }
            Action::Expire(client) => {
                if state.clients[client] != Client::Dead {
                    state.expiries -= 1;
                }
                state.leases[client] = false;
                state.keys.retain(|(_, of)| *of != client);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a writer is alone", |model: &Self, state: &State| {
                let holders: Vec<usize> = Self::holders(state).collect();
                holders.len() < 2 || holders.iter().all(|holder| !model.writes[*holder])
            }),
            Property::always("nothing stale is committed", |_, state: &State| !state.stale),
            Property::always("nobody is overtaken", |_, state: &State| !state.overtaken),
            Property::eventually("everybody is served", |_, state: &State| {
                state.clients.iter().all(|client| matches!(client, Client::Done | Client::Dead))
            }),
        ]
    }
}

impl Lock {
    /// Whether a conflicting key is stored that was there before.
    fn earlier(&self, state: &State, client: usize, own: u8) -> bool {
        state.keys.iter().any(|(created, of)| *created < own && (self.writes[client] || self.writes[*of]))
    }
}

const ALL: [[bool; CLIENTS]; 4] =
    [[true, true, true], [true, true, false], [true, false, false], [false, false, false]];

#[test]
fn the_lock_is_safe_and_serves_everybody() {
    for writes in ALL {
        let states = check(Lock { writes, without: None });
        println!("{writes:?}: {states} states");
        assert!(states > 100);
    }
}

#[test]
fn the_lock_needs_each_of_its_parts() {
    let two = [true, true, true];
    assert!(breaks(Lock { writes: two, without: Some(Part::Fence) }, "nothing stale is committed"));
    assert!(breaks(Lock { writes: two, without: Some(Part::Lease) }, "everybody is served"));
    assert!(breaks(Lock { writes: [true, true, false], without: Some(Part::Queue) }, "nobody is overtaken"));
}
