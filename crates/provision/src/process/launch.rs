//! Resolves a launch plan: looks up the program, and completes limits, environment and what the instance sees.

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use gauntlet_domain::{Error, LaunchPlan, Limits, Protocol, Result};
use gauntlet_sandbox::{Bind, HostPaths, Level, ResourceLimits, Root, View};

use super::{Config, LimitBackend, Process, record::Launch};

/// The environment variable with the directory of the scenario's files.
const FILES_VARIABLE: &str = "SCENARIO_DIR";

/// Where an instance with a root of its own sees the scenario's files, and the configured directories of programs.
const SCENARIO: &str = "/scenario";
const PROGRAMS: &str = "/programs";
/// Directories that are part of the instance's system.
const SYSTEM: [&str; 3] = ["/usr", "/bin", "/sbin"];
/// The bytes of disk for which an instance may have a file, and the least number of files.
const BYTES_PER_INODE: u64 = 16 << 10;
const MIN_INODES: u64 = 64;
const HOSTNAME: &str = "gauntlet";
/// What programs need of the machine's files, besides those of the scenario: for instances without a root of their own.
const HOST_FILES: [&str; 12] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/passwd",
    "/etc/localtime",
    "/proc",
];

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

/// Checks that instances are limited as the operator requires.
///
/// # Errors
/// [`Error::Provision`] if they aren't; the manager's log says why.
pub(super) fn check_backend(required: LimitBackend, backend: LimitBackend) -> Result<()> {
    if backend >= required {
        return Ok(());
    }
    let detail = format!(
        "instances would be limited by {backend}, and {required} is required: the warning before this says why; \
         see docs/adr/017-limits-and-forwarding.md for what control groups need"
    );
    Err(Error::Provision { step: "configure", detail })
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

/// Returns everything that the supervisor needs to run the plan. `work` is the working directory of an instance without a root of its own.
///
/// # Errors
/// [`Error::Provision`] if the program can't be found, a limit is above its maximum, or the isolation that the scenario asks for is refused.
pub(super) fn resolve(
    process: &Process,
    work: &Path,
    ports: &BTreeMap<String, u16>,
    plan: LaunchPlan,
) -> Result<Launch> {
    let config = &process.config;
    let level = process.isolation.choose(plan.isolation)?;
    let LaunchPlan { files, command, env, readiness, limits, connection_info, flags, ports: specs, .. } = plan;
    let mut command = command.into_iter();
    let program = command.next().ok_or_else(|| refused("the scenario's command is empty".to_owned()))?;
    let limits = effective_limits(&limits, &config.defaults, &config.maximums)?;
    let paths = if level.has_namespaces() {
        Paths::inside(config, limits.disk, files)
    } else {
        let tcp = |name: &str| specs.iter().any(|spec| spec.name == name && spec.protocol == Protocol::Tcp);
        let tcp_ports = ports.iter().filter(|(name, _)| tcp(name)).map(|(_, port)| *port).collect();
        Paths::on_host(config, files, work, tcp_ports)
    };
    let search: Vec<_> = paths.search.iter().map(|place| place.seen.clone()).collect();
    let path = std::env::join_paths(&search)
        .map_err(|error| refused(format!("the configured program path: {error}")))?
        .into_string()
        .map_err(|path| refused(format!("the configured program path {path:?} is not UTF-8")))?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), text(&paths.work)),
        ("TMPDIR".to_owned(), text(&paths.temporary)),
        (FILES_VARIABLE.to_owned(), text(&paths.files.seen)),
    ]);
    environment.extend(env);
    Ok(Launch {
        isolation: level,
        program: paths.find_program(&program)?,
        args: command.collect(),
        env: environment,
        directory: paths.work,
        view: paths.view,
        resource_limits: resource_limits(level, process.limit_backend(), &limits),
        uids: (*config.uids.start(), *config.uids.end()),
        output: limits.output.unwrap_or(DEFAULT_OUTPUT),
        limits,
        grace: config.grace,
        readiness,
        connection_info,
        flags,
    })
}

fn resource_limits(level: Level, backend: LimitBackend, limits: &Limits) -> ResourceLimits {
    ResourceLimits {
        open_files: limits.open_files,
        cpu_seconds: limits.cpu_seconds,
        // A process's address space is larger than its memory, so it is limited only where nothing else is.
        address_space: limits.memory.filter(|_| backend == LimitBackend::Rlimit),
        file_size: limits.disk,
        // The kernel counts these per user, so they are limited only where the instance has a user of its own, and nothing else limits them.
        processes: limits
            .processes
            .filter(|_| level.has_namespaces() && backend == LimitBackend::Rlimit)
            .map(|processes| processes.saturating_add(level.own_threads())),
    }
}

/// A file or directory of this machine, and where the instance sees it.
struct Place {
    host: PathBuf,
    seen: PathBuf,
}

/// What an instance sees, and where.
struct Paths {
    files: Place,
    work: PathBuf,
    temporary: PathBuf,
    /// The directories to look up programs in.
    search: Vec<Place>,
    /// The root that absolute paths begin at.
    system: PathBuf,
    view: View,
}

impl Paths {
    /// For an instance with a root of its own.
    fn inside(config: &Config, disk: Option<u64>, files: PathBuf) -> Self {
        let mut binds = vec![Bind { source: files.clone(), target: SCENARIO.into() }];
        let mut search = Vec::new();
        for (number, dir) in config.path.iter().enumerate() {
            if SYSTEM.iter().any(|system| dir.starts_with(system)) {
                let host = config.system.join(dir.strip_prefix("/").unwrap_or(dir));
                search.push(Place { host, seen: dir.clone() });
            } else if dir.is_dir() {
                let seen = Path::new(PROGRAMS).join(number.to_string());
                binds.push(Bind { source: dir.clone(), target: seen.clone() });
                search.push(Place { host: dir.clone(), seen });
            }
        }
        let root = Root {
            system: config.system.clone(),
            binds,
            size: disk,
            inodes: disk.map(|disk| (disk / BYTES_PER_INODE).max(MIN_INODES)),
            hostname: HOSTNAME.to_owned(),
        };
        Self {
            files: Place { host: files, seen: SCENARIO.into() },
            work: "/work".into(),
            temporary: "/tmp".into(),
            search,
            system: config.system.clone(),
            view: View::Root(root),
        }
    }

    /// For an instance on this machine's file system.
    fn on_host(config: &Config, files: PathBuf, work: &Path, tcp_ports: Vec<u16>) -> Self {
        let same = |path: &PathBuf| Place { host: path.clone(), seen: path.clone() };
        let mut read: Vec<_> = HOST_FILES.iter().map(PathBuf::from).collect();
        read.push(files.clone());
        read.extend(config.path.iter().cloned());
        Self {
            files: same(&files),
            work: work.to_owned(),
            temporary: work.to_owned(),
            search: config.path.iter().map(same).collect(),
            system: "/".into(),
            view: View::Host(HostPaths { read, write: vec![work.to_owned()], tcp_ports }),
        }
    }

    /// Looks up a program: an absolute path as it is, another path with a slash in the scenario's files, a name in the scenario's files and then
    /// in the directories of programs. Returns its path as the instance sees it.
    fn find_program(&self, program: &str) -> Result<PathBuf> {
        let named = Path::new(program);
        let below = |place: &Place, name: &Path| (place.host.join(name), place.seen.join(name));
        let mut candidates = vec![match (named.strip_prefix(&self.files.seen), named.strip_prefix("/")) {
            (Ok(name), _) => below(&self.files, name),
            (_, Ok(name)) => (self.system.join(name), named.to_owned()),
            _ => below(&self.files, named),
        }];
        if !program.contains('/') {
            candidates.extend(self.search.iter().map(|place| below(place, named)));
        }
        let mut not_executable = None;
        for (host, seen) in candidates {
            match std::fs::metadata(&host) {
                Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(seen),
                Ok(meta) if meta.is_file() => not_executable = not_executable.or(Some(host)),
                _ => {}
            }
        }
        Err(refused(match not_executable {
            Some(found) => format!("command {program:?}: {} is not executable", found.display()),
            None if named.is_absolute() => format!("command {program:?} not found"),
            None if program.contains('/') => format!("command {program:?} not found in the scenario's files"),
            None => {
                let searched: Vec<_> = self.search.iter().map(|place| place.host.display().to_string()).collect();
                format!("command {program:?} not found in the scenario's files, nor in {}", searched.join(", "))
            }
        }))
    }
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
        let mut config = Config::new(dir.path());
        config.path = vec![path.clone(), "/usr/bin".into(), dir.path().join("missing")];
        let on_host = Paths::on_host(&config, files.clone(), dir.path(), Vec::new());
        let found = |name: &str| on_host.find_program(name).map_err(|error| error.to_string());
        assert_eq!(found("both"), Ok(files.join("both")));
        assert_eq!(found("only"), Ok(path.join("only")));
        assert_eq!(found("bin/inner"), Ok(files.join("bin/inner")));
        assert!(found("text").unwrap_err().contains("is not executable"));
        assert!(found("none").unwrap_err().contains("nor in"));
        assert!(found("/none").unwrap_err().contains("\"/none\" not found"));

        let inside = Paths::inside(&config, Some(1 << 20), files);
        let found = |name: &str| inside.find_program(name).map_err(|error| error.to_string());
        assert_eq!(found("both"), Ok("/scenario/both".into()));
        assert_eq!(found("/scenario/both"), Ok("/scenario/both".into()));
        assert_eq!(found("only"), Ok("/programs/0/only".into()));
        assert_eq!(found("sh"), Ok("/usr/bin/sh".into()));
        let View::Root(root) = &inside.view else { panic!("no root") };
        let targets: Vec<_> = root.binds.iter().map(|bind| bind.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/scenario", "/programs/0"]);
    }
}
