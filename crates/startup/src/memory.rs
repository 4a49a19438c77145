//! Keeps secrets in memory from other processes.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

/// Leaves the memory of this process out of core dumps, and hides its memory and environment from other processes of the same user: they can
/// neither trace it nor read `/proc/PID/environ` or `/proc/PID/mem`. Programs that it starts are not affected.
///
/// # Errors
/// When the kernel refuses.
pub fn protect_memory() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}
