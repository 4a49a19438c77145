//! Sleeps for less than a millisecond, the resolution of tokio's timers.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

use super::blocking::readable;

/// A timer with the kernel's resolution.
#[derive(Debug)]
pub(super) struct FineTimer(AsyncFd<OwnedFd>);

impl FineTimer {
    /// # Errors
    /// If the timer can't be created, for example because too many files are open.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self(readable(timer)?))
    }

    /// Sleeps for `pause`, at least a nanosecond.
    ///
    /// # Cancel safety
    /// Cancel safe: the next call sets the timer again.
    pub(super) async fn sleep(&self, pause: Duration) -> io::Result<()> {
        let pause = pause.max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: pause.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: pause.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec::default(), it_value };
        rustix::time::timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(&self.0, &mut [0; 8]) {
                // Readiness that an earlier call left behind.
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                read => {
                    ready.clear_ready();
                    return read.map(drop).map_err(Into::into);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn cancelled_sleep_does_not_shorten_the_next() {
        let timer = FineTimer::new().unwrap();
        for _ in 0..3 {
            assert!(
                tokio::time::timeout(Duration::from_millis(5), timer.sleep(Duration::from_secs(60))).await.is_err()
            );
            timer.sleep(Duration::ZERO).await.unwrap();
            let began = Instant::now();
            timer.sleep(Duration::from_millis(3)).await.unwrap();
            assert!(began.elapsed() >= Duration::from_millis(3));
        }
    }
}
