//! The last steps of the process that becomes the program.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    io,
    os::unix::ffi::OsStrExt as _,
};

use rustix::fs::{Mode, OFlags};

use crate::{Failure, Level, Spec, View, failure::StepExt as _, filter, landlock_rules, privileges, root, sys};

/// Which of the last steps apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Restrictions {
    /// It has capabilities to give up.
    pub(crate) capabilities: bool,
    /// Landlock and seccomp apply.
    pub(crate) filters: bool,
}

/// Gives up all privileges and calls exec. Returns only if that fails, or `Ok(None)` if there is no program: a probe.
pub(crate) fn execute(spec: &Spec, restrictions: Restrictions) -> Result<Option<Infallible>, Failure> {
    // Fails only for a process group leader.
    let _ = rustix::process::setsid();
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty()).step("open /dev/null")?;
    rustix::stdio::dup2_stdin(null).step("replace standard input")?;
    sys::close_on_exec_from_3().step("close descriptors")?;
    root::change_directory(spec)?;
    privileges::limit(&spec.limits)?;
    if restrictions.capabilities {
        privileges::drop_capabilities()?;
    }
    rustix::thread::set_no_new_privs(true).step("no_new_privs")?;
    let Some(program) = &spec.program else {
        if restrictions.filters {
            landlock_rules::restrict(&spec.view)?;
            filter::install(&spec.view)?;
        }
        return Ok(None);
    };
    let step = || format!("execute {}", program.display());
    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from).step(step());
    let path = text(program.as_os_str())?;
    let arguments = std::iter::once(program.as_os_str()).chain(spec.args.iter().map(OsStr::new)).map(text);
    let arguments: Vec<_> = arguments.collect::<Result<_, _>>()?;
    let environment = spec.env.iter().map(|(name, value)| text(OsStr::new(&format!("{name}={value}"))));
    let environment: Vec<_> = environment.collect::<Result<_, _>>()?;
    if restrictions.filters {
        landlock_rules::restrict(&spec.view)?;
        filter::install(&spec.view)?;
    }
    nix::unistd::execve(&path, &arguments, &environment).step(step()).map(Some)
}

impl Restrictions {
    pub(crate) fn of(level: Level) -> Self {
        let is_root = rustix::process::geteuid().is_root();
        let filters = level >= Level::Landlock;
        Self { capabilities: level.has_namespaces() || filters && is_root, filters }
    }
}

impl View {
    /// Whether the program may use sockets of the machine's network.
    pub(crate) fn is_host(&self) -> bool {
        matches!(self, Self::Host(_))
    }
}
