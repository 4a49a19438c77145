//! What a person sees, and the signals that they send.

use std::io::{IsTerminal as _, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use gauntlet_stack::Progress;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Prints one line, told apart from the output of the commands around it.
pub(crate) fn say(line: &str) {
    if stderr().is_terminal() {
        eprintln!("\x1b[36m>\x1b[0m {line}");
    } else {
        eprintln!("> {line}");
    }
}

/// Progress on the screen, given up when the process is asked to end.
pub(crate) struct Screen<'a>(pub(crate) &'a Stop);

impl Progress for Screen<'_> {
    fn report(&mut self, line: &str) {
        say(line);
    }

    fn cancelled(&self) -> bool {
        self.0.asked()
    }
}

/// Whether the process was asked to end, and how. From the first of these on, such signals no longer end the process by themselves.
#[derive(Clone)]
pub(crate) struct Stop {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Stop {
    pub(crate) fn listen() -> Result<Stop> {
        let stop = Stop { interrupted: Arc::default(), terminated: Arc::default() };
        for (signal, flag) in [(SIGINT, &stop.interrupted), (SIGTERM, &stop.terminated), (SIGHUP, &stop.terminated)] {
            signal_hook::flag::register(signal, Arc::clone(flag)).context("listen for signals")?;
        }
        Ok(stop)
    }

    /// By Ctrl-C, SIGTERM or a terminal that went away.
    pub(crate) fn asked(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed) || self.terminated()
    }

    /// By SIGTERM or a terminal that went away: nobody else has told the children.
    pub(crate) fn terminated(&self) -> bool {
        self.terminated.load(Ordering::Relaxed)
    }

    /// From within the process.
    pub(crate) fn ask(&self) {
        self.terminated.store(true, Ordering::Relaxed);
    }
}
