//! Control groups, one for each instance: they limit all of its processes together, and kill them by name even if the supervisor was killed.
//!
//! A waiting supervisor creates its group and moves the process that becomes the program into it, because the kernel may take 20 ms for the first
//! move. Once there is an instance, only the limits are written. So the group has the supervisor's name, not the instance's, and
//! the program is in it, limited, before it runs.
//!
//! Killing needs cgroup v2, and no controller. Limits need the controllers memory, pids and cpu, either of v2 or, where v1 has them, of v1.

mod group;
mod hierarchy;

use std::{fmt, io, os::unix::ffi::OsStrExt as _, path::Path, str::FromStr};

use super::{
    Config, procfs,
    record::{self, ProcessId},
    stop::KILL_TIMEOUT,
};

pub(super) use group::{Group, Usage};

/// The prefix of the groups' names.
const PREFIX: &str = "gauntlet-";

/// What limits an instance as a whole: its memory, its processes and its share of the CPU. Weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LimitBackend {
    /// Nothing: each process has limits of its own, and memory counts only where the scenario or the operator limits it.
    Rlimit,
    /// The controllers of cgroup v1.
    Cgroup1,
    /// The controllers of cgroup v2.
    Cgroup2,
}

impl LimitBackend {
    /// All backends, strongest first.
    pub const ALL: [Self; 3] = [Self::Cgroup2, Self::Cgroup1, Self::Rlimit];

    /// The name on the command line, in logs and in telemetry.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rlimit => "rlimit",
            Self::Cgroup1 => "cgroup1",
            Self::Cgroup2 => "cgroup2",
        }
    }
}

impl fmt::Display for LimitBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for LimitBackend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("expected cgroup2, cgroup1 or rlimit; got {text:?}"))
    }
}

/// The groups of one directory of instances.
#[derive(Debug, Clone)]
pub(super) struct Groups {
    /// The parents of all groups, in each hierarchy.
    parents: Group,
    prefix: String,
}

impl Groups {
    /// Finds out which groups can be created, for the directory of instances with that hash. The first error says why there are none; the second
    /// why they have no limits.
    pub(super) fn detect(dir: &str) -> Result<(Self, Option<String>), String> {
        let (parents, unlimited) = hierarchy::parents()?;
        Ok((Self { parents, prefix: format!("{PREFIX}{dir}-") }, unlimited))
    }

    /// What limits the groups' processes.
    pub(super) fn backend(&self) -> LimitBackend {
        self.parents.backend()
    }

    /// For a supervisor: the parents, and the prefix of the groups' names.
    pub(super) fn to_argument(&self) -> String {
        // Paths that aren't UTF-8 can't be written; cgroup file systems are never mounted at such.
        serde_json::to_string(&(&self.parents, &self.prefix)).unwrap_or_default()
    }

    /// Reads what [`Groups::to_argument`] wrote.
    pub(super) fn from_argument(text: &str) -> io::Result<Self> {
        let (parents, prefix) = serde_json::from_str(text)?;
        Ok(Self { parents, prefix })
    }

    /// The group of a supervisor.
    pub(super) fn of(&self, supervisor: ProcessId) -> Group {
        self.parents.child(&format!("{}{}-{}", self.prefix, supervisor.pid, supervisor.start))
    }

    /// Kills the processes of the groups whose supervisors have exited, and removes these groups. Blocks; the cost grows with the number of
    /// groups.
    pub(super) fn remove_abandoned(&self) {
        match self.abandoned() {
            Err(error) => tracing::warn!(%error, "cannot list the control groups of instances"),
            Ok(abandoned) => {
                for group in abandoned {
                    if let Err(error) = group.kill(KILL_TIMEOUT) {
                        tracing::warn!(%error, "the control group of an instance that has ended cannot be removed");
                    }
                }
            }
        }
    }

    fn abandoned(&self) -> io::Result<Vec<Group>> {
        let names = self.parents.children()?.into_iter();
        let abandoned = names.filter(|name| {
            name.strip_prefix(&self.prefix).and_then(supervisor).is_some_and(|process| !procfs::is_running(process))
        });
        Ok(abandoned.map(|name| self.parents.child(&name)).collect())
    }
}

/// Finds out which control groups can be created, and logs what limits instances. Blocks briefly.
pub(super) fn detect(config: &Config, dir: &Path) -> Option<Groups> {
    let detected = match config.cgroups {
        true => Groups::detect(&record::hash(dir.as_os_str().as_bytes())),
        false => Err("switched off".to_owned()),
    };
    let (groups, why) = match detected {
        Ok((groups, why)) => (Some(groups), why),
        Err(why) => {
            tracing::info!(why, "instances have no control groups: they are found by their supervisors alone");
            (None, Some(why))
        }
    };
    let limits = groups.as_ref().map_or(LimitBackend::Rlimit, Groups::backend).name();
    match why {
        None => tracing::info!(limits, "memory, processes and CPU share of each instance are limited"),
        Some(why) => tracing::warn!(
            limits,
            why,
            "nothing limits the memory, the processes and the CPU share of a whole instance"
        ),
    }
    groups
}

fn supervisor(name: &str) -> Option<ProcessId> {
    let (pid, start) = name.split_once('-')?;
    Some(ProcessId { pid: pid.parse().ok()?, start: start.parse().ok()? })
}

fn write(dir: &Path, file: &str, value: impl fmt::Display) -> io::Result<()> {
    std::fs::write(dir.join(file), value.to_string())
        .map_err(|error| io::Error::new(error.kind(), format!("{}/{file}: {error}", dir.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn backends_are_ordered_and_keep_their_names() {
        assert!(LimitBackend::ALL.is_sorted_by(|stronger, weaker| stronger > weaker));
        for backend in LimitBackend::ALL {
            assert_eq!(backend.to_string().parse(), Ok(backend));
        }
        assert!("cgroup".parse::<LimitBackend>().is_err_and(|error| error.contains("expected cgroup2")));
    }

    #[test]
    fn groups_survive_being_an_argument_and_name_their_supervisor() {
        let Ok((groups, _)) = Groups::detect("0123456789abcdef") else { return };
        let read = Groups::from_argument(&groups.to_argument()).unwrap();
        let process = ProcessId { pid: 12, start: 345 };
        assert_eq!(read.of(process), groups.of(process));
        assert_eq!(supervisor("12-345"), Some(process));
        assert_eq!(supervisor("0123"), None);
    }
}
