//! The data directory of `gauntlet dev`, and the checks before anything starts.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The built-in examples: challenge, scenario, and the program that the scenario runs.
const EXAMPLES: [(&str, &str, &str); 3] = [
    ("flaky", include_str!("../../../../examples/flaky/scenario/scenario.yaml"), "example-web"),
    ("vault", include_str!("../../../../examples/vault/scenario/scenario.yaml"), "example-vault"),
    ("web", include_str!("../../../../examples/web/scenario/scenario.yaml"), "example-web"),
];

/// The data directory, locked by this process until it is dropped.
#[derive(Debug)]
pub(super) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Creates and locks the directory.
    ///
    /// # Errors
    /// When another `gauntlet dev` uses it, or it cannot be written. The text includes what to do.
    pub(super) fn lock(dir: &Path) -> Result<Self> {
        let cannot = || format!("cannot write to {}; pass a writable directory with --data", dir.display());
        fs::create_dir_all(dir).with_context(cannot)?;
        let path = dir.join("dev.lock");
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).with_context(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                file.read_to_string(&mut owner).with_context(cannot)?;
                bail!(
                    "another gauntlet dev (process {}) uses {}; stop it, or start this one with its own --data, --port and --debug-port",
                    owner.trim(),
                    dir.display()
                );
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).with_context(cannot)?;
        Ok(Self { path: dir.canonicalize().with_context(cannot)?, _lock: file })
    }

    /// The absolute path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the log of this run. The log of the run before is kept as `gauntlet.old.log`.
    pub(super) fn create_log(&self) -> Result<(PathBuf, File)> {
        let path = self.path.join("gauntlet.log");
        // Fails before the first run, when there is no log.
        let _ = fs::rename(&path, self.path.join("gauntlet.old.log"));
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok((path, file))
    }

    /// Writes the scenarios of the built-in examples and returns their directory. Returns `None` if one of their programs is in none of the
    /// directories of `program_path`.
    pub(super) fn write_examples(&self, program_path: &[PathBuf]) -> Result<Option<PathBuf>> {
        let found = |program: &str| program_path.iter().any(|dir| dir.join(program).is_file());
        if !EXAMPLES.iter().all(|(_, _, program)| found(program)) {
            return Ok(None);
        }
        let root = self.path.join("examples");
        for (name, scenario, _) in EXAMPLES {
            let dir = root.join(name).join("scenario");
            fs::create_dir_all(&dir)
                .and_then(|()| fs::write(dir.join("scenario.yaml"), scenario))
                .with_context(|| format!("cannot write {}", dir.display()))?;
        }
        Ok(Some(root))
    }
}

/// Fails if a port is in use; the error names the flag that sets another.
pub(super) fn check_port(port: u16, flag: &str) -> Result<()> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(()),
        Err(error) => bail!(
            "port {port} is in use ({error}): stop the process listening on it (`ss -ltnp sport = :{port}`) or pass {flag}"
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn directory_is_locked_by_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("new/data");
        let locked = DataDir::lock(&data).unwrap();
        let error = DataDir::lock(&data).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())) && error.contains("--data"), "{error}");
        drop(locked);
        DataDir::lock(&data).unwrap();
    }

    #[test]
    fn port_in_use_is_named_with_its_flag() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = check_port(port, "--port").unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.ends_with("--port"), "{error}");
        check_port(0, "--port").unwrap();
    }

    #[test]
    fn previous_log_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let locked = DataDir::lock(dir.path()).unwrap();
        for run in ["one", "two"] {
            write!(locked.create_log().unwrap().1, "{run}").unwrap();
        }
        assert_eq!(fs::read_to_string(locked.path().join("gauntlet.log")).unwrap(), "two");
        assert_eq!(fs::read_to_string(locked.path().join("gauntlet.old.log")).unwrap(), "one");
    }

    #[test]
    fn examples_are_written_if_their_programs_exist() {
        let (dir, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let locked = DataDir::lock(dir.path()).unwrap();
        let path = [programs.path().to_owned()];
        assert_eq!(locked.write_examples(&path).unwrap(), None);
        for program in ["example-web", "example-vault"] {
            fs::write(programs.path().join(program), "").unwrap();
        }
        let root = locked.write_examples(&path).unwrap().unwrap();
        assert!(root.join("web/scenario/scenario.yaml").is_file());
    }
}
