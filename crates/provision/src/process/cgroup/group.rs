//! The group of one instance: a directory in each hierarchy.

use std::{
    collections::BTreeSet,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gauntlet_domain::Limits;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::{LimitBackend, write};

const PAUSE: Duration = Duration::from_millis(1);
/// The time over which the share of the CPU is measured, in microseconds.
const CPU_PERIOD: u64 = 100_000;

/// The group of one instance, or the parent of such groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::process) struct Group {
    /// The directory in the hierarchy of v2.
    pub(super) unified: PathBuf,
    pub(super) controllers: Controllers,
}

/// Where a group's limits are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Controllers {
    /// It has none.
    None,
    /// In the directory of v2.
    Unified,
    /// In these directories of v1. Some may be the same.
    V1 { memory: PathBuf, pids: PathBuf, cpu: PathBuf },
}

/// What the group's processes have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(in crate::process) struct Usage {
    /// Processes that were killed because the group's memory was full.
    pub(in crate::process) oom_kills: u64,
    /// Processes and threads that were not created because there were too many.
    pub(in crate::process) forks_refused: u64,
    /// How long processes waited because the share of the CPU was used up.
    pub(in crate::process) throttled: Duration,
    /// The most memory that was used, in bytes.
    pub(in crate::process) memory_peak: u64,
}

impl Group {
    pub(super) fn child(&self, name: &str) -> Self {
        let controllers = match &self.controllers {
            Controllers::V1 { memory, pids, cpu } => {
                Controllers::V1 { memory: memory.join(name), pids: pids.join(name), cpu: cpu.join(name) }
            }
            same => same.clone(),
        };
        Self { unified: self.unified.join(name), controllers }
    }

    /// The names of all children, in any hierarchy.
    pub(super) fn children(&self) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for dir in self.dirs() {
            let entries = std::fs::read_dir(dir)?.flatten();
            names.extend(entries.filter_map(|entry| entry.file_name().into_string().ok()));
        }
        Ok(names)
    }

    pub(super) fn backend(&self) -> LimitBackend {
        match &self.controllers {
            Controllers::None => LimitBackend::Rlimit,
            Controllers::Unified => LimitBackend::Cgroup2,
            Controllers::V1 { .. } => LimitBackend::Cgroup1,
        }
    }

    /// Its directories, each once.
    fn dirs(&self) -> BTreeSet<&Path> {
        let mut dirs = BTreeSet::from([self.unified.as_path()]);
        if let Controllers::V1 { memory, pids, cpu } = &self.controllers {
            dirs.extend([memory, pids, cpu].map(PathBuf::as_path));
        }
        dirs
    }

    /// Creates the group, which must not exist.
    pub(in crate::process) fn create(&self) -> io::Result<()> {
        for dir in self.dirs() {
            DirBuilder::new()
                .mode(0o755)
                .create(dir)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", dir.display())))?;
        }
        // A group with child groups can't be removed.
        write(&self.unified, "cgroup.max.descendants", 0)
    }

    /// Limits all of its processes together, as far as it has controllers. Swap is not used.
    pub(in crate::process) fn limit(&self, limits: &Limits) -> io::Result<()> {
        let quota = limits.cpu_quota.map(|percent| percent.saturating_mul(CPU_PERIOD / 100));
        match &self.controllers {
            Controllers::None => Ok(()),
            Controllers::Unified => {
                let dir = &self.unified;
                if let Some(memory) = limits.memory {
                    write(dir, "memory.max", memory)?;
                    if_supported(write(dir, "memory.swap.max", 0))?;
                    write(dir, "memory.oom.group", 1)?;
                }
                limits.processes.map_or(Ok(()), |processes| write(dir, "pids.max", processes))?;
                quota.map_or(Ok(()), |quota| write(dir, "cpu.max", format!("{quota} {CPU_PERIOD}")))
            }
            Controllers::V1 { memory, pids, cpu } => {
                if let Some(bytes) = limits.memory {
                    write(memory, "memory.limit_in_bytes", bytes)?;
                    if_supported(write(memory, "memory.memsw.limit_in_bytes", bytes))?;
                }
                limits.processes.map_or(Ok(()), |processes| write(pids, "pids.max", processes))?;
                if let Some(quota) = quota {
                    write(cpu, "cpu.cfs_period_us", CPU_PERIOD)?;
                    write(cpu, "cpu.cfs_quota_us", quota)?;
                }
                Ok(())
            }
        }
    }

    /// Moves a process into the group. Succeeds if the process has exited. The kernel may take some 10 ms.
    pub(in crate::process) fn add(&self, pid: i32) -> io::Result<()> {
        self.dirs().into_iter().try_for_each(|dir| match std::fs::write(dir.join("cgroup.procs"), pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
            added => added,
        })
    }

    /// Returns what its processes have used so far; zero where it isn't counted.
    pub(in crate::process) fn usage(&self) -> Usage {
        let read = |dir: &Path, file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        match &self.controllers {
            Controllers::None => Usage::default(),
            Controllers::Unified => {
                let dir = &self.unified;
                Usage {
                    oom_kills: field(&read(dir, "memory.events"), "oom_kill"),
                    forks_refused: field(&read(dir, "pids.events"), "max"),
                    throttled: Duration::from_micros(field(&read(dir, "cpu.stat"), "throttled_usec")),
                    memory_peak: number(&read(dir, "memory.peak")),
                }
            }
            Controllers::V1 { memory, pids, cpu } => Usage {
                oom_kills: field(&read(memory, "memory.oom_control"), "oom_kill"),
                forks_refused: field(&read(pids, "pids.events"), "max"),
                throttled: Duration::from_nanos(field(&read(cpu, "cpu.stat"), "throttled_time")),
                memory_peak: number(&read(memory, "memory.max_usage_in_bytes")),
            },
        }
    }

    /// Kills all processes in the group, including those being forked, waits until they have exited, and removes the group. Succeeds if the
    /// group doesn't exist. Returns whether there were processes. Blocks.
    pub(in crate::process) fn kill(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut found = false;
        loop {
            let left = self.processes()?;
            if left.is_empty() {
                match self.remove() {
                    // The last process is exiting.
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {}
                    removed => return removed.map(|()| found),
                }
            } else if Instant::now() >= deadline {
                let left: Vec<String> = left.iter().map(ToString::to_string).collect();
                return Err(io::Error::other(format!("processes {} do not exit", left.join(", "))));
            } else {
                found = true;
                self.kill_once(&left)?;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn kill_once(&self, processes: &BTreeSet<i32>) -> io::Result<()> {
        if let Controllers::V1 { pids, .. } = &self.controllers {
            // Those that left the group of v2 fork no more.
            if_supported(write(pids, "pids.max", 0))?;
            for pid in processes.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        if_supported(write(&self.unified, "cgroup.kill", 1))
    }

    /// The processes that have not exited, in any hierarchy.
    fn processes(&self) -> io::Result<BTreeSet<i32>> {
        let mut processes = BTreeSet::new();
        for dir in self.dirs() {
            match std::fs::read_to_string(dir.join("cgroup.procs")) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                text => processes.extend(text?.lines().filter_map(|line| line.parse::<i32>().ok())),
            }
        }
        Ok(processes)
    }

    /// Removes the group. Fails while a process is in it; succeeds if the group doesn't exist.
    pub(in crate::process) fn remove(&self) -> io::Result<()> {
        self.dirs().into_iter().try_for_each(|dir| if_supported(std::fs::remove_dir(dir)))
    }
}

/// A file that doesn't exist is no error: kernels without swap accounting, groups that were removed.
fn if_supported(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The value of a line `NAME VALUE`; 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, number)
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LIMITS: Limits = Limits {
        memory: Some(256 << 20),
        processes: Some(64),
        cpu_quota: Some(50),
        disk: None,
        cpu_seconds: None,
        open_files: None,
        output: None,
    };

    /// A group whose directories are ordinary ones: writing a file creates it.
    fn ordinary(top: &Path, v1: bool) -> Group {
        let dir = |name: &str| top.join(name);
        let controllers = match v1 {
            true => Controllers::V1 { memory: dir("memory"), pids: dir("pids"), cpu: dir("cpu") },
            false => Controllers::Unified,
        };
        let group = Group { unified: dir("unified"), controllers };
        group.create().unwrap();
        group
    }

    fn text(group: &Group, file: &str) -> String {
        let found = group.dirs().into_iter().find_map(|dir| std::fs::read_to_string(dir.join(file)).ok());
        found.unwrap_or_default()
    }

    #[test]
    fn limits_are_written_to_v2() {
        let top = tempfile::tempdir().unwrap();
        let group = ordinary(top.path(), false);
        group.limit(&LIMITS).unwrap();
        let written = [
            ("memory.max", "268435456"),
            ("memory.swap.max", "0"),
            ("memory.oom.group", "1"),
            ("pids.max", "64"),
            ("cpu.max", "50000 100000"),
            ("cgroup.max.descendants", "0"),
        ];
        for (file, value) in written {
            assert_eq!(text(&group, file), value, "{file}");
        }
    }

    #[test]
    fn usage_is_read_from_either_version() {
        let top = tempfile::tempdir().unwrap();
        let group = ordinary(top.path(), false);
        std::fs::write(group.unified.join("memory.events"), "low 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 1\n")
            .unwrap();
        std::fs::write(group.unified.join("pids.events"), "max 7\n").unwrap();
        std::fs::write(group.unified.join("cpu.stat"), "usage_usec 5\nnr_throttled 4\nthrottled_usec 2500\n").unwrap();
        std::fs::write(group.unified.join("memory.peak"), "4096\n").unwrap();
        let usage = Usage { oom_kills: 3, forks_refused: 7, throttled: Duration::from_micros(2500), memory_peak: 4096 };
        assert_eq!(group.usage(), usage);
        let other = tempfile::tempdir().unwrap();
        let group = ordinary(other.path(), true);
        for (dir, file, text) in [
            ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
            ("memory", "memory.max_usage_in_bytes", "4096\n"),
            ("pids", "pids.events", "max 7\n"),
            ("cpu", "cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 2500000\n"),
        ] {
            std::fs::write(other.path().join(dir).join(file), text).unwrap();
        }
        assert_eq!(group.usage(), usage);
        assert_eq!(field("oom 1\n", "oom_kill"), 0);
    }
}
