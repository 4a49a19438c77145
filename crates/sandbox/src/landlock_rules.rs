//! Landlock: which paths and ports a program may use, whatever its user may.

use std::io;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, NetPort, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

use crate::{Failure, HostPaths, View};

/// The newest rights that are used.
const RIGHTS: ABI = ABI::V6;
/// The rights that level `landlock` needs: the first with TCP ports (Linux 6.7).
const REQUIRED: ABI = ABI::V4;
const WRITABLE: [&str; 3] = ["/work", "/tmp", "/dev/shm"];
const DEVICES: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
const STEP: &str = "landlock";

/// Restricts this process for good.
///
/// With a root of its own, this is a second line of defence, as far as the kernel has it. Without one it is the only line, and must hold.
pub(crate) fn restrict(view: &View) -> Result<(), Failure> {
    let restricted = match view {
        View::Root(_) => restrict_root().map(|_| true),
        View::Host(paths) => restrict_host(paths).map(|status| status == RulesetStatus::FullyEnforced),
    };
    match restricted {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::new(STEP, io::Error::other("the kernel does not enforce all rules"))),
        Err(error) => {
            // The kernel's error number, if there is one below the library's errors.
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(current) = cause {
                if let Some(io) = current.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                    return Err(Failure { step: STEP.to_owned(), errno: Some(io), error: error.to_string() });
                }
                cause = current.source();
            }
            Err(Failure::new(STEP, io::Error::other(error.to_string())))
        }
    }
}

/// Whether the kernel has Landlock. Restricts nothing.
pub(crate) fn is_available() -> bool {
    let create = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))?
            .create()
    };
    create().is_ok()
}

fn restrict_root() -> Result<RulesetStatus, RulesetError> {
    let read = AccessFs::from_read(RIGHTS);
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .scope(Scope::from_all(RIGHTS))?
        .create()?
        .add_rules(path_beneath_rules(["/"], read))?
        .add_rules(path_beneath_rules(WRITABLE, AccessFs::from_all(RIGHTS)))?
        .add_rules(path_beneath_rules(DEVICES, device_access()))?
        .restrict_self()?;
    Ok(status.ruleset)
}

fn restrict_host(paths: &HostPaths) -> Result<RulesetStatus, RulesetError> {
    let read = AccessFs::from_read(REQUIRED);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(REQUIRED))?
        .handle_access(AccessNet::from_all(REQUIRED))?
        // Signals and abstract sockets: since Linux 6.12.
        .set_compatibility(CompatLevel::BestEffort)
        .scope(Scope::from_all(RIGHTS))?
        .create()?
        .add_rules(path_beneath_rules(&paths.read, read))?
        .add_rules(path_beneath_rules(&paths.write, AccessFs::from_all(REQUIRED)))?
        .add_rules(path_beneath_rules(DEVICES, device_access() & AccessFs::from_all(REQUIRED)))?;
    for port in &paths.tcp_ports {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

fn device_access() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev
}
