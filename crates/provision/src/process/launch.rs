//! Resolves a launch plan: looks up the program, and completes limits and environment.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::{Error, LaunchPlan, Limits, Result};

use super::{Config, LimitBackend, record::Launch};

/// The environment variable with the directory of the scenario's files.
const FILES_VARIABLE: &str = "SCENARIO_DIR";

/// Bytes of output that are kept if nobody says otherwise.
const DEFAULT_OUTPUT: u64 = 1 << 20;

/// The limits of instances for which neither scenario nor operator sets any. Honest instances stay far below these; they keep one that isn't from
/// harming others.
///
/// Memory is only limited where an instance has a group: elsewhere it would limit the address space, of which many runtimes reserve more than they
/// use.
pub fn default_limits(backend: LimitBackend) -> Limits {
    Limits {
        memory: (backend > LimitBackend::Rlimit).then_some(512 << 20),
        processes: Some(256),
        cpu_quota: Some(100),
        disk: Some(256 << 20),
        cpu_seconds: None,
        open_files: Some(1024),
        output: Some(DEFAULT_OUTPUT),
    }
}

/// Fills the operator's defaults up with [`default_limits`].
pub(super) fn complete_defaults(defaults: &mut Limits, backend: LimitBackend) {
    let Limits { memory, processes, cpu_quota, disk, cpu_seconds, open_files, output } = default_limits(backend);
    for (limit, default) in [
        (&mut defaults.memory, memory),
        (&mut defaults.processes, processes),
        (&mut defaults.cpu_quota, cpu_quota),
        (&mut defaults.disk, disk),
        (&mut defaults.cpu_seconds, cpu_seconds),
        (&mut defaults.open_files, open_files),
        (&mut defaults.output, output),
    ] {
        *limit = limit.or(default);
    }
}

/// Returns everything that the supervisor needs to run the plan.
///
/// # Errors
/// [`Error::Provision`] if the program can't be found or a limit is above its maximum.
pub(super) fn resolve(config: &Config, backend: LimitBackend, work: &Path, plan: LaunchPlan) -> Result<Launch> {
    let LaunchPlan { files, command, env, readiness, limits, connection_info, flags, .. } = plan;
    let mut command = command.into_iter();
    let program = command.next().ok_or_else(|| refused("the scenario's command is empty".to_owned()))?;
    let limits = effective_limits(&limits, &config.defaults, &config.maximums)?;
    // A process's address space is larger than its memory, so it is limited only where nothing else is.
    let address_space = limits.memory.filter(|_| backend == LimitBackend::Rlimit);
    let path = std::env::join_paths(&config.path)
        .map_err(|error| refused(format!("the configured program path: {error}")))?
        .into_string()
        .map_err(|path| refused(format!("the configured program path {path:?} is not UTF-8")))?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut environment = std::collections::BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), text(work)),
        ("TMPDIR".to_owned(), text(work)),
        (FILES_VARIABLE.to_owned(), text(&files)),
    ]);
    environment.extend(env);
    Ok(Launch {
        program: find_program(&program, &files, &config.path)?,
        args: command.collect(),
        env: environment,
        output: limits.output.unwrap_or(DEFAULT_OUTPUT),
        address_space,
        limits,
        grace: config.grace,
        readiness,
        connection_info,
        flags,
    })
}

/// Looks up a program: an absolute path as it is, another path with a slash in the scenario's files, a name in the scenario's files and then in
/// `path`.
fn find_program(program: &str, files: &Path, path: &[PathBuf]) -> Result<PathBuf> {
    let named = Path::new(program);
    let mut candidates = vec![if named.is_absolute() { named.to_owned() } else { files.join(named) }];
    if !program.contains('/') {
        candidates.extend(path.iter().map(|dir| dir.join(named)));
    }
    let mut not_executable = None;
    for candidate in candidates {
        match std::fs::metadata(&candidate) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(candidate),
            Ok(meta) if meta.is_file() => not_executable = not_executable.or(Some(candidate)),
            _ => {}
        }
    }
    Err(refused(match not_executable {
        Some(found) => format!("command {program:?}: {} is not executable", found.display()),
        None if named.is_absolute() => format!("command {program:?} not found"),
        None if program.contains('/') => format!("command {program:?} not found in the scenario's files"),
        None => {
            let path: Vec<_> = path.iter().map(|dir| dir.display().to_string()).collect();
            format!("command {program:?} not found in the scenario's files, nor in {}", path.join(", "))
        }
    }))
}

/// The scenario's limits, or the defaults. Rejects a limit above its maximum instead of lowering it silently.
fn effective_limits(requested: &Limits, defaults: &Limits, maximums: &Limits) -> Result<Limits> {
    let limit =
        |name: &str, requested: Option<u64>, default: Option<u64>, maximum: Option<u64>| match (requested, maximum) {
            (Some(requested), Some(maximum)) if requested > maximum => {
                let what =
                    format!("limit {name}: the scenario asks for {requested}, this machine allows at most {maximum}");
                Err(refused(what))
            }
            (Some(requested), _) => Ok(Some(requested)),
            (None, maximum) => Ok(match (default, maximum) {
                (Some(default), Some(maximum)) => Some(default.min(maximum)),
                (default, maximum) => default.or(maximum),
            }
            .filter(|limit| *limit != Limits::NONE)),
        };
    Ok(Limits {
        memory: limit("memory", requested.memory, defaults.memory, maximums.memory)?,
        processes: limit("processes", requested.processes, defaults.processes, maximums.processes)?,
        cpu_quota: limit("cpu_quota", requested.cpu_quota, defaults.cpu_quota, maximums.cpu_quota)?,
        disk: limit("disk", requested.disk, defaults.disk, maximums.disk)?,
        cpu_seconds: limit("cpu", requested.cpu_seconds, defaults.cpu_seconds, maximums.cpu_seconds)?,
        open_files: limit("open_files", requested.open_files, defaults.open_files, maximums.open_files)?,
        output: limit("output", requested.output, defaults.output, maximums.output)?,
    })
}

fn refused(detail: String) -> Error {
    Error::Provision { step: "prepare", detail }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn limits_have_defaults_and_never_exceed_their_maximum() {
        let limits = |memory| Limits { memory, ..Limits::default() };
        let settled = |requested, default, maximum| {
            effective_limits(&limits(requested), &limits(default), &limits(maximum)).map(|l| l.memory)
        };
        assert_eq!(settled(None, None, None).unwrap(), None);
        assert_eq!(settled(None, Some(3), None).unwrap(), Some(3));
        assert_eq!(settled(None, Some(3), Some(2)).unwrap(), Some(2));
        assert_eq!(settled(None, None, Some(2)).unwrap(), Some(2));
        assert_eq!(settled(Some(2), Some(9), Some(2)).unwrap(), Some(2));
        assert_eq!(settled(None, Some(Limits::NONE), None).unwrap(), None);
        assert_eq!(settled(None, Some(Limits::NONE), Some(2)).unwrap(), Some(2));
        let error = settled(Some(3), None, Some(2)).unwrap_err().to_string();
        assert!(error.contains("asks for 3") && error.contains("at most 2"), "{error}");
    }

    #[test]
    fn scenario_programs_take_precedence() {
        let dir = tempfile::tempdir().unwrap();
        let (files, path) = (dir.path().join("files"), dir.path().join("path"));
        let put = |at: PathBuf, mode| {
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::fs::write(&at, "").unwrap();
            std::fs::set_permissions(&at, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put(files.join("both"), 0o755);
        put(path.join("both"), 0o755);
        put(path.join("only"), 0o755);
        put(files.join("bin/inner"), 0o755);
        put(files.join("text"), 0o644);
        let path = [path];
        assert_eq!(find_program("both", &files, &path).unwrap(), files.join("both"));
        assert_eq!(find_program("only", &files, &path).unwrap(), dir.path().join("path/only"));
        assert_eq!(find_program("bin/inner", &files, &path).unwrap(), files.join("bin/inner"));
        assert!(find_program("text", &files, &path).unwrap_err().to_string().contains("is not executable"));
        assert!(find_program("none", &files, &path).unwrap_err().to_string().contains("nor in"));
        assert!(find_program("/none", &files, &path).unwrap_err().to_string().contains("\"/none\" not found"));
    }
}
