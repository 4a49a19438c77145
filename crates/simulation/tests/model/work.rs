//! Intent, act, commit on one instance: its creation, its recovery, and the instances that run.

use stateright::{Model, Property};

use super::{breaks, check};

const CLIENTS: usize = 3;

/// The protocol, optionally without one of its parts; the check must find that flaw.
#[derive(Clone)]
struct Work {
    without: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The comparison of the token in the commit.
    Token,
    /// The comparison of the token on the machine.
    Generation,
    /// The recovery of unfinished work.
    Recovery,
}

/// The intent of an owner.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Intent {
    Up,
    Down,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Client {
    Idle,
    /// It owns the instance, or believes so: its token, the client that the instance is for, and its intent.
    Begun {
        token: u8,
        of: usize,
        intent: Intent,
    },
    Acted {
        token: u8,
        of: usize,
        intent: Intent,
    },
    Done,
    Dead,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Record {
    Absent,
    Provisioning(usize),
    Ready(usize),
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    revision: u8,
    record: Record,
    owner: Option<(usize, u8)>,
    /// For each client's instance: the highest generation, and whether it runs.
    machine: [(u8, bool); CLIENTS],
    clients: [Client; CLIENTS],
    crashes: u8,
    expiries: u8,
    stale: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Create(usize),
    Recover(usize, Intent),
    Act(usize),
    Commit(usize),
    Crash(usize),
    Expire(usize),
}

impl State {
    fn settled(&self) -> bool {
        let all_finished = self.clients.iter().all(|client| matches!(client, Client::Done | Client::Dead));
        all_finished && self.owner.is_none() && !matches!(self.record, Record::Provisioning(_))
    }
}

impl Model for Work {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            revision: 0,
            record: Record::Absent,
            owner: None,
            machine: [(0, false); CLIENTS],
            clients: [Client::Idle; CLIENTS],
            crashes: 1,
            expiries: 1,
            stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let unfinished = matches!(state.record, Record::Provisioning(_)) && state.owner.is_none();
        for client in 0..CLIENTS {
            match state.clients[client] {
                Client::Idle => actions.push(Action::Create(client)),
                Client::Begun { .. } => actions.push(Action::Act(client)),
                Client::Acted { .. } => actions.push(Action::Commit(client)),
                Client::Done | Client::Dead => {}
            }
            if state.clients[client] == Client::Done && unfinished && self.without != Some(Part::Recovery) {
                actions.extend([Action::Recover(client, Intent::Up), Action::Recover(client, Intent::Down)]);
            }
            let is_working = matches!(state.clients[client], Client::Begun { .. } | Client::Acted { .. });
            if is_working && state.crashes > 0 {
                actions.push(Action::Crash(client));
            }
            let owns = state.owner.is_some_and(|(owner, _)| owner == client);
            if owns && (state.clients[client] == Client::Dead || state.expiries > 0) {
                actions.push(Action::Expire(client));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Create(client) => {
                if state.record != Record::Absent || state.owner.is_some() {
                    state.clients[client] = Client::Done;
                    return Some(state);
                }
                state.revision += 1;
                let token = state.revision;
                state.record = Record::Provisioning(client);
                state.owner = Some((client, token));
                state.clients[client] = Client::Begun { token, of: client, intent: Intent::Up };
            }
            Action::Recover(client, intent) => {
                let Record::Provisioning(of) = state.record else { return None };
                state.revision += 1;
                let token = state.revision;
                state.owner = Some((client, token));
                state.clients[client] = Client::Begun { token, of, intent };
            }
            Action::Act(client) => {
                let Client::Begun { token, of, intent } = state.clients[client] else { return None };
                if state.machine[of].0 > token && self.without != Some(Part::Generation) {
                    state.clients[client] = Client::Done;
                } else {
                    state.machine[of] = (token.max(state.machine[of].0), intent == Intent::Up);
                    state.clients[client] = Client::Acted { token, of, intent };
                }
            }
            Action::Commit(client) => {
                let Client::Acted { token, of, intent } = state.clients[client] else { return None };
                state.clients[client] = Client::Done;
                let owns = state.owner == Some((client, token));
                if owns || self.without == Some(Part::Token) {
                    state.stale |= !owns;
                    state.record = if intent == Intent::Up { Record::Ready(of) } else { Record::Absent };
                    state.owner = state.owner.filter(|_| !owns);
                }
            }
            Action::Crash(client) => {
                state.crashes -= 1;
                state.clients[client] = Client::Dead;
            }
            Action::Expire(client) => {
                if state.clients[client] != Client::Dead {
                    state.expiries -= 1;
                }
                state.owner = None;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one instance runs", |_, state: &State| {
                state.machine.iter().filter(|(_, up)| *up).count() <= 1
            }),
            Property::always("a ready instance runs", |_, state: &State| match state.record {
                Record::Ready(of) => state.machine[of].1,
                Record::Absent | Record::Provisioning(_) => true,
            }),
            Property::always("no stale commit succeeds", |_, state: &State| !state.stale),
            Property::always("no orphan remains", |_, state: &State| {
                !state.settled() || state.record != Record::Absent || state.machine.iter().all(|(_, up)| !up)
            }),
            Property::eventually("all work finishes", |_, state: &State| state.settled()),
            Property::sometimes("a stale request is rejected", |_, state: &State| {
                state.clients.iter().any(|client| match *client {
                    Client::Begun { token, of, .. } => state.machine[of].0 > token,
                    Client::Idle | Client::Acted { .. } | Client::Done | Client::Dead => false,
                })
            }),
        ]
    }
}

#[test]
fn work_runs_once_and_finishes() {
    let states = check(Work { without: None });
    println!("{states} states");
    assert!(states > 100);
}

#[test]
fn work_needs_each_of_its_parts() {
    assert!(breaks(Work { without: Some(Part::Token) }, "no stale commit succeeds"));
    assert!(breaks(Work { without: Some(Part::Generation) }, "a ready instance runs"));
    assert!(breaks(Work { without: Some(Part::Recovery) }, "all work finishes"));
}
