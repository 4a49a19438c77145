//! Output on the terminal, and signals from it.

use std::io::{IsTerminal as _, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use gauntlet_stack::Progress;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Prints a line with a prefix that distinguishes it from the output of other commands.
pub(crate) fn say(line: &str) {
    if stderr().is_terminal() {
        eprintln!("\x1b[36m>\x1b[0m {line}");
    } else {
        eprintln!("> {line}");
    }
}

/// Progress that is printed, and cancelled when the process is asked to stop.
pub(crate) struct Screen<'a>(pub(crate) &'a Stop);

impl Progress for Screen<'_> {
    fn report(&mut self, line: &str) {
        say(line);
    }

    fn cancelled(&self) -> bool {
        self.0.is_requested()
    }
}

/// A request to stop, by signal or from within the process. Clones share it.
#[derive(Clone)]
pub(crate) struct Stop {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Stop {
    /// Listens for signals. From now on SIGINT, SIGTERM and SIGHUP no longer terminate the process.
    pub(crate) fn listen() -> Result<Stop> {
        let stop = Stop { interrupted: Arc::default(), terminated: Arc::default() };
        for (signal, flag) in [(SIGINT, &stop.interrupted), (SIGTERM, &stop.terminated), (SIGHUP, &stop.terminated)] {
            signal_hook::flag::register(signal, Arc::clone(flag)).context("listen for signals")?;
        }
        Ok(stop)
    }

    /// Whether a stop was requested in any way.
    pub(crate) fn is_requested(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed) || self.is_terminated()
    }

    /// Whether the request did not come from Ctrl-C, which a terminal also sends to the children.
    pub(crate) fn is_terminated(&self) -> bool {
        self.terminated.load(Ordering::Relaxed)
    }

    /// Requests a stop from within the process.
    pub(crate) fn request(&self) {
        self.terminated.store(true, Ordering::Relaxed);
    }
}
