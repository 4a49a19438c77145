//! Control groups (v2): one for each instance, by whose name all of it can be ended, whatever became of its supervisor.
//!
//! Only `cgroup.kill` and `populated` are used. No controller is enabled and no limit set, so that a group needs no delegation of
//! controllers and can stand beside the manager's own process.

use std::{
    collections::BTreeSet,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::fs::Access;

/// What the names of our groups begin with.
const PREFIX: &str = "gauntlet-";
static PROBES: AtomicU64 = AtomicU64::new(0);
const PAUSE: Duration = Duration::from_millis(1);

/// Where the groups of one directory of instances are made: below the manager's own group.
#[derive(Debug, Clone)]
pub(super) struct Groups {
    base: PathBuf,
    prefix: String,
}

impl Groups {
    /// Below this process's own group, for the directory of instances of that hash. The error says why none can be made there.
    pub(super) fn find(dir: &str) -> Result<Self, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let base = own(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)?;
        rustix::fs::access(base.join("cgroup.procs"), Access::WRITE_OK)
            .map_err(|error| format!("{}/cgroup.procs: {error}", base.display()))?;
        // Other managers may try at the same time, here and in other pid namespaces.
        let (pid, nth) = (std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
        let probe = Group::new(base.join(format!("{PREFIX}probe-{dir}-{pid}-{nth}")));
        let tried = probe.make().and_then(|()| {
            let kind = std::fs::read_to_string(probe.dir.join("cgroup.type"))?;
            Ok((kind, probe.dir.join("cgroup.kill").exists()))
        });
        let removed = probe.remove();
        match tried.and_then(|tried| removed.map(|()| tried)) {
            Err(error) => Err(format!("a group below {}: {error}", base.display())),
            Ok((_, false)) => Err("this kernel has no cgroup.kill (it comes with Linux 5.14)".to_owned()),
            Ok((kind, true)) if kind.trim() != "domain" => {
                Err(format!("a group below {} is of type {}", base.display(), kind.trim()))
            }
            Ok(_) => Ok(Self { base, prefix: format!("{PREFIX}{dir}-") }),
        }
    }

    /// The group of the instance of that key.
    pub(super) fn path(&self, key: &str) -> PathBuf {
        self.base.join(format!("{}{key}", self.prefix))
    }

    /// The keys of all groups that are there.
    pub(super) fn keys(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.base)?;
        Ok(entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_prefix(&self.prefix)?.to_owned()))
            .collect())
    }
}

/// The directory of this process's group.
fn own(cgroup: &str, mountinfo: &str) -> Result<PathBuf, String> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).ok_or("this process is in no cgroup v2")?;
    let mount = mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        right.starts_with("cgroup2 ").then(|| Some((fields.next()?, fields.next()?)))?
    });
    let (root, at) = mount.ok_or("cgroup v2 is not mounted")?;
    let below = Path::new(own).strip_prefix(root).map_err(|_| format!("cgroup v2 is mounted at {at} without {own}"))?;
    if below.components().any(|part| part.as_os_str() == "..") {
        return Err(format!("this process's cgroup {own} lies outside of what is mounted at {at}"));
    }
    Ok(Path::new(at).join(below))
}

/// The group of one instance.
#[derive(Debug, Clone)]
pub(super) struct Group {
    dir: PathBuf,
}

impl Group {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Makes it empty; whatever an earlier one of that name still holds is ended first. Blocks.
    pub(super) fn renew(&self, patience: Duration) -> io::Result<()> {
        match self.make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.end(patience)?;
                self.make()
            }
            made => made,
        }
    }

    fn make(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o755).create(&self.dir)?;
        // Groups below it would be in the way when it is removed.
        std::fs::write(self.dir.join("cgroup.max.descendants"), "0")
    }

    /// Moves a process into it; one that has ended is success. May wait for the kernel, some 10 ms.
    pub(super) fn add(&self, pid: i32) -> io::Result<()> {
        match std::fs::write(self.dir.join("cgroup.procs"), pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
            added => added,
        }
    }

    /// The processes in it.
    pub(super) fn processes(&self) -> io::Result<BTreeSet<i32>> {
        let text = std::fs::read_to_string(self.dir.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Kills all that is in it, also what is being forked this moment, waits until nothing is left, and removes it. One that is not there
    /// is success. Answers whether anything was left. Blocks.
    pub(super) fn end(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        let mut found = false;
        loop {
            match self.populated() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
                Err(error) => return Err(error),
                Ok(false) => return self.remove().map(|()| found),
                Ok(true) if Instant::now() >= deadline => {
                    let left: Vec<String> = self.processes()?.iter().map(ToString::to_string).collect();
                    return Err(io::Error::other(format!("processes {} do not end", left.join(", "))));
                }
                Ok(true) => {
                    found = true;
                    std::fs::write(self.dir.join("cgroup.kill"), "1")?;
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn populated(&self) -> io::Result<bool> {
        Ok(std::fs::read_to_string(self.dir.join("cgroup.events"))?.lines().any(|line| line == "populated 1"))
    }

    /// Removes it; refused while a process is in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_wherever_it_is_mounted() {
        let mixed = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                     32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(own("1:cpu:/x\n0::/\n", mixed), Ok("/sys/fs/cgroup/unified".into()));
        assert_eq!(own("0::/a/b\n", mixed), Ok("/sys/fs/cgroup/unified/a/b".into()));
        let inner = "41 31 0:38 /docker/1 /sys/fs/cgroup rw master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(own("0::/docker/1/x\n", inner), Ok("/sys/fs/cgroup/x".into()));
        for (cgroup, mounts) in [("0::/other\n", inner), ("0::/../x\n", mixed), ("1:cpu:/\n", mixed), ("0::/\n", "")] {
            assert!(own(cgroup, mounts).is_err(), "{cgroup}");
        }
    }
}
