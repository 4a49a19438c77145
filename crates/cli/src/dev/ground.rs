//! What `gauntlet dev` stands on, checked before anything starts: a directory of its own, free ports, the examples.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The examples that are built in: challenge, scenario, and the program that it runs.
const EXAMPLES: [(&str, &str, &str); 3] = [
    ("flaky", include_str!("../../../../examples/flaky/scenario/scenario.yaml"), "example-web"),
    ("vault", include_str!("../../../../examples/vault/scenario/scenario.yaml"), "example-vault"),
    ("web", include_str!("../../../../examples/web/scenario/scenario.yaml"), "example-web"),
];

/// The data directory, held by this process.
#[derive(Debug)]
pub(super) struct Ground {
    data: PathBuf,
    _held: File,
}

impl Ground {
    /// Makes the directory and takes it. Fails, with what to do about it, while another `gauntlet dev` has it.
    pub(super) fn take(data: &Path) -> Result<Self> {
        let cannot = || format!("cannot write to {}: give --data a directory that can be written", data.display());
        fs::create_dir_all(data).with_context(cannot)?;
        let path = data.join("dev.lock");
        let mut held = OpenOptions::new().create(true).read(true).append(true).open(&path).with_context(cannot)?;
        match held.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                held.read_to_string(&mut owner).with_context(cannot)?;
                bail!(
                    "another gauntlet dev (process {}) uses {}; end that one, or give this one --data, --port and --debug-port of its own",
                    owner.trim(),
                    data.display()
                );
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        held.set_len(0).and_then(|()| writeln!(held, "{}", std::process::id())).with_context(cannot)?;
        Ok(Self { data: data.canonicalize().with_context(cannot)?, _held: held })
    }

    /// The directory, by its whole name.
    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    /// The log of this run; that of the run before is kept beside it.
    pub(super) fn log(&self) -> Result<(PathBuf, File)> {
        let path = self.data.join("gauntlet.log");
        // There is none before the first run.
        let _ = fs::rename(&path, self.data.join("gauntlet.old.log"));
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok((path, file))
    }

    /// A directory with the scenarios of the built-in examples, written anew; `None` when a program of theirs is nowhere in `path`.
    pub(super) fn examples(&self, path: &[PathBuf]) -> Result<Option<PathBuf>> {
        let found = |program: &str| path.iter().any(|dir| dir.join(program).is_file());
        if !EXAMPLES.iter().all(|(_, _, program)| found(program)) {
            return Ok(None);
        }
        let root = self.data.join("examples");
        for (name, scenario, _) in EXAMPLES {
            let dir = root.join(name).join("scenario");
            fs::create_dir_all(&dir)
                .and_then(|()| fs::write(dir.join("scenario.yaml"), scenario))
                .with_context(|| format!("cannot write {}", dir.display()))?;
        }
        Ok(Some(root))
    }
}

/// Fails if something listens on a port that is wanted, naming the flag that chooses another.
pub(super) fn is_free(port: u16, flag: &str) -> Result<()> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(()),
        Err(error) => bail!(
            "port {port} cannot be had ({error}): end what listens there (ss -ltnp sport = :{port} says what it is), or choose another with {flag}"
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn one_at_a_time_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("new/data");
        let ground = Ground::take(&data).unwrap();
        let error = Ground::take(&data).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())) && error.contains("--data"), "{error}");
        drop(ground);
        Ground::take(&data).unwrap();
    }

    #[test]
    fn a_taken_port_is_named_with_the_flag_for_another() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = is_free(port, "--port").unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.ends_with("--port"), "{error}");
        is_free(0, "--port").unwrap();
    }

    #[test]
    fn the_log_of_the_run_before_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let ground = Ground::take(dir.path()).unwrap();
        for run in ["one", "two"] {
            write!(ground.log().unwrap().1, "{run}").unwrap();
        }
        assert_eq!(fs::read_to_string(ground.data().join("gauntlet.log")).unwrap(), "two");
        assert_eq!(fs::read_to_string(ground.data().join("gauntlet.old.log")).unwrap(), "one");
    }

    #[test]
    fn the_examples_are_there_where_their_programs_are() {
        let (dir, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ground = Ground::take(dir.path()).unwrap();
        let path = [programs.path().to_owned()];
        assert_eq!(ground.examples(&path).unwrap(), None);
        for program in ["example-web", "example-vault"] {
            fs::write(programs.path().join(program), "").unwrap();
        }
        let root = ground.examples(&path).unwrap().unwrap();
        assert!(root.join("web/scenario/scenario.yaml").is_file());
    }
}
