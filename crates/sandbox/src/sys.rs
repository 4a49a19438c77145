//! System calls without a safe wrapper in rustix or nix.

#![allow(unsafe_code, reason = "raw system calls; everything else in this crate is safe")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use rustix::process::Pid;

/// Forks. Returns the child's process id, and `None` in the child.
///
/// # Errors
/// `EINVAL` if this process has other threads: the child would have a copy of the locks that they hold.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(rustix::io::Errno::INVAL.into());
    }
    // SAFETY: this is the only thread, as was just checked, so the child may do all that the parent may.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        pid => Pid::from_raw(pid).filter(|_| pid > 0).map(Some).ok_or_else(io::Error::last_os_error),
    }
}

/// Marks every descriptor from 3 on so that exec closes it.
pub(crate) fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory. Descriptors stay open, so no owner of one is affected before exec.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The attributes that [`set_mount_attributes`] adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttributes(u64);

impl MountAttributes {
    pub(crate) const READ_ONLY: Self = Self(libc::MOUNT_ATTR_RDONLY);
    pub(crate) const NO_SETUID: Self = Self(libc::MOUNT_ATTR_NOSUID);
    pub(crate) const NO_DEVICES: Self = Self(libc::MOUNT_ATTR_NODEV);
    pub(crate) const NO_EXEC: Self = Self(libc::MOUNT_ATTR_NOEXEC);

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Adds attributes to the mount that `mount` refers to, and with `recursive` to those below it.
pub(crate) fn set_mount_attributes(mount: impl AsFd, add: MountAttributes, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: add.0, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, and the attributes and their size describe a live value, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
