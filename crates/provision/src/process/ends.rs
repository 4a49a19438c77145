//! Reports instances that end on their own, as soon as they do.

use std::{
    collections::BTreeMap, ffi::OsStr, mem::MaybeUninit, os::fd::OwnedFd, os::unix::ffi::OsStrExt as _, path::PathBuf,
};

use gauntlet_domain::{ProvisionedInstance, Result};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::{io::unix::AsyncFd, time::Instant};

use super::{
    blocking::{blocking, failed, readable},
    listing::{self, Fate},
    record::RUN,
    restart::Restart,
};

/// Reports instances that have ended on their own.
///
/// A supervisor keeps its lock file open while it lives, and all lock files are in one directory: an inotify watch on that directory reports
/// each supervisor that exits, even a killed one. Its cost doesn't depend on the number of instances.
#[derive(Debug)]
pub struct Ends {
    instances: PathBuf,
    restart: Restart,
    watch: AsyncFd<OwnedFd>,
    /// The instances to check, and when.
    due: BTreeMap<String, Instant>,
}

impl Ends {
    pub(super) fn watch(dir: &std::path::Path, restart: Restart) -> Result<Self> {
        let watch = || {
            let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&watch, dir.join(RUN), WatchFlags::CLOSE_WRITE)?;
            readable(watch)
        };
        let watch = watch().map_err(failed("watch", "watching the supervisor locks"))?;
        Ok(Self { instances: dir.join("instances"), restart, watch, due: BTreeMap::new() })
    }

    /// Waits for the next instance that ended on its own and is due to be launched again. An instance that ends repeatedly is reported after the
    /// growing delays of [`Restart`].
    ///
    /// # Cancel safety
    /// Cancel safe: no instance is missed.
    pub async fn next(&mut self) -> Result<ProvisionedInstance> {
        loop {
            let next = self.due.iter().min_by_key(|(_, at)| **at).map(|(key, at)| (key.clone(), *at));
            match next {
                Some((key, at)) if at <= Instant::now() => {
                    let (dir, restart) = (self.instances.join(&key), self.restart.clone());
                    let fate = blocking(move || {
                        listing::check(&dir, &restart).map_err(failed("watch", "checking an instance"))
                    });
                    match fate.await {
                        Ok(Fate::Later(pause)) => drop(self.due.insert(key, Instant::now() + pause)),
                        fate => {
                            self.due.remove(&key);
                            if let Fate::Ended(found) = fate? {
                                return Ok(found);
                            }
                        }
                    }
                }
                Some((_, at)) => {
                    let _ = tokio::time::timeout_at(at, self.read()).await;
                }
                None => self.read().await,
            }
        }
    }

    /// Waits for events, and schedules a check of their instances.
    async fn read(&mut self) {
        let Ok(mut ready) = self.watch.readable().await else { return };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(self.watch.get_ref(), &mut buffer);
        let now = Instant::now();
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    // Events were lost: check all instances.
                    let all = std::fs::read_dir(&self.instances).into_iter().flatten().flatten();
                    self.due.extend(all.filter_map(|entry| Some((entry.file_name().into_string().ok()?, now))));
                }
                Ok(event) => {
                    let name = event.file_name().and_then(|name| OsStr::from_bytes(name.to_bytes()).to_str());
                    self.due.extend(name.map(|name| (name.to_owned(), now)));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break,
            }
        }
        ready.clear_ready();
    }
}
