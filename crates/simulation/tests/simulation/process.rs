//! One life of a manager's process: it runs, stands still, or has ended. What has ended never does anything again; what it had sent
//! before may still arrive.

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
    /// Told apart from every other life.
    pub life: u64,
    pub name: String,
    pub world: Arc<World>,
    status: Mutex<(Status, bool)>,
    /// When it last went on.
    went_on: Mutex<Option<Duration>>,
    changed: Notify,
}

/// Its timers stand still while it does.
#[async_trait]
impl Clock for Process {
    fn elapsed(&self) -> Duration {
        self.world.now()
    }

    async fn sleep(&self, pause: Duration) {
        sleep(pause).await;
        self.gate().await;
    }
}

impl Process {
    pub fn new(world: &Arc<World>, name: &str, life: u64) -> Arc<Self> {
        let (name, world) = (name.to_owned(), world.clone());
        let status = Mutex::new((Status::Running, false));
        Arc::new(Self { life, name, world, status, went_on: Mutex::default(), changed: Notify::new() })
    }

    /// Returns at once if it runs, when it goes on if it stands still, and never if it has ended.
    pub async fn gate(&self) {
        self.becomes(Status::Running).await;
    }

    /// Runs something of this process. While it stands still nothing of that goes on, whichever timer fires; once it has ended nothing ever
    /// does.
    pub async fn paced<T>(self: Arc<Self>, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            self.gate().await;
            let step =
                poll_fn(|context| if self.runs() { work.as_mut().poll(context).map(Some) } else { Poll::Ready(None) });
            if let Some(done) = step.await {
                return done;
            }
        }
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        self.becomes(Status::Dead).await;
    }

    /// Wakes in the order of waiting: so that a seed does the same twice.
    async fn becomes(&self, wanted: Status) {
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

    /// Goes from one of these to another status; answers whether it was one of these.
    fn turn(&self, from: &[Status], to: Status) -> bool {
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

    /// Whether it goes on in this moment: not all of it has come to see what time it is.
    pub fn goes_on_now(&self) -> bool {
        *self.went_on.lock().unwrap_or_else(PoisonError::into_inner) == Some(self.world.now())
    }

    pub fn is_dead(&self) -> bool {
        self.status().0 == Status::Dead
    }

    /// Whether it is cut off from etcd.
    pub fn is_cut(&self) -> bool {
        self.status().1
    }

    pub fn cut(&self, cut: bool) {
        let before = std::mem::replace(&mut self.status().1, cut);
        if before != cut {
            self.world.note(&self.name, if cut { "is cut off from etcd" } else { "reaches etcd again" });
        }
    }

    /// Ends it, as a kill does: what it has locked on the machine is free at once.
    pub fn kill(&self, why: &str) {
        if self.turn(&[Status::Running, Status::Frozen], Status::Dead) {
            self.world.note(&self.name, format_args!("is killed: {why}"));
            let mut state = self.world.lock();
            state.count(Event::Kill);
            state.homes.free(self.life);
        }
    }

    /// Holds it up for a while.
    pub fn freeze(self: &Arc<Self>, length: Duration, why: &str) {
        if !self.turn(&[Status::Running], Status::Frozen) {
            return;
        }
        self.world.note(&self.name, format_args!("stands still for {length:?}: {why}"));
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
        if self.turn(&[Status::Frozen], Status::Running) {
            *self.went_on.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.world.now());
            self.world.note(&self.name, "goes on");
        }
    }
}
