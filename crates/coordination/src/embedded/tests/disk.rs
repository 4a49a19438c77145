//! A disk whose power can fail: what was written since the last sync may be lost, in part and in any order.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use gauntlet_domain::Error;
use proptest::{prelude::Rng as _, test_runner::TestRng};
use redb::{Database, StorageBackend};

use super::super::{DEADLINE, Embedded, Instant, Path};

/// What a disk writes as a whole or not at all.
const SECTOR: usize = 512;

/// A file on the disk. Clones are the same file.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk(Arc<Inside>);

#[derive(Debug, Default)]
struct Inside {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// As its process sees it.
    file: Vec<u8>,
    /// As it certainly is on the disk.
    synced: Vec<u8>,
    unsynced: Vec<Change>,
    /// After so many writes and syncs the power fails, and nothing is read or written any more.
    fails_after: Option<usize>,
    syncs: usize,
    /// Syncs wait.
    held: bool,
    /// Syncs that wait, or have waited.
    asked: usize,
}

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
}

impl Change {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => {
                let end = offset + data.len();
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[*offset..end].copy_from_slice(data);
            }
            Self::SetLen(len) => file.resize(*len, 0),
        }
    }

    /// The parts that reach the disk apart from each other.
    fn parts(&self) -> Vec<Change> {
        match self {
            Self::Write(offset, data) => {
                let parts = data.chunks(SECTOR).enumerate();
                parts.map(|(at, part)| Self::Write(offset + at * SECTOR, part.to_vec())).collect()
            }
            Self::SetLen(_) => vec![self.clone()],
        }
    }
}

/// What of the unsynced is on the disk when the power fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    All,
    /// Each part by itself, half of them.
    Some,
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// The store on it.
    pub(super) fn open(&self) -> Result<Embedded, Error> {
        let disk = self.clone();
        let create = move || Database::builder().create_with_backend(disk);
        Embedded::open_database(Path::new("disk"), Box::new(Instant::now), DEADLINE, create)
    }

    /// The power fails after so many more writes and syncs.
    pub(super) fn fails_after(&self, steps: usize) {
        self.state().fails_after = Some(steps);
    }

    /// The disk as it is found when the power is back.
    pub(super) fn power_back(&self, lost: Lost, rng: &mut TestRng) -> Disk {
        let state = self.state();
        let mut file = state.synced.clone();
        if lost == Lost::Some {
            let parts = state.unsynced.iter().flat_map(Change::parts);
            parts.filter(|_| rng.next_u32().is_multiple_of(2)).for_each(|part| part.apply(&mut file));
        }
        Disk::of(file)
    }

    fn of(file: Vec<u8>) -> Disk {
        let state = State { synced: file.clone(), file, ..State::default() };
        Disk(Arc::new(Inside { state: Mutex::new(state), ..Inside::default() }))
    }

    /// Another disk with what is on this one.
    pub(super) fn copy(&self) -> Disk {
        Disk::of(self.state().synced.clone())
    }

    /// How many syncs there were.
    pub(super) fn syncs(&self) -> usize {
        self.state().syncs
    }

    /// How much was written since the last sync.
    pub(super) fn unsynced(&self) -> usize {
        self.state().unsynced.len()
    }

    /// From now on syncs wait.
    pub(super) fn hold(&self) {
        self.state().held = true;
    }

    /// Whether a sync waits.
    pub(super) fn holds(&self) -> bool {
        let state = self.state();
        state.held && state.asked > state.syncs
    }

    pub(super) fn release(&self) {
        self.state().held = false;
        self.0.released.notify_all();
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().file.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (state, offset) = (self.state(), usize::try_from(offset).unwrap());
        state.has_power()?;
        let there = state.file.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(there);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.state().change(Change::SetLen(usize::try_from(len).unwrap()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state();
        state.asked += 1;
        let mut state = self.0.released.wait_while(state, |state| state.held).unwrap();
        state.step()?;
        state.syncs += 1;
        let State { synced, unsynced, .. } = &mut *state;
        unsynced.drain(..).for_each(|change| change.apply(synced));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.state().change(Change::Write(usize::try_from(offset).unwrap(), data.to_vec()))
    }
}

impl State {
    fn has_power(&self) -> io::Result<()> {
        if self.fails_after == Some(0) { Err(io::Error::other("no power")) } else { Ok(()) }
    }

    fn step(&mut self) -> io::Result<()> {
        self.has_power()?;
        self.fails_after = self.fails_after.map(|steps| steps - 1);
        Ok(())
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        self.step()?;
        change.apply(&mut self.file);
        self.unsynced.push(change);
        Ok(())
    }
}
