//! Runs the tests of the workspace, each binary by itself: a test that hangs is named and killed, and a run without any test is a failure.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::{process::spawn_bound, workspace_root};
use serde_json::Value;

use crate::command::cargo;
use crate::console::say;
use crate::test_binary::list;

/// How long a binary may run without finishing a test. Waits within tests time out long before.
const STALL_TIMEOUT: Duration = Duration::from_secs(600);

/// A test binary and its tests.
#[derive(Debug)]
pub(crate) struct Binary {
    executable: PathBuf,
    /// The directory of its package, in which it runs.
    package: PathBuf,
    /// The root file of its crate, relative to the checkout.
    pub(crate) root: PathBuf,
    /// The tests that run by default, which excludes ignored ones.
    pub(crate) tests: BTreeSet<String>,
}

/// Builds and lists the tests of the workspace.
pub(crate) fn binaries() -> Result<Vec<Binary>> {
    let mut build = cargo();
    build.args(["test", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    let built = build.current_dir(workspace_root()).stderr(Stdio::inherit()).output().context("run cargo")?;
    if !built.status.success() {
        bail!("the tests do not compile; the errors are above");
    }
    let messages = String::from_utf8_lossy(&built.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut binaries: Vec<Binary> =
        messages.filter_map(|message| Binary::from_message(&message).transpose()).collect::<Result<_>>()?;
    binaries.sort_by(|a, b| a.root.cmp(&b.root));
    Ok(binaries)
}

impl Binary {
    /// The test binary that a message of cargo announces, if it announces one.
    fn from_message(message: &Value) -> Result<Option<Binary>> {
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

    /// A binary with these tests that cannot be run.
    #[cfg(test)]
    pub(crate) fn fake<'a>(root: &str, tests: impl Iterator<Item = &'a str>) -> Binary {
        let tests = tests.map(str::to_owned).collect();
        Binary { executable: PathBuf::new(), package: PathBuf::new(), root: root.into(), tests }
    }

    /// Runs the tests whose name contains the filter. Returns their number and whether all passed.
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
        Ok((count, watch(command, unfinished, STALL_TIMEOUT)?))
    }
}

/// Runs a binary with its output on the terminal, and returns whether all its tests passed.
///
/// # Errors
/// When no test finished for `stall_timeout`. The binary is killed, and the error names the tests that were running.
fn watch(mut command: Command, mut unfinished: BTreeSet<&str>, stall_timeout: Duration) -> Result<bool> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = spawn_bound(command).context("run the tests")?;
    let output = child.stdout.take().context("the output of the tests is not piped")?;
    let (lines, received) = channel();
    let reader = thread::spawn(move || {
        for line in lines_of(output) {
            // Fails once the loop below has stopped.
            let _ = lines.send(line);
        }
    });
    let mut slow = BTreeSet::new();
    loop {
        match received.recv_timeout(stall_timeout) {
            Ok(line) => {
                println!("{line}");
                match event(&line) {
                    Some((test, Event::Slow)) => drop(slow.insert(test.to_owned())),
                    Some((test, Event::Finished)) => {
                        slow.remove(test);
                        unfinished.remove(test);
                    }
                    None => {}
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill().context("kill the tests")?;
                child.wait().context("wait for the tests")?;
                // The binary prints which tests have been running for a minute. The others have probably not started.
                let running: Vec<&str> = unfinished.iter().copied().filter(|test| slow.contains(*test)).collect();
                let running = if running.is_empty() { unfinished.into_iter().collect() } else { running };
                bail!(
                    "killed, because no test finished for {} s; still running: {}",
                    stall_timeout.as_secs(),
                    running.join(", ")
                );
            }
        }
    }
    // The output is closed, so the reader has finished.
    let _ = reader.join();
    Ok(child.wait().context("wait for the tests")?.success())
}

fn lines_of(output: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(output).split(b'\n').map_while(Result::ok).map(|line| String::from_utf8_lossy(&line).into_owned())
}

enum Event {
    Finished,
    /// The test has been running for a minute.
    Slow,
}

/// The test and the event that a line of a test binary reports.
fn event(line: &str) -> Option<(&str, Event)> {
    let line = line.strip_prefix("test ")?;
    if let Some((test, _)) = line.split_once(" has been running for over ") {
        return Some((test, Event::Slow));
    }
    let (test, _) = line.split_once(" ... ")?;
    // A test that must panic has this suffix.
    Some((test.strip_suffix(" - should panic").unwrap_or(test), Event::Finished))
}

/// Runs the tests whose name contains the filter, or all. Fails if a test fails, or if there is none.
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
        Some(filter) if ran == 0 => bail!("no test name contains {filter:?}"),
        _ if ran == 0 => bail!("the workspace has no tests"),
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

    fn watch_script(script: &str, stall_timeout: Duration) -> Result<bool> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        watch(command, BTreeSet::from(["a", "b", "c"]), stall_timeout)
    }

    #[test]
    fn hanging_test_is_named() {
        let hangs = "echo 'test a ... ok'; echo 'test b has been running for over 60 seconds'; exec sleep 1000";
        let error = watch_script(hangs, Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.ends_with("still running: b"), "{error}");
        let error =
            watch_script("echo 'test a ... ok'; exec sleep 1000", Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.ends_with("still running: b, c"), "{error}");
    }

    #[test]
    fn exit_status_decides_whether_a_binary_passes() {
        assert!(watch_script("echo 'test a ... ok'", Duration::from_secs(60)).unwrap());
        assert!(!watch_script("echo 'test a ... FAILED'; exit 101", Duration::from_secs(60)).unwrap());
    }

    #[test]
    fn run_without_tests_is_a_failure() {
        assert!(run(&[], Some("word")).unwrap_err().to_string().contains("\"word\""));
        assert!(run(&[], None).is_err());
    }
}
