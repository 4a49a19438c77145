//! Which processes a test, or the instances of its managers, have left running.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal};

/// The argument that tells a supervisor of the process provisioner from the other processes of its instance.
const SUPERVISOR: &[u8] = b"__instance-shim";

/// Whether the process exists and has not exited. A zombie has exited.
pub fn is_running(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

/// Sends SIGKILL to the process. One that has exited already is left alone.
pub fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// The processes whose working directory is `dir` or below it, or that have such a path as an argument: a manager started there, instances
/// and their supervisors.
pub fn below(dir: &Path) -> Vec<i32> {
    let is_below = |process: &Path| {
        let works_there = fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|byte| *byte == 0).map(|argument| Path::new(OsStr::from_bytes(argument)));
        works_there || arguments.any(|argument| argument.starts_with(dir))
    };
    all().into_iter().filter(|(_, path)| is_below(path)).map(|(pid, _)| pid).collect()
}

/// A process of an instance of the process provisioner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceProcess {
    /// The process id.
    pub pid: i32,
    /// The id of its process group; 0 if it exited while it was read.
    pub group: i32,
    /// The identity of the instance.
    pub identity: String,
    /// Whether it is the instance's supervisor, rather than something that the instance runs.
    pub supervisor: bool,
}

/// The processes of all instances below the process provisioner's `instances` directory. A supervisor works in the instance's directory. All that
/// descends from it belongs to the instance, and every process with that directory in its environment.
pub fn of_instances(dir: &Path) -> Vec<InstanceProcess> {
    // The provisioner uses the path without symbolic links, too.
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    let variable = [b"GAUNTLET_INSTANCE=", dir.as_os_str().as_bytes(), b"/"].concat();
    let environment = |environ: &[u8]| {
        let word = environ.split(|byte| *byte == 0).find(|word| word.starts_with(&variable))?;
        identity(std::str::from_utf8(&word[variable.len()..]).ok()?)
    };
    let directory =
        |process: &Path| identity(fs::read_link(process.join("cwd")).ok()?.strip_prefix(&dir).ok()?.to_str()?);
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for (pid, path) in all() {
        let read = |name: &str| fs::read(path.join(name)).unwrap_or_default();
        let arguments = read("cmdline");
        let supervisor = arguments.split(|byte| *byte == 0).any(|word| word == SUPERVISOR);
        let identity = if supervisor { directory(&path) } else { environment(&read("environ")) };
        let stat = read("stat");
        let stat = String::from_utf8_lossy(&stat);
        let field =
            |at| stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(at)?.parse().ok()).unwrap_or(0);
        let (parent, group) = (field(1), field(2));
        match identity {
            Some(identity) => found.push(InstanceProcess { pid, group, identity, supervisor }),
            None => others.push((pid, parent, group)),
        }
    }
    // Until no process has a parent that belongs to an instance.
    loop {
        let (descendants, rest): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|(_, parent, _)| found.iter().any(|process| process.pid == *parent));
        if descendants.is_empty() {
            return found;
        }
        for (pid, parent, group) in descendants {
            let identity = found.iter().find(|process| process.pid == parent).map(|process| process.identity.clone());
            found.extend(identity.map(|identity| InstanceProcess { pid, group, identity, supervisor: false }));
        }
        others = rest;
    }
}

/// The identity in the name of an instance's directory.
pub fn identity(directory: &str) -> Option<String> {
    directory.split_once('-').map(|(_, identity)| identity.to_owned())
}

/// Kills the instances of a directory when it is dropped: they outlive their managers, and would outlive the test.
#[derive(Debug)]
pub struct KillInstances(pub PathBuf);

impl Drop for KillInstances {
    fn drop(&mut self) {
        for process in of_instances(&self.0) {
            kill(process.pid);
        }
    }
}

/// Every process of this machine, with its directory in `/proc`.
fn all() -> Vec<(i32, PathBuf)> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    entries.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path))).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::eventually_blocking;

    #[test]
    fn processes_are_found_by_directory_and_variable() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let sleep =
            |command: &mut Command| command.args(["-c", "sleep 100; exit", "sh"]).stdin(Stdio::null()).spawn().unwrap();
        let mut works_there = sleep(Command::new("sh").current_dir(&dir));
        let instance = dir.join("web-77");
        fs::create_dir(&instance).unwrap();
        let mut has_variable = sleep(Command::new("sh").env("GAUNTLET_INSTANCE", &instance));
        let mut supervisor = Command::new("sh")
            .args(["-c", "sleep 100; exit", "__instance-shim"])
            .current_dir(&instance)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pids = [&works_there, &has_variable, &supervisor].map(|child| i32::try_from(child.id()).unwrap());
        let guard = KillInstances(dir.clone());
        eventually_blocking("all three have called exec", || {
            let of = of_instances(&dir);
            let of = |pid| of.iter().find(|process| process.pid == pid).map(|process| process.supervisor);
            (of(pids[1]), of(pids[2])) == (Some(false), Some(true)) && below(&dir).contains(&pids[0])
        });
        assert!(below(&dir).contains(&pids[2]) && !below(&dir).contains(&pids[1]));
        assert!(of_instances(&dir).iter().all(|process| process.identity == "77" && process.group > 0));
        drop(guard);
        for child in [&mut has_variable, &mut supervisor] {
            assert!(!child.wait().unwrap().success());
        }
        assert!(is_running(pids[0]) && !is_running(pids[1]));
        for pid in below(&dir) {
            kill(pid);
        }
        works_there.wait().unwrap();
        eventually_blocking("nothing is left", || below(&dir).is_empty() && of_instances(&dir).is_empty());
    }
}
