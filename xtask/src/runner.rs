//! Runs the tests of the workspace: each binary by itself, so that a test that hangs is named and ended, and that nothing ran is seen.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::{process::spawn_bound, workspace_root};
use serde_json::Value;

use crate::console::say;
use crate::test::cargo;

/// For so long a binary may run without one of its tests ending. Waits within tests give up long before.
const STALLED: Duration = Duration::from_secs(600);

/// A binary of tests, and the tests in it.
#[derive(Debug)]
pub(crate) struct Binary {
    executable: PathBuf,
    /// Where its package is: there it runs.
    package: PathBuf,
    /// The file of its crate's root, relative to the checkout.
    pub(crate) root: PathBuf,
    /// The tests that run unless they are asked not to: none that is ignored.
    pub(crate) tests: BTreeSet<String>,
}

/// Builds the tests of the workspace, and lists them.
pub(crate) fn binaries() -> Result<Vec<Binary>> {
    let mut build = cargo();
    build.args(["test", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    let built = build.current_dir(workspace_root()).stderr(Stdio::inherit()).output().context("run cargo")?;
    if !built.status.success() {
        bail!("the tests do not build: the errors are above");
    }
    let messages = String::from_utf8_lossy(&built.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut binaries: Vec<Binary> =
        messages.filter_map(|message| Binary::of(&message).transpose()).collect::<Result<_>>()?;
    binaries.sort_by(|a, b| a.root.cmp(&b.root));
    Ok(binaries)
}

impl Binary {
    /// The one that a message of cargo's is about, if it is about one.
    fn of(message: &Value) -> Result<Option<Binary>> {
        let text = |at: &str| message.pointer(at).and_then(Value::as_str).map(PathBuf::from);
        let (Some(executable), Some(manifest), Some(root)) =
            (text("/executable"), text("/manifest_path"), text("/target/src_path"))
        else {
            return Ok(None);
        };
        if message.pointer("/profile/test").and_then(Value::as_bool) != Some(true) {
            return Ok(None);
        }
        let package = manifest.parent().unwrap_or(&manifest).to_owned();
        let root = root.strip_prefix(workspace_root()).unwrap_or(&root).to_owned();
        let mut tests = list(&executable, &[])?;
        for ignored in list(&executable, &["--ignored"])? {
            tests.remove(&ignored);
        }
        Ok(Some(Binary { executable, package, root, tests }))
    }

    /// One that has these tests and cannot be run.
    #[cfg(test)]
    pub(crate) fn listed<'a>(root: &str, tests: impl Iterator<Item = &'a str>) -> Binary {
        let nowhere = PathBuf::new();
        let tests = tests.map(str::to_owned).collect();
        Binary { executable: nowhere.clone(), package: nowhere, root: root.into(), tests }
    }

    /// Runs those of its tests whose name contains the filter, and answers how many there are and whether all passed.
    fn run(&self, filter: Option<&str>) -> Result<(usize, bool)> {
        let mut unfinished: BTreeSet<&str> = self.tests.iter().map(String::as_str).collect();
        unfinished.retain(|test| filter.is_none_or(|filter| test.contains(filter)));
        let count = unfinished.len();
        if count == 0 {
            return Ok((0, true));
        }
        say(&self.root.display().to_string());
        let mut command = Command::new(&self.executable);
        command.args(filter).current_dir(&self.package).env("CARGO_MANIFEST_DIR", &self.package);
        Ok((count, watch(command, unfinished, STALLED)?))
    }
}

/// Runs a binary, its output on the screen, and answers whether all its tests passed. It is ended when none of them ends for too long.
fn watch(mut command: Command, mut unfinished: BTreeSet<&str>, stalled: Duration) -> Result<bool> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = spawn_bound(command).context("run the tests")?;
    let output = child.stdout.take().context("its output is not piped")?;
    let (lines, said) = channel();
    let reader = thread::spawn(move || {
        for line in lines_of(output) {
            // An error means that nobody reads on.
            let _ = lines.send(line);
        }
    });
    let mut slow = BTreeSet::new();
    loop {
        match said.recv_timeout(stalled) {
            Ok(line) => {
                println!("{line}");
                match outcome(&line) {
                    Some((test, Said::Slow)) => drop(slow.insert(test.to_owned())),
                    Some((test, Said::Ended)) => {
                        slow.remove(test);
                        unfinished.remove(test);
                    }
                    None => {}
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill().context("end the tests")?;
                child.wait().context("wait for the tests")?;
                // What has been running for a minute is said by the binary; the others have not begun.
                let running: Vec<&str> = unfinished.iter().copied().filter(|test| slow.contains(*test)).collect();
                let running = if running.is_empty() { unfinished.into_iter().collect() } else { running };
                bail!("no test has ended for {} s: ended; still running: {}", stalled.as_secs(), running.join(", "));
            }
        }
    }
    // It has nothing left to read.
    let _ = reader.join();
    Ok(child.wait().context("wait for the tests")?.success())
}

fn lines_of(output: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(output).split(b'\n').map_while(Result::ok).map(|line| String::from_utf8_lossy(&line).into_owned())
}

enum Said {
    Ended,
    Slow,
}

/// What a line of a test binary's says of a test.
fn outcome(line: &str) -> Option<(&str, Said)> {
    let line = line.strip_prefix("test ")?;
    if let Some((test, _)) = line.split_once(" has been running for over ") {
        return Some((test, Said::Slow));
    }
    let (test, _) = line.split_once(" ... ")?;
    // Of one that must panic.
    Some((test.strip_suffix(" - should panic").unwrap_or(test), Said::Ended))
}

/// The tests that a binary would run with these arguments.
pub(crate) fn list(executable: &Path, arguments: &[&str]) -> Result<BTreeSet<String>> {
    let doing = || format!("list the tests of {}", executable.display());
    let listed = Command::new(executable).args(arguments).arg("--list").stdin(Stdio::null()).output();
    let listed = listed.with_context(doing)?;
    if !listed.status.success() {
        bail!("{}: {}", doing(), String::from_utf8_lossy(&listed.stderr));
    }
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Fails unless the binary has a test of exactly that name: without it, to run it is to run nothing and to succeed.
pub(crate) fn require(executable: &Path, test: &str) -> Result<()> {
    if list(executable, &["--exact", test])?.is_empty() {
        bail!("{} has no test {test}", executable.display());
    }
    Ok(())
}

/// Runs the tests whose name contains the filter, all of them without one; fails if one fails, or if there is none.
pub(crate) fn run(binaries: &[Binary], filter: Option<&str>) -> Result<()> {
    let (mut ran, mut failed) = (0, Vec::new());
    for binary in binaries {
        match binary.run(filter) {
            Ok((count, passed)) => {
                ran += count;
                if !passed {
                    failed.push(binary.root.display().to_string());
                }
            }
            Err(error) => {
                say(&format!("{}: {error:#}", binary.root.display()));
                failed.push(format!("{} ({error:#})", binary.root.display()));
            }
        }
    }
    if !failed.is_empty() {
        bail!("tests failed: {}", failed.join(", "));
    }
    match filter {
        Some(filter) if ran == 0 => bail!("no test has {filter:?} in its name"),
        _ if ran == 0 => bail!("there are no tests"),
        _ => {
            say(&format!("{ran} tests passed"));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn script(script: &str, stalled: Duration) -> Result<bool> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        watch(command, BTreeSet::from(["a", "b", "c"]), stalled)
    }

    #[test]
    fn a_test_that_hangs_is_named() {
        let hangs = "echo 'test a ... ok'; echo 'test b has been running for over 60 seconds'; exec sleep 1000";
        let error = script(hangs, Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.ends_with("still running: b"), "{error}");
        let error =
            script("echo 'test a ... ok'; exec sleep 1000", Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.ends_with("still running: b, c"), "{error}");
    }

    #[test]
    fn a_binary_passes_or_fails() {
        assert!(script("echo 'test a ... ok'", Duration::from_secs(60)).unwrap());
        assert!(!script("echo 'test a ... FAILED'; exit 101", Duration::from_secs(60)).unwrap());
    }

    #[test]
    fn that_nothing_ran_is_a_failure() {
        assert!(run(&[], Some("word")).unwrap_err().to_string().contains("\"word\""));
        assert!(run(&[], None).is_err());
    }

    #[test]
    fn the_tests_of_this_binary_are_listed() {
        let this = std::env::current_exe().unwrap();
        const THIS: &str = "runner::tests::the_tests_of_this_binary_are_listed";
        let (listed, this) = (list(&this, &[]).unwrap(), this);
        assert!(listed.contains(THIS), "{listed:?}");
        require(&this, THIS).unwrap();
        assert!(require(&this, "runner::tests").is_err(), "only a part of a name");
    }
}
