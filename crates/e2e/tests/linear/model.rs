//! The sequential specification of one instance, and histories of calls for it.

use std::{collections::BTreeMap, fmt};

use todc_utils::{Action, History as Recorded, Specification, WGLChecker};

/// A step that a response implies: a change, or an observation. A create has two steps: it reserves the instance, and shows it when it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// A create reserved the instance, which did not exist.
    Take(u64),
    /// The instance of a create became ready, with the time of its last renewal if known.
    Show(u64, Option<u64>),
    /// The instance of a create could not be provisioned and was removed.
    GiveBack(u64),
    /// The instance was reserved or existed.
    Taken,
    /// The instance was neither reserved nor ready.
    Free,
    /// A read found no ready instance.
    NotShown,
    /// A read found an instance, created and last renewed by these calls.
    Saw { created: u64, renewed: u64 },
    /// A renewal by this call, unless a later call has renewed already. `saw` is the response, if there was one.
    Renew { number: u64, saw: Option<(u64, u64)> },
    /// A renewal whose response has the creating call and the last renewal, which is this or a later one.
    Renewed { created: u64, renewed: u64 },
    /// A renewal at an unknown time.
    RenewedUnseen,
    /// The instance was removed.
    Remove,
    /// The step took effect at some time after its request, or never.
    Maybe(Box<Step>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Free,
    Taken(u64),
    /// `renewed` is `None` until a read returns it.
    Shown {
        created: u64,
        renewed: Option<u64>,
    },
}

/// Returns the state after a step; `None` if the step is impossible in this state.
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
        // An instance whose create was interrupted can be removed before it is ready.
        (Step::Remove, State::Taken(_) | State::Shown { .. }) => Some(State::Free),
        (Step::Maybe(step), state) => Some(after(step, state).unwrap_or(state)),
        _ => None,
    }
}

struct OneInstance;

impl Specification for OneInstance {
    type State = State;
    type Operation = Step;

    fn init() -> State {
        State::Free
    }

    fn apply(step: &Step, state: &State) -> (bool, State) {
        after(step, *state).map_or((false, *state), |after| (true, after))
    }
}

/// Calls and responses in the order of their observation, with the steps that each response implies.
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

    /// Returns the number of calls with an unknown outcome.
    pub(crate) fn unknown(&self) -> usize {
        self.steps.values().filter(|steps| matches!(steps.first(), Some(Step::Maybe(_)))).count()
    }

    /// Returns the number of calls that began during another call. A history without overlaps has only one possible order.
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
                    // The step may come at any time, so its response comes last.
                    (false, Step::Maybe(_)) => open.push(response),
                    (false, _) => actions.push(response),
                }
            }
        }
        actions.append(&mut open);
        actions.is_empty() || WGLChecker::<OneInstance>::is_linearizable(Recorded::from_actions(actions))
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, called) in &self.events {
            if *called {
                writeln!(f, "  call {number}")?;
            } else {
                writeln!(f, "  response to {number}: {:?}", self.steps[number])?;
            }
        }
        Ok(())
    }
}
