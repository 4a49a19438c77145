//! Control groups (v2), one for each instance, so that the whole instance can be killed by name even if its supervisor was killed.
//!
//! Only `cgroup.kill` and `populated` are used. No controller is enabled and no limit is set, so a group needs no delegated controllers, and
//! may exist beside the manager's own process.

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

/// The prefix of the groups' names.
const PREFIX: &str = "gauntlet-";
static PROBES: AtomicU64 = AtomicU64::new(0);
const PAUSE: Duration = Duration::from_millis(1);

/// The groups of one directory of instances, below the manager's own group.
#[derive(Debug, Clone)]
pub(super) struct Groups {
    base: PathBuf,
    prefix: String,
}

impl Groups {
    /// Checks whether groups can be created below this process's own group, for the directory of instances with that hash. The error says why not.
    pub(super) fn detect(dir: &str) -> Result<Self, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let base = own_group(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)?;
        rustix::fs::access(base.join("cgroup.procs"), Access::WRITE_OK)
            .map_err(|error| format!("{}/cgroup.procs: {error}", base.display()))?;
        // The name is unique even if other managers try at the same time, here or in other PID namespaces.
        let (pid, nth) = (std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
        let probe = Group::new(base.join(format!("{PREFIX}probe-{dir}-{pid}-{nth}")));
        let created = probe.create().and_then(|()| {
            let kind = std::fs::read_to_string(probe.dir.join("cgroup.type"))?;
            Ok((kind, probe.dir.join("cgroup.kill").exists()))
        });
        let removed = probe.remove();
        match created.and_then(|created| removed.map(|()| created)) {
            Err(error) => Err(format!("a group below {}: {error}", base.display())),
            Ok((_, false)) => Err("this kernel has no cgroup.kill, which needs Linux 5.14".to_owned()),
            Ok((kind, true)) if kind.trim() != "domain" => {
                Err(format!("a group below {} is of type {}", base.display(), kind.trim()))
            }
            Ok(_) => Ok(Self { base, prefix: format!("{PREFIX}{dir}-") }),
        }
    }

    /// The path of the group of the instance `key`.
    pub(super) fn path(&self, key: &str) -> PathBuf {
        self.base.join(format!("{}{key}", self.prefix))
    }

    /// The keys of all instances that have a group.
    pub(super) fn keys(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.base)?;
        Ok(entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_prefix(&self.prefix)?.to_owned()))
            .collect())
    }
}

/// The directory of this process's group.
fn own_group(cgroup: &str, mountinfo: &str) -> Result<PathBuf, String> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).ok_or("this process is in no cgroup v2")?;
    let mount = mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        right.starts_with("cgroup2 ").then(|| Some((fields.next()?, fields.next()?)))?
    });
    let (root, at) = mount.ok_or("cgroup v2 is not mounted")?;
    let below = Path::new(own).strip_prefix(root).map_err(|_| format!("cgroup v2 is mounted at {at} without {own}"))?;
    if below.components().any(|part| part.as_os_str() == "..") {
        return Err(format!("this process's cgroup {own} is outside the hierarchy mounted at {at}"));
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

    /// Creates an empty group. Kills and removes an earlier group of that name. Blocks.
    pub(super) fn recreate(&self, timeout: Duration) -> io::Result<()> {
        match self.create() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.kill(timeout)?;
                self.create()
            }
            created => created,
        }
    }

    fn create(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o755).create(&self.dir)?;
        // A group with child groups can't be removed.
        std::fs::write(self.dir.join("cgroup.max.descendants"), "0")
    }

    /// Moves a process into the group. Succeeds if the process has exited. The kernel may take some 10 ms.
    pub(super) fn add(&self, pid: i32) -> io::Result<()> {
        match std::fs::write(self.dir.join("cgroup.procs"), pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
            added => added,
        }
    }

    /// The processes in the group.
    pub(super) fn processes(&self) -> io::Result<BTreeSet<i32>> {
        let text = std::fs::read_to_string(self.dir.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Kills all processes in the group, including those being forked, waits until they have exited, and removes the group. Succeeds if the
    /// group doesn't exist. Returns whether there were processes. Blocks.
    pub(super) fn kill(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut found = false;
        loop {
            match self.populated() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
                Err(error) => return Err(error),
                Ok(false) => return self.remove().map(|()| found),
                Ok(true) if Instant::now() >= deadline => {
                    let left: Vec<String> = self.processes()?.iter().map(ToString::to_string).collect();
                    return Err(io::Error::other(format!("processes {} do not exit", left.join(", "))));
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

    /// Removes the group. Fails while a process is in it; succeeds if the group doesn't exist.
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
    fn own_group_is_found_at_any_mount() {
        let mixed = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                     32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(own_group("1:cpu:/x\n0::/\n", mixed), Ok("/sys/fs/cgroup/unified".into()));
        assert_eq!(own_group("0::/a/b\n", mixed), Ok("/sys/fs/cgroup/unified/a/b".into()));
        let inner = "41 31 0:38 /docker/1 /sys/fs/cgroup rw master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(own_group("0::/docker/1/x\n", inner), Ok("/sys/fs/cgroup/x".into()));
        for (cgroup, mounts) in [("0::/other\n", inner), ("0::/../x\n", mixed), ("1:cpu:/\n", mixed), ("0::/\n", "")] {
            assert!(own_group(cgroup, mounts).is_err(), "{cgroup}");
        }
    }
}
