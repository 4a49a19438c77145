//! seccomp: which system calls a program may make.
//!
//! Two filters, of which the kernel takes the stricter answer: an allow-list, so that calls of newer kernels and of x32 fail with `ENOSYS`,
//! which libraries handle, and a list of denied calls and arguments that fail with `EPERM`. Calls of another architecture kill the process.

mod calls;

use std::{collections::BTreeMap, io};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::{Failure, View, failure::StepExt as _};

const NAMESPACES: [libc::c_int; 8] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWTIME,
];
/// Families that have no reach beyond the network namespace. Of `AF_NETLINK`, only routes (`NETLINK_ROUTE`).
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// Nothing, Linux with short inode numbers, without random addresses (debuggers ask for it), both, and the query.
const PERSONALITIES: [u32; 6] = [0, 0x8, 0x2_0000, 0x2_0008, 0x4_0000, u32::MAX];
const SOCKET_TYPE_MASK: u64 = 0xf;
const STEP: &str = "seccomp";

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Result<T> = std::result::Result<T, seccompiler::Error>;

/// Restricts this process for good. Needs `no_new_privs`.
pub(crate) fn install(view: &View) -> std::result::Result<(), Failure> {
    let install = || -> Result<()> {
        // Compiled before the first is installed.
        let (allowed, denied) = (allow()?, deny(view)?);
        seccompiler::apply_filter(&denied)?;
        seccompiler::apply_filter(&allowed)
    };
    install()
        .map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
            other => io::Error::other(other.to_string()),
        })
        .step(STEP)
}

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?)
}

fn errno(error: rustix::io::Errno) -> SeccompAction {
    SeccompAction::Errno(error.raw_os_error().unsigned_abs())
}

fn allow() -> Result<BpfProgram> {
    let allowed = [calls::ALLOWED, calls::ALLOWED_RECENT, calls::ALLOWED_HERE, calls::DENIED, calls::DENIED_HERE];
    let rules = allowed.concat().into_iter().map(|call| (call, Vec::new())).collect();
    compile(rules, errno(rustix::io::Errno::NOSYS), SeccompAction::Allow)
}

fn deny(view: &View) -> Result<BpfProgram> {
    let mut rules: Rules =
        [calls::DENIED, calls::DENIED_HERE].concat().into_iter().map(|call| (call, Vec::new())).collect();
    let masked = |argument, mask: u64, value: u64| condition(argument, SeccompCmpOp::MaskedEq(mask), value);

    let namespaces = NAMESPACES.iter().map(|flag| {
        let flag = u64::from(flag.cast_unsigned());
        SeccompRule::new(vec![masked(0, flag, flag)?])
    });
    rules.insert(libc::SYS_clone, namespaces.collect::<std::result::Result<_, _>>()?);

    let mut sockets = vec![
        none_of(0, &FAMILIES.map(libc::c_int::cast_unsigned))?,
        SeccompRule::new(vec![
            condition(0, SeccompCmpOp::Eq, number(libc::AF_NETLINK))?,
            condition(2, SeccompCmpOp::Ne, number(libc::NETLINK_ROUTE))?,
        ])?,
    ];
    if view.is_host() {
        // Landlock restricts TCP, not UDP, and the network is the machine's.
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = condition(0, SeccompCmpOp::Eq, number(family))?;
            sockets.push(SeccompRule::new(vec![
                family,
                condition(1, SeccompCmpOp::MaskedEq(SOCKET_TYPE_MASK), number(libc::SOCK_DGRAM))?,
            ])?);
        }
    }
    rules.insert(libc::SYS_socketpair, sockets.clone());
    rules.insert(libc::SYS_socket, sockets);

    // Compared as 32 bits, as the kernel does: a value with higher bits set must not pass.
    let inject = [libc::TIOCSTI, libc::TIOCLINUX].map(|request| {
        let request = request & u64::from(u32::MAX);
        SeccompRule::new(vec![condition(1, SeccompCmpOp::Eq, request)?])
    });
    rules.insert(libc::SYS_ioctl, inject.into_iter().collect::<std::result::Result<_, _>>()?);

    rules.insert(libc::SYS_personality, vec![none_of(0, &PERSONALITIES)?]);
    compile(rules, SeccompAction::Allow, errno(rustix::io::Errno::PERM))
}

type Built<T> = std::result::Result<T, seccompiler::BackendError>;

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Built<SeccompCondition> {
    SeccompCondition::new(argument, Dword, operator, value)
}

fn number(value: libc::c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

/// Matches if the argument has none of the values.
fn none_of(argument: u8, values: &[u32]) -> Built<SeccompRule> {
    let conditions = values.iter().map(|value| condition(argument, SeccompCmpOp::Ne, u64::from(*value)));
    SeccompRule::new(conditions.collect::<Built<_>>()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::HostPaths;

    #[test]
    fn no_call_is_both_allowed_and_denied() {
        let denied = [calls::DENIED, calls::DENIED_HERE].concat();
        for call in [calls::ALLOWED, calls::ALLOWED_RECENT, calls::ALLOWED_HERE].concat() {
            assert!(!denied.contains(&call), "{call}");
        }
        assert!(!calls::ALLOWED.contains(&libc::SYS_clone3), "its flags can't be checked");
    }

    #[test]
    fn filters_fit_into_what_the_kernel_accepts() {
        const BPF_MAXINSNS: usize = 4096;
        for program in [allow(), deny(&View::Host(HostPaths::default()))] {
            assert!(program.unwrap().len() < BPF_MAXINSNS);
        }
    }
}
