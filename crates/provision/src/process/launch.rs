//! From a launch plan to what is run: the program found, limits and environment settled.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::{Error, LaunchPlan, Limits, Result};

use super::{Config, record::Launch};

/// Where the scenario's files are, in an instance's environment.
const FILES: &str = "SCENARIO_DIR";

/// Settles everything that the supervisor needs to know.
pub(super) fn decide(config: &Config, work: &Path, plan: LaunchPlan) -> Result<Launch> {
    let LaunchPlan { files, command, env, readiness, limits, connection_info, flags, .. } = plan;
    let mut command = command.into_iter();
    let program = command.next().ok_or_else(|| refused("the scenario's command is empty".to_owned()))?;
    let limits = settle(&limits, &config.defaults, &config.maximums)?;
    let path = std::env::join_paths(&config.path)
        .map_err(|error| refused(format!("the configured program path: {error}")))?
        .into_string()
        .map_err(|path| refused(format!("the configured program path {path:?} is not UTF-8")))?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut whole = std::collections::BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), text(work)),
        ("TMPDIR".to_owned(), text(work)),
        (FILES.to_owned(), text(&files)),
    ]);
    whole.extend(env);
    Ok(Launch {
        program: find(&program, &files, &config.path)?,
        args: command.collect(),
        env: whole,
        output: limits.output.unwrap_or(1 << 20),
        limits,
        grace: config.grace,
        readiness,
        connection_info,
        flags,
    })
}

/// A program: absolute as it is; with a slash, in the scenario's files; else there, then in the path.
fn find(program: &str, files: &Path, path: &[PathBuf]) -> Result<PathBuf> {
    let named = Path::new(program);
    let mut candidates = vec![if named.is_absolute() { named.to_owned() } else { files.join(named) }];
    if !program.contains('/') {
        candidates.extend(path.iter().map(|dir| dir.join(named)));
    }
    let mut inert = None;
    for candidate in candidates {
        match std::fs::metadata(&candidate) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(candidate),
            Ok(meta) if meta.is_file() => inert = inert.or(Some(candidate)),
            _ => {}
        }
    }
    Err(refused(match inert {
        Some(found) => format!("command {program:?}: {} is not executable", found.display()),
        None if named.is_absolute() => format!("command {program:?} not found"),
        None if program.contains('/') => format!("command {program:?} not found in the scenario's files"),
        None => {
            let path: Vec<_> = path.iter().map(|dir| dir.display().to_string()).collect();
            format!("command {program:?} not found in the scenario's files, nor in {}", path.join(", "))
        }
    }))
}

/// What was asked for, or the default; refused above the maximum, never cut to it in silence.
fn settle(asked: &Limits, defaults: &Limits, maximums: &Limits) -> Result<Limits> {
    let one = |name: &str, asked: Option<u64>, default: Option<u64>, most: Option<u64>| match (asked, most) {
        (Some(asked), Some(most)) if asked > most => {
            Err(refused(format!("limit {name}: the scenario asks for {asked}, this machine allows at most {most}")))
        }
        (Some(asked), _) => Ok(Some(asked)),
        (None, most) => Ok(match (default, most) {
            (Some(default), Some(most)) => Some(default.min(most)),
            (default, most) => default.or(most),
        }),
    };
    Ok(Limits {
        memory: one("memory", asked.memory, defaults.memory, maximums.memory)?,
        cpu_seconds: one("cpu", asked.cpu_seconds, defaults.cpu_seconds, maximums.cpu_seconds)?,
        open_files: one("open_files", asked.open_files, defaults.open_files, maximums.open_files)?,
        output: one("output", asked.output, defaults.output, maximums.output)?,
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
    fn limits_default_and_never_exceed() {
        let limits = |memory| Limits { memory, ..Limits::default() };
        let settled = |asked, default, most| settle(&limits(asked), &limits(default), &limits(most)).map(|l| l.memory);
        assert_eq!(settled(None, None, None).unwrap(), None);
        assert_eq!(settled(None, Some(3), None).unwrap(), Some(3));
        assert_eq!(settled(None, Some(3), Some(2)).unwrap(), Some(2));
        assert_eq!(settled(None, None, Some(2)).unwrap(), Some(2));
        assert_eq!(settled(Some(2), Some(9), Some(2)).unwrap(), Some(2));
        let error = settled(Some(3), None, Some(2)).unwrap_err().to_string();
        assert!(error.contains("asks for 3") && error.contains("at most 2"), "{error}");
    }

    #[test]
    fn programs_of_the_scenario_come_first() {
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
        assert_eq!(find("both", &files, &path).unwrap(), files.join("both"));
        assert_eq!(find("only", &files, &path).unwrap(), dir.path().join("path/only"));
        assert_eq!(find("bin/inner", &files, &path).unwrap(), files.join("bin/inner"));
        assert!(find("text", &files, &path).unwrap_err().to_string().contains("is not executable"));
        assert!(find("none", &files, &path).unwrap_err().to_string().contains("nor in"));
        assert!(find("/none", &files, &path).unwrap_err().to_string().contains("\"/none\" not found"));
    }
}
