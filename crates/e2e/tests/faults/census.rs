//! What runs against what is stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::load::{Broken, Kind};

/// Stored instances, each with exactly one group of processes that runs: by seat (`challenge s source` or `challenge p identity`), the
/// identity.
pub(super) type Census = BTreeMap<String, String>;

/// One process of an instance.
struct Running {
    pid: i32,
    group: i32,
    identity: String,
    shim: bool,
}

/// Compares; the error is the first thing that is lost, doubled or left over, or not there yet.
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
    for process in running(dir) {
        if process.shim {
            *shims.entry(process.identity).or_default() += 1;
        } else {
            groups.entry(process.identity).or_default().insert(process.group);
        }
    }
    let works = fs::read_dir(dir).into_iter().flatten().flatten().filter(|home| home.path().join("work").exists());
    let works: BTreeSet<String> = works.filter_map(|home| identity(home.file_name().to_str()?)).collect();
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

/// Ends the instances of that directory that are left when the test ends, however it ends: they would outlive their managers.
pub(super) struct Instances(pub(super) PathBuf);

impl Drop for Instances {
    fn drop(&mut self) {
        for process in running(&self.0) {
            if let Some(pid) = Pid::from_raw(process.pid) {
                // One that has ended meanwhile is what was wanted.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Whether something of that identity runs, or is being started, besides its supervisor.
pub(super) fn runs(dir: &Path, identity: &str) -> bool {
    running(dir).iter().any(|process| process.identity == identity && !process.shim)
}

/// The identity in the name of an instance's directory.
fn identity(name: &str) -> Option<String> {
    name.split_once('-').map(|(_, identity)| identity.to_owned())
}

/// Every process of an instance carries its directory in its environment; a supervisor, in its arguments.
fn running(dir: &Path) -> Vec<Running> {
    // As the provisioner sees it, whatever links lead there.
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    let marker = [b"GAUNTLET_INSTANCE=", dir.as_os_str().as_bytes(), b"/"].concat();
    let argument = [dir.as_os_str().as_bytes(), b"/"].concat();
    let find = |text: &[u8], start: &[u8]| {
        let word = text.split(|byte| *byte == 0).find(|word| word.starts_with(start))?;
        identity(std::str::from_utf8(&word[start.len()..]).ok()?)
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let of = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let arguments = of("cmdline");
        let shim = arguments.split(|byte| *byte == 0).any(|word| word == b"__instance-shim");
        let identity = if shim { find(&arguments, &argument) } else { find(&of("environ"), &marker) };
        let stat = of("stat");
        let group = String::from_utf8_lossy(&stat)
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(2)?.parse().ok())
            .unwrap_or(0);
        found.extend(identity.map(|identity| Running { pid, group, identity, shim }));
    }
    found
}
