//! Compares the processes that run with the instances that are stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use gauntlet_testing::processes;
use serde_json::Value;

use super::load::{Broken, Kind};

/// The identities of the stored instances, each of which has exactly one process group, by assignment (`challenge s source` or
/// `challenge p identity`).
pub(super) type Census = BTreeMap<String, String>;

/// Takes the census.
///
/// # Errors
/// The first instance that is lost, duplicated, left over or not ready yet.
pub(super) fn take(dir: &Path, stored: &[(String, Vec<u8>)]) -> Result<Census, Broken> {
    let mut census = Census::new();
    for (key, value) in stored {
        let record: Value =
            serde_json::from_slice(value).map_err(|error| Broken(Kind::Odd, format!("{key}: {error}")))?;
        if record["phase"]["name"] != "ready" {
            return Err(Broken(Kind::Odd, format!("not ready: {key}: {}", record["phase"])));
        }
        let seat = key.trim_start_matches("gauntlet/instances ").to_owned();
        let identity = record["identity"].as_str().unwrap_or_default().to_owned();
        if let Some(twice) = census.insert(seat, identity) {
            return Err(Broken(Kind::Doubled, format!("{key} has {twice} too")));
        }
    }
    let known: BTreeSet<&String> = census.values().collect();
    if known.len() != census.len() {
        return Err(Broken(Kind::Doubled, format!("one identity has two seats: {census:?}")));
    }
    let mut groups: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
    let mut shims: BTreeMap<String, usize> = BTreeMap::new();
    for process in processes::of_instances(dir) {
        if process.supervisor {
            *shims.entry(process.identity).or_default() += 1;
        } else {
            groups.entry(process.identity).or_default().insert(process.group);
        }
    }
    let works = fs::read_dir(dir).into_iter().flatten().flatten().filter(|home| home.path().join("work").exists());
    let works: BTreeSet<String> = works.filter_map(|home| processes::identity(home.file_name().to_str()?)).collect();
    for left in groups.keys().chain(shims.keys()).chain(&works) {
        if !known.contains(left) {
            return Err(Broken(Kind::Orphan, format!("{left} runs, or has a directory, and is not stored")));
        }
    }
    for (seat, identity) in &census {
        let (groups, shims) = (groups.get(identity).map_or(0, BTreeSet::len), shims.get(identity).copied());
        let shims = shims.unwrap_or(0);
        if (groups, shims) != (1, 1) {
            let kind = if groups > 1 || shims > 1 { Kind::Doubled } else { Kind::Lost };
            let what = format!("{seat}: {identity} runs as {groups} process groups under {shims} supervisors");
            return Err(Broken(kind, what));
        }
    }
    Ok(census)
}

/// Whether a process of that instance runs, besides its supervisor.
pub(super) fn runs(dir: &Path, identity: &str) -> bool {
    processes::of_instances(dir).iter().any(|process| process.identity == identity && !process.supervisor)
}
