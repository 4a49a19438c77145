//! The lock is a first-in, first-out queue. An acquisition that times out, is dropped or loses its lease leaves nothing behind.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use gauntlet_coordination::{Coordination, kv::KeyRange};
use gauntlet_domain::{ChallengeId, Error, LockGuard, LockKind, LockOptions, Result, Store as _};
use proptest::{prelude::*, sample::Index};
use tokio::time::Instant;

use super::{Direct, Unanswered, histories, run};

const REPLICAS: usize = 3;
const KIND: LockKind = LockKind::Rollout;
/// Some acquisitions do not wait, some wait for a few seconds, and some as long as necessary.
const TIMEOUTS: [Duration; 4] =
    [Duration::ZERO, Duration::from_secs(5), Duration::from_secs(3600), Duration::from_secs(3600)];

#[derive(Debug, Clone)]
enum Command {
    Acquire {
        replica: usize,
        timeout: usize,
    },
    /// Polls an acquisition once.
    Poll(Index),
    /// Drops an acquisition at whatever point it has reached.
    Cancel(Index),
    Release(Index),
    /// Polls a release once, then drops it.
    Abandon(Index),
    /// Drops a guard.
    Drop(Index),
    /// Revokes the lease of a replica without notifying it.
    LoseLease(usize),
    /// Loses the response to the next write of a replica.
    Fault {
        replica: usize,
        done: bool,
    },
    /// Advances time: replicas notice lost leases, and acquisitions time out.
    Wait,
    /// Runs all tasks until none can make progress.
    Settle,
}

fn command() -> impl Strategy<Value = Command> {
    let index = any::<Index>;
    prop_oneof![
        8 => (0..REPLICAS, 0..TIMEOUTS.len()).prop_map(|(replica, timeout)| Command::Acquire { replica, timeout }),
        10 => index().prop_map(Command::Poll),
        2 => index().prop_map(Command::Cancel),
        4 => index().prop_map(Command::Release),
        1 => index().prop_map(Command::Abandon),
        2 => index().prop_map(Command::Drop),
        1 => (0..REPLICAS).prop_map(Command::LoseLease),
        1 => (0..REPLICAS, any::<bool>()).prop_map(|(replica, done)| Command::Fault { replica, done }),
        1 => Just(Command::Wait),
        3 => Just(Command::Settle),
    ]
}

/// The state of an acquisition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EntryState {
    /// Waits for the lock, or holds it and has not returned the guard yet.
    Queued,
    Held,
    /// Released, cancelled or timed out; its key may still be stored.
    Leaving,
    /// Its key was removed with its lease.
    Lost,
}

/// An entry of the queue in the model.
#[derive(Debug, Clone)]
struct QueueEntry {
    replica: usize,
    state: EntryState,
    /// Its token, once its key is stored.
    created: Option<u64>,
    ends: Instant,
    /// Whether it may fail, because its lease or the response to a write of its replica was lost.
    excused: bool,
}

type Acquiring = BoxFuture<'static, Result<LockGuard>>;

struct History {
    replicas: Vec<(Direct, Arc<Coordination<Direct>>)>,
    id: ChallengeId,
    /// All acquisitions, in the order in which they started.
    entries: Vec<QueueEntry>,
    acquiring: BTreeMap<usize, Acquiring>,
    held: BTreeMap<usize, LockGuard>,
}

impl History {
    fn new() -> Self {
        let etcd = Direct::new();
        let replicas = (0..REPLICAS).map(|n| etcd.replica(&format!("r{n}"))).collect();
        let id = ChallengeId::new("c").unwrap();
        Self { replicas, id, entries: Vec::new(), acquiring: BTreeMap::new(), held: BTreeMap::new() }
    }

    async fn run(mut self, commands: Vec<Command>) {
        self.settle().await;
        for command in commands {
            self.step(command).await;
            self.observe();
        }
        self.finish().await;
    }

    async fn step(&mut self, command: Command) {
        let picked = |map: &BTreeMap<usize, _>, index: Index| nth(map.keys(), index);
        match command {
            Command::Acquire { replica, timeout } => self.acquire(replica, TIMEOUTS[timeout]),
            Command::Poll(index) => {
                if let Some(n) = picked(&self.acquiring, index) {
                    self.poll(n);
                }
            }
            Command::Cancel(index) => {
                if let Some(n) = picked(&self.acquiring, index) {
                    self.acquiring.remove(&n);
                    self.leave(n);
                }
            }
            Command::Release(index) | Command::Abandon(index) | Command::Drop(index) => {
                let Some(n) = nth(self.held.keys(), index) else { return };
                let held = self.held.remove(&n).unwrap();
                self.leave(n);
                let mut released = async move { held.release().await }.boxed();
                match command {
                    Command::Release(_) => drop(tokio::spawn(released)),
                    Command::Abandon(_) => drop(futures::poll!(&mut released)),
                    // Never polled, so that the guard is dropped with it.
                    _ => {}
                }
            }
            Command::LoseLease(replica) => {
                self.replicas[replica].0.lose_lease();
                for entry in self.entries.iter_mut().filter(|entry| entry.replica == replica) {
                    entry.excused = true;
                    if entry.created.is_some() {
                        entry.state = EntryState::Lost;
                    }
                }
            }
            Command::Fault { replica, done } => {
                let fault = if done { Unanswered::Done } else { Unanswered::NotDone };
                let mut own = self.replicas[replica].0.own();
                // One at a time, so that no write is retried for long.
                if own.faults.is_empty() {
                    own.faults.push_back(fault);
                }
                drop(own);
                self.entries.iter_mut().filter(|entry| entry.replica == replica).for_each(|entry| entry.excused = true);
            }
            Command::Wait => {
                tokio::time::sleep(Duration::from_secs(6)).await;
                self.settle().await;
                for (n, held) in &self.held {
                    let knows = held.lost().now_or_never().is_some();
                    assert!(
                        knows || self.entries[*n].state == EntryState::Held,
                        "{n} was not notified that its lease was lost"
                    );
                }
            }
            Command::Settle => self.settle().await,
        }
    }

    fn acquire(&mut self, replica: usize, timeout: Duration) {
        let (client, store) = &self.replicas[replica];
        let (store, id, n) = (store.clone(), self.id.clone(), self.entries.len());
        let options = LockOptions { traceparent: Some(n.to_string()), timeout };
        self.acquiring.insert(n, async move { store.lock(KIND, &id, &options).await }.boxed());
        self.entries.push(QueueEntry {
            replica,
            state: EntryState::Queued,
            created: None,
            ends: Instant::now() + timeout,
            excused: !client.own().faults.is_empty(),
        });
    }

    fn leave(&mut self, n: usize) {
        if self.entries[n].state != EntryState::Lost {
            self.entries[n].state = EntryState::Leaving;
        }
    }

    /// Returns the stored tokens, by acquisition.
    fn stored(&self) -> BTreeMap<usize, u64> {
        let server = self.replicas[0].0.server();
        let live = KeyRange::between("p/live ", "p/live!");
        let stored = server.range(&live).map(|(_, entry)| {
            let owner: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
            (owner["origin"].as_str().unwrap().parse().unwrap(), entry.create_revision)
        });
        stored.collect()
    }

    /// Records the tokens of acquisitions whose keys are stored.
    fn observe(&mut self) {
        for (n, created) in self.stored() {
            let before = self.entries[n].created.replace(created);
            assert!(before.is_none_or(|before| before == created), "{n} has a second key");
        }
    }

    /// Returns the entries ahead of `n` in the queue.
    fn ahead(&self, n: usize, stored: &BTreeMap<usize, u64>) -> Vec<usize> {
        let entry = &self.entries[n];
        let blocks = |(other, before): &(usize, &QueueEntry)| {
            before.created.is_some_and(|created| Some(created) < entry.created)
                && match before.state {
                    EntryState::Queued | EntryState::Held => true,
                    // Handed over within a replica; another replica must wait until the key is removed.
                    EntryState::Leaving => before.replica != entry.replica && stored.contains_key(other),
                    EntryState::Lost => false,
                }
        };
        self.entries.iter().enumerate().filter(blocks).map(|(other, _)| other).collect()
    }

    fn poll(&mut self, n: usize) {
        let Some(answer) = self.acquiring.get_mut(&n).unwrap().now_or_never() else { return self.observe() };
        self.acquiring.remove(&n);
        self.observe();
        let stored = self.stored();
        let entry = self.entries[n].clone();
        match answer {
            Ok(held) => {
                assert!(
                    entry.state == EntryState::Lost || entry.created == Some(held.token),
                    "{n} has a token other than its key's"
                );
                if entry.state == EntryState::Queued {
                    let ahead = self.ahead(n, &stored);
                    assert!(ahead.is_empty(), "{n} acquired the lock before {ahead:?}: {:#?}", self.entries);
                    self.entries[n].state = EntryState::Held;
                }
                self.held.insert(n, held);
            }
            Err(Error::Busy { .. }) => {
                assert!(Instant::now() >= entry.ends, "{n} timed out before its deadline");
                self.leave(n);
            }
            Err(Error::Unavailable { .. }) => {
                assert!(entry.excused, "{n} failed without a fault");
                self.leave(n);
            }
            Err(error) => panic!("{n}: {error}"),
        }
    }

    /// Runs all tasks until none can make progress, then compares with the model.
    async fn settle(&mut self) {
        let mut unchanged = 0;
        while unchanged < 3 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.observe();
            let before = (self.acquiring.len(), self.stored());
            for n in self.acquiring.keys().copied().collect::<Vec<_>>() {
                // An acquisition takes several steps.
                for _ in 0..4 {
                    if self.acquiring.contains_key(&n) {
                        self.poll(n);
                    }
                }
            }
            unchanged = if (self.acquiring.len(), self.stored()) == before { unchanged + 1 } else { 0 };
        }
        let stored = self.stored();
        for (n, entry) in self.entries.iter().enumerate() {
            match entry.state {
                EntryState::Held => {
                    assert!(stored.contains_key(&n), "{n} holds the lock without a key: {:#?}", self.entries)
                }
                EntryState::Queued => {
                    assert!(stored.contains_key(&n), "{n} waits without a key");
                    let ahead = self.ahead(n, &stored);
                    assert!(!ahead.is_empty(), "{n} waits though no entry is ahead: {:#?}", self.entries);
                }
                EntryState::Leaving | EntryState::Lost => {
                    assert!(!stored.contains_key(&n), "{n} left its key behind")
                }
            }
        }
    }

    /// Drops everything and checks that nothing is left.
    async fn finish(mut self) {
        self.acquiring.clear();
        self.held.clear();
        self.replicas.iter().for_each(|(client, _)| client.own().faults.clear());
        // Unconfirmed writes are looked up at once, and no write is delayed here.
        tokio::time::sleep(Duration::from_secs(20)).await;
        let none = LockOptions::default();
        for (_, store) in &self.replicas {
            assert_eq!(store.waits(1).0, 0);
            assert_eq!(store.queue(KIND, &self.id).await.unwrap(), []);
            let held = store.lock(KIND, &self.id, &none).await.unwrap();
            let last = self.entries.iter().filter_map(|entry| entry.created).max();
            assert!(last.is_none_or(|last| held.token > last), "token {} is not above {last:?}", held.token);
            held.release().await.unwrap();
        }
        assert_eq!(self.stored(), BTreeMap::new());
    }
}

fn nth<'a>(keys: impl ExactSizeIterator<Item = &'a usize>, index: Index) -> Option<usize> {
    let mut keys = keys;
    let count = keys.len();
    if count == 0 { None } else { keys.nth(index.index(count)).copied() }
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn the_lock_is_a_queue(commands in proptest::collection::vec(command(), 1..24)) {
        run(async { History::new().run(commands).await });
    }
}
