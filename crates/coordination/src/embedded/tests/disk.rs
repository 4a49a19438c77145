//! A disk that can lose power: writes since the last sync may be lost, in part and in any order.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use gauntlet_domain::Error;
use proptest::{prelude::Rng as _, test_runner::TestRng};
use redb::{Database, StorageBackend};

use super::super::{DEADLINE, Embedded, Instant, Path};

/// The unit that a disk writes atomically, in bytes.
const SECTOR: usize = 512;

/// A disk with one file. Clones share the file.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The file as the process sees it.
    file: Vec<u8>,
    /// The file as the last sync left it on the disk.
    synced: Vec<u8>,
    unsynced: Vec<Change>,
    /// The number of writes and syncs until the power fails; every later read or write fails.
    fails_after: Option<usize>,
    syncs: usize,
    /// Whether syncs block.
    blocked: bool,
    /// Syncs started, including those that block.
    started_syncs: usize,
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

    /// The parts that reach the disk independently.
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

/// Which unsynced writes are lost when the power fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    All,
    /// Each part independently with probability one half.
    Some,
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// Opens the store on this disk.
    pub(super) fn open(&self) -> Result<Embedded, Error> {
        let disk = self.clone();
        let create = move || Database::builder().create_with_backend(disk);
        Embedded::open_database(Path::new("disk"), Box::new(Instant::now), DEADLINE, create)
    }

    /// Makes the power fail after `steps` more writes and syncs.
    pub(super) fn fails_after(&self, steps: usize) {
        self.state().fails_after = Some(steps);
    }

    /// Returns the disk as it is after the power failure.
    pub(super) fn restore_power(&self, lost: Lost, rng: &mut TestRng) -> Disk {
        let state = self.state();
        let mut file = state.synced.clone();
        if lost == Lost::Some {
            let parts = state.unsynced.iter().flat_map(Change::parts);
            parts.filter(|_| rng.next_u32().is_multiple_of(2)).for_each(|part| part.apply(&mut file));
        }
        Disk::with_file(file)
    }

    fn with_file(file: Vec<u8>) -> Disk {
        let state = State { synced: file.clone(), file, ..State::default() };
        Disk(Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }))
    }

    /// Copies the disk in its synced state.
    pub(super) fn copy(&self) -> Disk {
        Disk::with_file(self.state().synced.clone())
    }

    /// The number of completed syncs.
    pub(super) fn syncs(&self) -> usize {
        self.state().syncs
    }

    /// The number of writes since the last sync.
    pub(super) fn unsynced(&self) -> usize {
        self.state().unsynced.len()
    }

    /// Blocks syncs until [`Disk::release_syncs`].
    pub(super) fn block_syncs(&self) {
        self.state().blocked = true;
    }

    /// Whether a sync is blocked.
    pub(super) fn has_blocked_sync(&self) -> bool {
        let state = self.state();
        state.blocked && state.started_syncs > state.syncs
    }

    pub(super) fn release_syncs(&self) {
        self.state().blocked = false;
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
        let data = state.file.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.state().change(Change::SetLen(usize::try_from(len).unwrap()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state();
        state.started_syncs += 1;
        let mut state = self.0.released.wait_while(state, |state| state.blocked).unwrap();
        state.use_step()?;
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

    fn use_step(&mut self) -> io::Result<()> {
        self.has_power()?;
        self.fails_after = self.fails_after.map(|steps| steps - 1);
        Ok(())
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        self.use_step()?;
        change.apply(&mut self.file);
        self.unsynced.push(change);
        Ok(())
    }
}
