//! What one seat may do, and a history of it.

use std::{collections::BTreeMap, fmt};

use todc_utils::{Action, History as Recorded, Specification, WGLChecker};

/// What the answer to a call says happened, or was so. A create is two steps: it takes the seat, and shows the instance when it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// A create took the free seat.
    Take(u64),
    /// Its instance was ready, renewed last at that time if that is known.
    Show(u64, Option<u64>),
    /// Its instance could not be brought up.
    GiveBack(u64),
    /// The seat was taken.
    Taken,
    /// The seat was free.
    Free,
    /// There was no instance to see.
    NotShown,
    /// There was one, created and last renewed by these calls.
    Saw { created: u64, renewed: u64 },
    /// It was renewed by a call of that number, unless it had been by a later one; and so the answer says, if there was one.
    Renew { number: u64, saw: Option<(u64, u64)> },
    /// It was renewed, and the answer says by whom it was created and when it was renewed last: by this call or by a later one.
    Renewed { created: u64, renewed: u64 },
    /// It was renewed at a time that nobody knows.
    RenewedUnseen,
    /// It was taken down.
    Remove,
    /// Nobody knows: at some time, or never.
    Maybe(Box<Step>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Free,
    Taken(u64),
    /// `renewed` is `None` until somebody sees it.
    Shown {
        created: u64,
        renewed: Option<u64>,
    },
}

/// The seat after a step; `None` if it cannot come then.
fn after(step: &Step, state: State) -> Option<State> {
    match (step, state) {
        (Step::Take(call), State::Free) => Some(State::Taken(*call)),
        (Step::Show(call, renewed), State::Taken(by)) if by == *call => {
            Some(State::Shown { created: by, renewed: *renewed })
        }
        (Step::GiveBack(call), State::Taken(by)) if by == *call => Some(State::Free),
        (Step::Taken, State::Taken(_) | State::Shown { .. })
        | (Step::Free, State::Free)
        | (Step::NotShown, State::Free | State::Taken(_)) => Some(state),
        (Step::Saw { created, renewed }, State::Shown { created: c, renewed: r }) => (c == *created
            && r.is_none_or(|r| r == *renewed))
        .then_some(State::Shown { created: c, renewed: Some(*renewed) }),
        (Step::Renew { number, saw }, State::Shown { created, renewed }) => {
            let renewed = renewed.map_or(*number, |renewed| renewed.max(*number));
            saw.is_none_or(|saw| saw == (created, renewed)).then_some(State::Shown { created, renewed: Some(renewed) })
        }
        (Step::Renewed { created, renewed }, State::Shown { created: c, renewed: r }) => (c == *created
            && r.is_none_or(|r| r <= *renewed))
        .then_some(State::Shown { created: c, renewed: Some(*renewed) }),
        (Step::RenewedUnseen, State::Shown { created, .. }) => Some(State::Shown { created, renewed: None }),
        // One whose creator was lost half-way can be removed before it is shown.
        (Step::Remove, State::Taken(_) | State::Shown { .. }) => Some(State::Free),
        (Step::Maybe(step), state) => Some(after(step, state).unwrap_or(state)),
        _ => None,
    }
}

struct OneSeat;

impl Specification for OneSeat {
    type State = State;
    type Operation = Step;

    fn init() -> State {
        State::Free
    }

    fn apply(step: &Step, state: &State) -> (bool, State) {
        after(step, *state).map_or((false, *state), |after| (true, after))
    }
}

/// Calls and answers, in the order in which they were seen.
#[derive(Default)]
pub(crate) struct History {
    events: Vec<(u64, bool)>,
    steps: BTreeMap<u64, Vec<Step>>,
}

impl History {
    pub(crate) fn called(&mut self, number: u64) {
        self.events.push((number, true));
    }

    pub(crate) fn answered(&mut self, number: u64, steps: Vec<Step>) {
        self.events.push((number, false));
        self.steps.insert(number, steps);
    }

    /// How many calls have an outcome that nobody knows.
    pub(crate) fn unknown(&self) -> usize {
        self.steps.values().filter(|steps| matches!(steps.first(), Some(Step::Maybe(_)))).count()
    }

    /// How many calls began while another was under way: without these every history has but one order.
    pub(crate) fn overlaps(&self) -> usize {
        let mut open = 0;
        let began = self.events.iter().filter(|(_, called)| {
            open = if *called { open + 1 } else { open - 1 };
            *called && open > 1
        });
        began.count()
    }

    pub(crate) fn is_linearizable(&self) -> bool {
        let mut processes: BTreeMap<(u64, usize), usize> = BTreeMap::new();
        let (mut actions, mut open) = (Vec::new(), Vec::new());
        for (number, called) in &self.events {
            for (at, step) in self.steps[number].iter().enumerate() {
                let next = processes.len();
                let process = *processes.entry((*number, at)).or_insert(next);
                let response = (process, Action::Response(step.clone()));
                match (called, step) {
                    (true, _) => actions.push((process, Action::Call(step.clone()))),
                    // Its answer never came, as far as the order goes.
                    (false, Step::Maybe(_)) => open.push(response),
                    (false, _) => actions.push(response),
                }
            }
        }
        actions.append(&mut open);
        actions.is_empty() || WGLChecker::<OneSeat>::is_linearizable(Recorded::from_actions(actions))
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, called) in &self.events {
            if *called {
                writeln!(f, "  call {number}")?;
            } else {
                writeln!(f, "  answer to {number}: {:?}", self.steps[number])?;
            }
        }
        Ok(())
    }
}
