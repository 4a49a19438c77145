//! Where groups can be created, and which controllers they have.

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::Access;

use super::{
    PREFIX,
    group::{Controllers, Group},
    write,
};

/// The controllers that limit an instance.
const NEEDED: [&str; 3] = ["memory", "pids", "cpu"];
/// Where the processes of a group move, so that it can have controllers for its children.
const MANAGER: &str = "gauntlet-manager";
static PROBES: AtomicU64 = AtomicU64::new(0);

/// Returns the parents of all groups, and why they have no limits if so. Prepares the v2 group for controllers where that is safe.
pub(super) fn parents() -> Result<(Group, Option<String>), String> {
    let read = |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let (cgroup, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
    let own = own_group(&cgroup, &mounts, None)?;
    let (unified, limited) = match delegated_parent(&own) {
        Ok(parent) => (parent, Ok(Controllers::Unified)),
        Err(v2) => {
            let v1 = v1_controllers(&cgroup, &mounts).map_err(|v1| format!("cgroup v2: {v2}; cgroup v1: {v1}"));
            (own, v1)
        }
    };
    rustix::fs::access(unified.join("cgroup.procs"), Access::WRITE_OK)
        .map_err(|error| format!("{}/cgroup.procs: {error}", unified.display()))?;
    let (controllers, mut unlimited) = match limited {
        Ok(controllers) => (controllers, None),
        Err(why) => (Controllers::None, Some(why)),
    };
    let mut parents = Group { unified, controllers };
    if unlimited.is_none()
        && let Err(why) = try_group(&parents)
    {
        (parents.controllers, unlimited) = (Controllers::None, Some(why));
    }
    if unlimited.is_some() {
        try_group(&parents)?;
    }
    Ok((parents, unlimited))
}

/// Creates and removes a group. Trying is the only certain test.
fn try_group(parents: &Group) -> Result<(), String> {
    // The name is unique even if other managers try at the same time, here or in other PID namespaces.
    let (pid, nth) = (std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
    let probe = parents.child(&format!("{PREFIX}probe-{pid}-{nth}"));
    let created = probe.create().and_then(|()| {
        probe.limit(&gauntlet_domain::Limits {
            memory: Some(1 << 30),
            processes: Some(100),
            cpu_quota: Some(100),
            ..Default::default()
        })?;
        let kind = std::fs::read_to_string(probe.unified.join("cgroup.type"))?;
        Ok((kind, probe.unified.join("cgroup.kill").exists()))
    });
    let removed = probe.remove();
    let at = parents.unified.display();
    match created.and_then(|created| removed.map(|()| created)) {
        Err(error) => Err(format!("a group below {at}: {error}")),
        Ok((_, false)) => Err("this kernel has no cgroup.kill, which needs Linux 5.14".to_owned()),
        Ok((kind, true)) if kind.trim() != "domain" => Err(format!("a group below {at} is of type {}", kind.trim())),
        Ok(_) => Ok(()),
    }
}

/// Returns this process's group in the hierarchy of a v1 `controller`, or of v2.
fn own_group(cgroup: &str, mountinfo: &str, controller: Option<&str>) -> Result<PathBuf, String> {
    let name = controller.map_or("cgroup v2".to_owned(), |controller| format!("the v1 controller {controller}"));
    let has = |list: &str, item: &str| list.split(',').any(|one| one == item);
    let own = cgroup.lines().find_map(|line| {
        let (id, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let found = match controller {
            Some(controller) => has(controllers, controller),
            None => id == "0" && controllers.is_empty(),
        };
        found.then_some(path)
    });
    let own = own.ok_or_else(|| format!("this process is in no group of {name}"))?;
    let mount = mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let (kind, options) = right.split_once(' ')?;
        let found = match controller {
            Some(controller) => kind == "cgroup" && has(options.rsplit_once(' ')?.1, controller),
            None => kind == "cgroup2",
        };
        let mut fields = left.split(' ').skip(3);
        found.then(|| Some((fields.next()?, fields.next()?)))?
    });
    let (root, at) = mount.ok_or_else(|| format!("{name} is not mounted"))?;
    let below = Path::new(own).strip_prefix(root).map_err(|_| format!("{name} is mounted at {at} without {own}"))?;
    if below.components().any(|part| part.as_os_str() == "..") {
        return Err(format!("this process's group {own} is outside the hierarchy of {name} mounted at {at}"));
    }
    Ok(Path::new(at).join(below))
}

/// Returns a group whose children have the controllers of v2: one that this process may use so.
///
/// - Its own group, if it has none or its children have controllers already: the root of the machine.
/// - The parent of its group, if systemd has delegated it (`Delegate=yes` and `DelegateSubgroup=`), or an earlier manager has prepared it.
/// - Its own group, if that is the root of a container: all processes in it move to a child.
///
/// The group of a unit without a subgroup stays as it is: systemd couldn't start the unit again beside groups of running instances.
fn delegated_parent(own: &Path) -> Result<PathBuf, String> {
    let enabled = enable(own);
    if enabled.is_ok() {
        return Ok(own.to_owned());
    }
    if let Some(parent) = own.parent().filter(|parent| is_delegated(parent) || own.ends_with(MANAGER)) {
        return enable(parent).map(|()| parent.to_owned()).map_err(|error| error.to_string());
    }
    match enabled {
        // The root of a container's namespace: nobody outside puts processes there.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy && is_mount_root(own) => {
            let child = own.join(MANAGER);
            move_processes(own, &child)
                .and_then(|()| enable(own))
                .map(|()| own.to_owned())
                .map_err(|error| error.to_string())
        }
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(format!(
            "{} has processes of its own; under systemd, set Delegate=yes and DelegateSubgroup=manager",
            own.display()
        )),
        Err(error) => Err(error.to_string()),
        Ok(()) => Ok(own.to_owned()),
    }
}

/// Gives the children of a group the controllers.
fn enable(group: &Path) -> io::Result<()> {
    let read = |file: &str| std::fs::read_to_string(group.join(file));
    let available = read("cgroup.controllers")?;
    let lacks = |list: &str| NEEDED.iter().find(|needed| !list.split_ascii_whitespace().any(|one| one == **needed));
    if let Some(missing) = lacks(&available) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{} has no controller {missing}", group.display()),
        ));
    }
    match lacks(&read("cgroup.subtree_control")?) {
        None => Ok(()),
        Some(_) => write(group, "cgroup.subtree_control", "+memory +pids +cpu"),
    }
}

/// systemd marks the groups that it leaves to others.
fn is_delegated(group: &Path) -> bool {
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0; 8];
        rustix::fs::getxattr(group, *name, &mut value[..]).is_ok_and(|length| value.get(..length) == Some(b"1"))
    })
}

fn is_mount_root(group: &Path) -> bool {
    !group.parent().is_some_and(|parent| parent.join("cgroup.procs").exists())
}

fn move_processes(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::create_dir(to) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for pid in std::fs::read_to_string(from.join("cgroup.procs"))?.lines() {
        match std::fs::write(to.join("cgroup.procs"), pid) {
            // It has exited.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
            moved => moved?,
        }
    }
    Ok(())
}

fn v1_controllers(cgroup: &str, mountinfo: &str) -> Result<Controllers, String> {
    let own = |controller| own_group(cgroup, mountinfo, Some(controller));
    Ok(Controllers::V1 { memory: own("memory")?, pids: own("pids")?, cpu: own("cpu")? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const MIXED: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
         32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
         33 31 0:30 /machine /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn own_group_is_found_at_any_mount() {
        let unified = |cgroup: &str, mounts: &str| own_group(cgroup, mounts, None);
        assert_eq!(unified("1:cpu:/x\n0::/\n", MIXED), Ok("/sys/fs/cgroup/unified".into()));
        assert_eq!(unified("0::/a/b\n", MIXED), Ok("/sys/fs/cgroup/unified/a/b".into()));
        let inner = "41 31 0:38 /docker/1 /sys/fs/cgroup rw master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(unified("0::/docker/1/x\n", inner), Ok("/sys/fs/cgroup/x".into()));
        for (cgroup, mounts) in [("0::/other\n", inner), ("0::/../x\n", MIXED), ("1:cpu:/\n", MIXED), ("0::/\n", "")] {
            assert!(unified(cgroup, mounts).is_err(), "{cgroup}");
        }
    }

    #[test]
    fn own_groups_of_v1_controllers_are_found_wherever_they_are_mounted() {
        let cgroup = "7:cpu,cpuacct:/a\n4:memory:/machine/b\n0::/\n";
        let own = |controller| own_group(cgroup, MIXED, Some(controller));
        assert_eq!(own("cpu"), Ok("/sys/fs/cgroup/cpu,cpuacct/a".into()));
        assert_eq!(own("memory"), Ok("/sys/fs/cgroup/memory/b".into()));
        assert_eq!(own("pids"), Err("this process is in no group of the v1 controller pids".to_owned()));
        assert!(v1_controllers(cgroup, MIXED).unwrap_err().contains("pids"));
    }

    /// A directory with the files of a group.
    fn fake(dir: &Path, controllers: &str, enabled: &str) {
        std::fs::create_dir_all(dir).unwrap();
        for (file, text) in
            [("cgroup.controllers", controllers), ("cgroup.subtree_control", enabled), ("cgroup.procs", "")]
        {
            std::fs::write(dir.join(file), text).unwrap();
        }
    }

    #[test]
    fn controllers_are_enabled_where_they_are_available() {
        let top = tempfile::tempdir().unwrap();
        let group = top.path().join("group");
        fake(&group, "cpuset cpu io memory hugetlb pids\n", "");
        assert_eq!(delegated_parent(&group), Ok(group.clone()));
        assert_eq!(std::fs::read_to_string(group.join("cgroup.subtree_control")).unwrap(), "+memory +pids +cpu");
        fake(&group, "hugetlb\n", "");
        assert!(delegated_parent(&group).unwrap_err().contains("no controller memory"));
        // The child of a group that an earlier manager prepared.
        fake(&group, "cpu memory pids", "cpu memory pids");
        fake(&group.join(MANAGER), "", "");
        assert_eq!(delegated_parent(&group.join(MANAGER)), Ok(group));
    }

    #[test]
    fn processes_of_a_containers_root_move_to_a_child() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("root");
        fake(&root, "cpu memory pids", "");
        std::fs::write(root.join("cgroup.procs"), "1\n23\n").unwrap();
        move_processes(&root, &root.join(MANAGER)).unwrap();
        assert_eq!(std::fs::read_to_string(root.join(MANAGER).join("cgroup.procs")).unwrap(), "23");
        assert!(is_mount_root(&root) && !is_mount_root(&root.join(MANAGER)));
    }
}
