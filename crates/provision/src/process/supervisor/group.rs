//! Moves an instance's processes into its control group.

use std::{io, path::Path, time::Duration};

use super::log::append_log;
use crate::process::{
    cgroup::Group,
    procfs,
    record::{self, STATE, State},
};

/// How long the processes of an earlier group of that name may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look for descendants outside the group before giving up.
const MAX_SCANS: usize = 100;

/// Moves all descendants of the supervisor `pid` into the group and records when all are in it. The program doesn't wait for this: a process
/// that isn't in the group yet is still a descendant.
pub(super) fn move_descendants(dir: &Path, state: &mut State, group: &Group, pid: i32) {
    let move_all = || -> io::Result<bool> {
        group.recreate(KILL_TIMEOUT)?;
        // Two scans in a row must find nobody: if a parent exits during the first, its child may only appear in the second.
        let mut empty_scans = 0;
        for _ in 0..MAX_SCANS {
            let members = group.processes()?;
            let missing: Vec<_> =
                procfs::descendants(pid).into_iter().filter(|process| !members.contains(&process.pid)).collect();
            if missing.is_empty() {
                empty_scans += 1;
                if empty_scans == 2 {
                    return Ok(true);
                }
                continue;
            }
            empty_scans = 0;
            missing.iter().try_for_each(|process| group.add(process.pid))?;
        }
        Ok(false)
    };
    let moved = move_all().and_then(|all| {
        if !all {
            return Err(io::Error::other("the instance forks faster than its processes can be moved"));
        }
        state.all_in_cgroup = true;
        record::write(dir, STATE, state)
    });
    if let Err(error) = moved {
        append_log(dir, &format!("cannot move all of the instance into its control group: {error}"));
    }
}
