//! Gives up privileges.

use std::io;

use rustix::{
    process::{Gid, Resource, Rlimit, Uid},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets},
};

use crate::{Failure, ResourceLimits, failure::StepExt as _};

/// CPU seconds between SIGXCPU, which ends a program that doesn't handle it, and SIGKILL.
const CPU_GRACE: u64 = 2;
/// Bytes of locked memory, and of message queues.
const LOCKED_MEMORY: u64 = 64 << 10;
/// Not 0: the kernel would run the machine's handler of core dumps, if it has one. Too small for a dump to be written.
const CORE_SIZE: u64 = 1;

/// Becomes the only user that the inner namespace maps, and keeps the capabilities in that namespace.
pub(crate) fn set_ids(id: u32) -> Result<(), Failure> {
    let keep = CapabilitiesSecureBits::KEEP_CAPS | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    rustix::thread::set_capabilities_secure_bits(keep).step("keep capabilities")?;
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("set the group")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("set the user")?;
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::empty()).step("reset securebits")
}

/// Gives up all capabilities of this process, without a way to regain one by exec.
pub(crate) fn drop_capabilities() -> Result<(), Failure> {
    rustix::thread::clear_ambient_capability_set().step("clear ambient capabilities")?;
    for bit in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Above the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(Failure::new("drop the bounding set", error)),
        }
    }
    clear_capabilities()
}

/// Gives up the capabilities that this process has now.
pub(crate) fn clear_capabilities() -> Result<(), Failure> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).step("drop capabilities")
}

/// Sets the limits, as far as this process's own allow.
pub(crate) fn limit(limits: &ResourceLimits) -> Result<(), Failure> {
    let wanted = [
        (Resource::Core, Some(CORE_SIZE), 0),
        (Resource::Nofile, limits.open_files, 0),
        (Resource::Cpu, limits.cpu_seconds, CPU_GRACE),
        (Resource::As, limits.address_space, 0),
        (Resource::Fsize, limits.file_size, 0),
        (Resource::Nproc, limits.processes, 0),
        (Resource::Memlock, Some(LOCKED_MEMORY), 0),
        (Resource::Msgqueue, Some(LOCKED_MEMORY), 0),
        (Resource::Nice, Some(0), 0),
        (Resource::Rtprio, Some(0), 0),
    ];
    wanted.into_iter().try_for_each(|(resource, soft, grace)| {
        soft.map_or(Ok(()), |soft| set_limit(resource, soft, grace)).step(format!("limit {resource:?}"))
    })
}

/// Sets the soft limit to `soft` and the hard limit to `soft + grace`, as far as the hard limit allows.
fn set_limit(resource: Resource, soft: u64, grace: u64) -> io::Result<()> {
    let own_maximum = rustix::process::getrlimit(resource).maximum;
    let allowed = |value: u64| Some(own_maximum.map_or(value, |maximum| maximum.min(value)));
    let (current, maximum) = (allowed(soft), allowed(soft.saturating_add(grace)));
    Ok(rustix::process::setrlimit(resource, Rlimit { current, maximum })?)
}
