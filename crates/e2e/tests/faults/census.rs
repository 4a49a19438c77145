//! Compares the running processes with the stored instances.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use gauntlet_testing::processes;
use serde_json::Value;

use super::load::{Kind, Violation};

/// The identities of the stored instances, each of which has exactly one process group, by assignment (`challenge s source` or
/// `challenge p identity`).
pub(super) type Census = BTreeMap<String, String>;

/// Compares the stored instances with the process groups and directories below `dir`, and returns the stored instances.
///
/// # Errors
/// The first instance that is lost, duplicated, left over or not yet ready.
pub(super) fn take_census(dir: &Path, stored: &[(String, Vec<u8>)]) -> Result<Census, Violation> {
    let mut census = Census::new();
    for (key, value) in stored {
        let record: Value =
            serde_json::from_slice(value).map_err(|error| Violation(Kind::Unexpected, format!("{key}: {error}")))?;
        if record["phase"]["name"] != "ready" {
            return Err(Violation(Kind::Unexpected, format!("not ready: {key}: {}", record["phase"])));
        }
        let assignment = key.trim_start_matches("gauntlet/instances ").to_owned();
        let identity = record["identity"].as_str().unwrap_or_default().to_owned();
        if let Some(other) = census.insert(assignment, identity.clone()) {
            return Err(Violation(Kind::Duplicated, format!("{key} has two records: {other} and {identity}")));
        }
    }
    let known: BTreeSet<&String> = census.values().collect();
    if known.len() != census.len() {
        return Err(Violation(Kind::Duplicated, format!("two records share one identity: {census:?}")));
    }
    let mut groups: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
    let mut supervisors: BTreeMap<String, usize> = BTreeMap::new();
    let processes = processes::of_instances(dir);
    // Process 1 of a sandbox is in its supervisor's group, and ends with it. The program has a group of its own.
    let supervising: BTreeSet<i32> =
        processes.iter().filter(|process| process.supervisor).map(|process| process.group).collect();
    for process in processes {
        if process.supervisor {
            *supervisors.entry(process.identity).or_default() += 1;
        } else if !supervising.contains(&process.group) {
            groups.entry(process.identity).or_default().insert(process.group);
        }
    }
    let directories =
        fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| entry.path().join("work").exists());
    let directories: BTreeSet<String> =
        directories.filter_map(|entry| processes::identity(entry.file_name().to_str()?)).collect();
    for left in groups.keys().chain(supervisors.keys()).chain(&directories) {
        if !known.contains(left) {
            return Err(Violation(Kind::Orphan, format!("{left} has processes or a directory, but no record")));
        }
    }
    for (assignment, identity) in &census {
        let (groups, supervisors) = (groups.get(identity).map_or(0, BTreeSet::len), supervisors.get(identity).copied());
        let supervisors = supervisors.unwrap_or(0);
        if (groups, supervisors) != (1, 1) {
            let kind = if groups > 1 || supervisors > 1 { Kind::Duplicated } else { Kind::Lost };
            let what =
                format!("{assignment}: {identity} runs as {groups} process groups under {supervisors} supervisors");
            return Err(Violation(kind, what));
        }
    }
    Ok(census)
}

/// Whether the instance has a running process besides its supervisor.
pub(super) fn is_running(dir: &Path, identity: &str) -> bool {
    processes::of_instances(dir).iter().any(|process| process.identity == identity && !process.supervisor)
}
