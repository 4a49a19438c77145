//! Builds the root that a program sees.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags},
    mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use crate::{
    Failure, Root, Spec,
    failure::StepExt as _,
    sys::{MountAttributes, set_mount_attributes},
};

/// The user and group inside.
pub(crate) const INNER_ID: u32 = 1000;

/// Where the new root is mounted before it becomes the root: a directory that every machine has.
const NEW_ROOT: &str = "/proc";
/// The links to directories in `/usr`, or these directories themselves, where distributions keep them apart.
const USR_LINKS: [&str; 6] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];
/// Parts of `/etc` that programs need: the loader's cache, and the choice between programs of several packages.
const ETC_BINDS: [&str; 2] = ["etc/ld.so.cache", "etc/alternatives"];
const DEVICES: [(&str, u32); 5] = [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)];
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];
/// Parts of `/proc` that show or change the machine. Most can't be opened by the inner user anyway.
const MASKED: [&str; 4] = ["kcore", "keys", "timer_list", "sysrq-trigger"];
/// The directories that the program may change, and their names in the file system that they share.
const WRITABLE: [(&str, &str); 3] = [("work", "work"), ("tmp", "tmp"), ("dev/shm", "shm")];
const PAGE: u64 = 4096;

const READ_ONLY: MountAttributes =
    MountAttributes::READ_ONLY.and(MountAttributes::NO_SETUID).and(MountAttributes::NO_DEVICES);
const DEVICE: MountAttributes = MountAttributes::NO_SETUID.and(MountAttributes::NO_EXEC);

/// `/proc/sys` as it was before it became read-only.
pub(crate) struct Sysctls(OwnedFd);

impl Sysctls {
    /// Writes a setting of this process's namespaces, such as `kernel/shmall`.
    pub(crate) fn write(&self, name: &str, value: u64) -> Result<(), Failure> {
        let write = || -> io::Result<()> {
            let file = rustix::fs::openat(&self.0, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::io::write(&file, value.to_string().as_bytes())?;
            Ok(())
        };
        write().step(format!("write sysctl {name}"))
    }
}

/// Enters the new root. `owner` is the user and group of the writable directories, as this process's user namespace sees them.
pub(crate) fn enter(root: &Root, owner: u32) -> Result<Sysctls, Failure> {
    // Mounts of the machine still arrive, unmounts still release; nothing goes back.
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)
        .step("separate mounts")?;
    // Opened before the new root covers anything.
    let binds = open_binds(root)?;
    let devices: Vec<_> = DEVICES.iter().map(|device| open_device(*device)).collect::<Result<_, _>>()?;
    mount_tmpfs(NEW_ROOT, "mode=755,size=1m,nr_inodes=1024".to_owned())?;
    rustix::process::chdir(NEW_ROOT).step("enter the new root")?;

    for (source, target) in &binds {
        attach(source, target)?;
    }
    write_etc(root)?;
    create_dir("dev", 0o755)?;
    for ((name, _), device) in DEVICES.iter().zip(devices) {
        attach(&device, Path::new("dev").join(name))?;
    }
    for (name, target) in DEVICE_LINKS {
        symlink(target, Path::new("dev").join(name)).step(format!("link /dev/{name}"))?;
    }
    create_writable(root, owner)?;
    let sysctls = mount_proc()?;
    pivot()?;
    rustix::system::sethostname(root.hostname.as_bytes()).step("set the host name")?;
    // System V shared memory isn't limited by anything else.
    if let Some(size) = root.size {
        sysctls.write("kernel/shmall", size / PAGE)?;
    }
    Ok(sysctls)
}

/// Mounts that aren't attached anywhere yet, and their places below the new root.
fn open_binds(root: &Root) -> Result<Vec<(OwnedFd, PathBuf)>, Failure> {
    let mut binds = vec![(root.system.join("usr"), PathBuf::from("usr"))];
    for name in USR_LINKS {
        let path = root.system.join(name);
        if path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            binds.push((path, name.into()));
        }
    }
    let etc = ETC_BINDS.iter().map(|name| (root.system.join(name), PathBuf::from(name)));
    binds.extend(etc.filter(|(path, _)| path.exists()));
    for bind in &root.binds {
        let target = bind.target.strip_prefix("/").map_err(io::Error::other).step("place a bind")?;
        binds.push((bind.source.clone(), target.to_owned()));
    }
    let open = |(path, target): (PathBuf, PathBuf)| {
        let mount = open_mount(&path, OpenTreeFlags::AT_RECURSIVE)?;
        set_mount_attributes(&mount, READ_ONLY, true).step(format!("make {} read-only", path.display()))?;
        Ok((mount, target))
    };
    let mut opened: Vec<_> = binds.into_iter().map(open).collect::<Result<_, Failure>>()?;
    // A directory is attached before what is below it.
    opened.sort_by(|(_, a), (_, b)| a.cmp(b));
    Ok(opened)
}

fn open_mount(path: &Path, flags: OpenTreeFlags) -> Result<OwnedFd, Failure> {
    let flags = flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags).step(format!("open {}", path.display()))
}

/// Opens a device, and checks that it is the one that its name says: in a container, another file may have been put there.
fn open_device((name, minor): (&str, u32)) -> Result<OwnedFd, Failure> {
    let path = Path::new("/dev").join(name);
    let mount = open_mount(&path, OpenTreeFlags::empty())?;
    let found = rustix::fs::fstat(&mount).step(format!("check {}", path.display()))?;
    let is_device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && (rustix::fs::major(found.st_rdev), rustix::fs::minor(found.st_rdev)) == (1, minor);
    if !is_device {
        return Err(Failure::new(
            format!("check {}", path.display()),
            io::Error::other("it is another device than its name says"),
        ));
    }
    set_mount_attributes(&mount, DEVICE, false).step(format!("restrict {}", path.display()))?;
    Ok(mount)
}

/// Attaches a mount below the new root, and creates the file or directory that it covers.
fn attach(mount: &OwnedFd, target: impl AsRef<Path>) -> Result<(), Failure> {
    let target = target.as_ref();
    let step = || format!("mount /{}", target.display());
    let kind = FileType::from_raw_mode(rustix::fs::fstat(mount).step(step())?.st_mode);
    let is_dir = kind == FileType::Directory;
    let dir = if is_dir { Some(target) } else { target.parent() };
    if let Some(dir) = dir.filter(|dir| *dir != Path::new("")) {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).step(step())?;
    }
    if !is_dir {
        std::fs::write(target, "").step(step())?;
    }
    rustix::mount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step(step())
}

fn mount_tmpfs(target: &str, options: String) -> Result<(), Failure> {
    let options = CString::new(options).map_err(io::Error::other).step("mount tmpfs")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("tmpfs", target, "tmpfs", flags, options.as_c_str()).step(format!("mount tmpfs at {target}"))
}

fn create_dir(path: &str, mode: u32) -> Result<(), Failure> {
    match std::fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created.step(format!("create /{path}")),
    }
}

/// The files that name the inner user and the host, and the links to `/usr`.
fn write_etc(root: &Root) -> Result<(), Failure> {
    create_dir("etc", 0o755)?;
    let host = &root.hostname;
    let files = [
        (
            "passwd",
            format!(
                "root:x:0:0:root:/:/usr/sbin/nologin\nplayer:x:{INNER_ID}:{INNER_ID}:player:/work:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
            ),
        ),
        ("group", format!("root:x:0:\nplayer:x:{INNER_ID}:\nnogroup:x:65534:\n")),
        ("hosts", format!("127.0.0.1 localhost {host}\n::1 localhost {host}\n")),
        ("hostname", format!("{host}\n")),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n".to_owned()),
        ("resolv.conf", String::new()),
    ];
    for (name, text) in files {
        std::fs::write(Path::new("etc").join(name), text).step(format!("write /etc/{name}"))?;
    }
    let links = USR_LINKS.iter().copied().chain(["etc/localtime"]);
    for name in links {
        let source = root.system.join(name);
        if let Ok(target) = std::fs::read_link(&source) {
            symlink(target, name).step(format!("link /{name}"))?;
        }
    }
    Ok(())
}

/// Mounts one file system of bounded size, and attaches each of its directories.
fn create_writable(root: &Root, owner: u32) -> Result<(), Failure> {
    // 0 is no limit.
    let (size, inodes) = (root.size.unwrap_or(0), root.inodes.unwrap_or(0));
    create_dir("work", 0o755)?;
    mount_tmpfs("work", format!("mode=755,size={size},nr_inodes={inodes},uid={owner},gid={owner}"))?;
    let mut mounts = Vec::new();
    for (target, name) in WRITABLE {
        let path = format!("work/{name}");
        create_dir(&path, 0o700)?;
        chown(&path, Some(owner), Some(owner)).step(format!("give /{target} to the instance"))?;
        mounts.push((target, open_mount(Path::new(&path), OpenTreeFlags::empty())?));
    }
    rustix::mount::unmount("work", UnmountFlags::DETACH).step("detach the writable directories")?;
    mounts.iter().try_for_each(|(target, mount)| attach(mount, target))
}

/// Mounts `/proc` of this PID namespace, read-only where it shows the machine.
fn mount_proc() -> Result<Sysctls, Failure> {
    create_dir("proc", 0o755)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "proc", "proc", flags, None).step("mount proc")?;
    let path = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let sysctls = rustix::fs::open("proc/sys", path, Mode::empty()).step("open /proc/sys")?;
    let read_only = open_mount(Path::new("proc/sys"), OpenTreeFlags::AT_RECURSIVE)?;
    set_mount_attributes(&read_only, READ_ONLY.and(MountAttributes::NO_EXEC), true).step("make /proc/sys read-only")?;
    let attach_at = |mount: &OwnedFd, target: &str| {
        rustix::mount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .step(format!("mount /{target}"))
    };
    attach_at(&read_only, "proc/sys")?;
    for name in MASKED {
        let target = format!("proc/{name}");
        if Path::new(&target).exists() {
            attach_at(&open_mount(Path::new("dev/null"), OpenTreeFlags::empty())?, &target)?;
        }
    }
    Ok(Sysctls(sysctls))
}

/// Makes the working directory the root, and detaches all of the machine's file systems.
fn pivot() -> Result<(), Failure> {
    nix::unistd::pivot_root(".", ".").step("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("detach the old root")?;
    rustix::process::chdir("/").step("enter the root")?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    set_mount_attributes(root.step("open the root")?.as_fd(), READ_ONLY, false).step("make the root read-only")
}

/// Fails unless the working directory is the one that was asked for, in this root.
pub(crate) fn change_directory(spec: &Spec) -> Result<(), Failure> {
    let step = || format!("enter {}", spec.directory.display());
    rustix::process::chdir(&spec.directory).step(step())?;
    let own = std::fs::metadata(".").step(step())?;
    let named = std::fs::metadata(std::env::current_dir().step(step())?).step(step())?;
    if (own.dev(), own.ino()) != (named.dev(), named.ino()) {
        return Err(Failure::new(step(), io::Error::other("it is outside the root")));
    }
    Ok(())
}
