//! One life of a manager's process. It runs, is paused, or has ended. A process that has ended never does anything again, but messages that it
//! has sent may still arrive.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use gauntlet_coordination::kv::KeyRange;
use gauntlet_domain::Clock;
use tokio::{sync::Notify, time::sleep};

use super::{PREFIX, coverage::Event, manager::LEASE, world::World};
use crate::etcd::Entry;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Running,
    Frozen,
    Dead,
}

/// One life.
pub struct Process {
    /// Unique among all lives.
    pub life: u64,
    pub name: String,
    pub world: Arc<World>,
    status: Mutex<(Status, bool)>,
    /// When it was last resumed.
    resumed_at: Mutex<Option<Duration>>,
    changed: Notify,
}

/// Timers of a paused process do not fire.
#[async_trait]
impl Clock for Process {
    fn elapsed(&self) -> Duration {
        self.world.now()
    }

    async fn sleep(&self, pause: Duration) {
        sleep(pause).await;
        self.wait_until_running().await;
    }
}

impl Process {
    pub fn new(world: &Arc<World>, name: &str, life: u64) -> Arc<Self> {
        let (name, world) = (name.to_owned(), world.clone());
        let status = Mutex::new((Status::Running, false));
        Arc::new(Self { life, name, world, status, resumed_at: Mutex::default(), changed: Notify::new() })
    }

    /// Waits until the process runs. Returns at once if it runs now, and never if it has ended.
    pub async fn wait_until_running(&self) {
        self.wait_for(Status::Running).await;
    }

    /// Runs work of this process. The work makes progress only while the process runs, whichever of its timers fire.
    pub async fn run_while_running<T>(self: Arc<Self>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            self.wait_until_running().await;
            let step =
                poll_fn(|context| if self.runs() { work.as_mut().poll(context).map(Some) } else { Poll::Ready(None) });
            if let Some(done) = step.await {
                return done;
            }
        }
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) {
        self.wait_for(Status::Dead).await;
    }

    /// Waiters wake in the order of waiting, so that a seed is reproducible.
    async fn wait_for(&self, wanted: Status) {
        loop {
            let changed = self.changed.notified();
            if self.status().0 == wanted {
                return;
            }
            changed.await;
        }
    }

    fn status(&self) -> std::sync::MutexGuard<'_, (Status, bool)> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status if it is one of `from`, and returns whether it was.
    fn transition(&self, from: &[Status], to: Status) -> bool {
        let mut status = self.status();
        let turns = from.contains(&status.0);
        if turns {
            status.0 = to;
            self.changed.notify_waiters();
        }
        turns
    }

    pub fn runs(&self) -> bool {
        self.status().0 == Status::Running
    }

    /// Whether it was resumed at the current time, so that some of its tasks have not seen the new time yet.
    pub fn resumed_now(&self) -> bool {
        *self.resumed_at.lock().unwrap_or_else(PoisonError::into_inner) == Some(self.world.now())
    }

    pub fn is_dead(&self) -> bool {
        self.status().0 == Status::Dead
    }

    /// Whether the network between it and etcd is partitioned.
    pub fn is_partitioned(&self) -> bool {
        self.status().1
    }

    pub fn set_partitioned(&self, partitioned: bool) {
        let before = std::mem::replace(&mut self.status().1, partitioned);
        if before != partitioned {
            self.world.log(&self.name, if partitioned { "is partitioned from etcd" } else { "reaches etcd again" });
        }
    }

    /// Kills it. Its locks on the machine are released at once.
    pub fn kill(&self, why: &str) {
        if self.transition(&[Status::Running, Status::Frozen], Status::Dead) {
            self.world.log(&self.name, format_args!("is killed: {why}"));
            let mut state = self.world.lock();
            state.count(Event::Kill);
            state.directories.release_locks(self.life);
        }
    }

    /// Pauses it for `length`.
    pub fn freeze(self: &Arc<Self>, length: Duration, why: &str) {
        if !self.transition(&[Status::Running], Status::Frozen) {
            return;
        }
        self.world.log(&self.name, format_args!("is paused for {length:?}: {why}"));
        {
            let mut state = self.world.lock();
            state.count(Event::Pause);
            if length > LEASE {
                state.count(Event::PauseBeyondLease);
                let mine = format!("\"replica\":\"{}\"", self.name);
                let live = KeyRange::between(format!("{PREFIX}live "), format!("{PREFIX}live!"));
                let owns = |entry: &Entry| String::from_utf8_lossy(&entry.value).contains(&mine);
                if state.etcd.range(&live).any(|(_, entry)| owns(entry)) {
                    state.count(Event::PauseBeyondLeaseAtWork);
                }
            }
        }
        let process = self.clone();
        tokio::spawn(async move {
            sleep(length).await;
            process.thaw();
        });
    }

    pub fn thaw(&self) {
        if self.transition(&[Status::Frozen], Status::Running) {
            *self.resumed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.world.now());
            self.world.log(&self.name, "resumes");
        }
    }
}
