//! Runs a program in namespaces of its own, with a minimal root, without capabilities, and with limits.
//!
//! Three processes are involved:
//!
//! - the *supervisor*, which calls this crate: [`Stage::start`] and [`Stage::run`]. It has the caller's credentials and is outside the sandbox.
//! - the *stage*: the same executable, started again so that its memory holds none of the supervisor's secrets. It enters the namespaces and
//!   builds the root. In them it is process 1 and reaps orphans; when it ends, the kernel kills every process of the sandbox.
//! - the *program*, a child of the stage, which gives up every privilege before it calls exec.
//!
//! Mount, PID and network namespaces belong to the user namespace outside the sandbox, and the program runs in an inner one that maps a single
//! user: even a capability that it regained there would not let it mount, configure the network or signal others.
//!
//! A supervisor's `main` must call [`run_if_requested`] first. No step is skipped: if one fails, the start fails with its name and error
//! ([`Failure`]). [`probe()`] tells in advance which [`Level`] this machine allows.

mod control;
mod failure;
mod filter;
pub mod forward;
mod landlock_rules;
mod level;
mod privileges;
mod probe;
mod program;
mod root;
mod spec;
mod stage;
mod start;
mod sys;

pub use self::{
    control::Exit,
    failure::Failure,
    level::Level,
    probe::{Probe, probe},
    spec::{Bind, HostPaths, ResourceLimits, Root, Spec, View},
    stage::run_if_requested,
    start::{Running, Stage},
};
