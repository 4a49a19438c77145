use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT, which ask a process to shut down.
const SHUTDOWN: [SignalKind; 2] = [SignalKind::terminate(), SignalKind::interrupt()];

/// Makes the second SIGTERM or SIGINT, and every one after it, end the process at once, whatever it is doing. The first only sets a flag:
/// handle it with [`ShutdownSignals`].
///
/// # Errors
/// When the handlers cannot be registered.
pub fn exit_on_second_signal() -> io::Result<()> {
    let received = Arc::new(AtomicBool::new(false));
    for signal in SHUTDOWN.map(|kind| kind.as_raw_value()) {
        // Handlers run in the order of registration, so the first signal finds the flag unset.
        signal_hook::flag::register_conditional_default(signal, received.clone())?;
        signal_hook::flag::register(signal, received.clone())?;
    }
    Ok(())
}

/// SIGTERM and SIGINT, as events.
#[derive(Debug)]
pub struct ShutdownSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
}

impl ShutdownSignals {
    /// Starts listening. From now on neither signal ends the process by itself. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the handlers cannot be registered.
    pub fn listen() -> io::Result<Self> {
        let [terminate, interrupt] = SHUTDOWN;
        Ok(Self { terminate: signal(terminate)?, interrupt: signal(interrupt)?, hangup: None })
    }

    /// The same with SIGHUP, which a process gets when its terminal is closed.
    ///
    /// # Errors
    /// When the handlers cannot be registered.
    pub fn listen_with_hangup() -> io::Result<Self> {
        Ok(Self { hangup: Some(signal(SignalKind::hangup())?), ..Self::listen()? })
    }

    /// Waits for the next of these signals.
    ///
    /// # Cancel safety
    /// Dropping the future loses no signal.
    pub async fn recv(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = hangup => {}
        }
    }
}
