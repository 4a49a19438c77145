//! `cargo xtask mutants`: known coordination bugs, each a patch in `mutants/` that a test must detect.

mod copy;
mod patch;
mod sample;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tool, Tools, process::spawn_bound};

use self::copy::Copy;
use self::patch::{Mutant, Target};
use self::sample::Sample;
use crate::command::cargo;
use crate::console::say;
use crate::test_binary;

/// How long the tests of one mutant may run.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
#[command(
    after_help = "Each patch in mutants/ introduces a known bug and names the test that must fail because of it. The checkout itself is never \
                  changed: a copy in target/mutants is patched, built and tested. Fails if a test does not detect its mutant.\n\n\
                  With --sample, cargo-mutants makes random small changes to the copy instead, and the tests of the changed crate run. Each \
                  survivor is a missing test, or a change that nobody can observe."
)]
pub(crate) struct Mutants {
    /// Only mutants whose file name contains one of these
    names: Vec<String>,
    /// List the mutants: what each breaks, and which test must detect it
    #[arg(long)]
    list: bool,
    /// Only check that every patch still applies
    #[arg(long, conflicts_with = "list")]
    check: bool,
    /// Try about N random mutants of cargo-mutants instead
    #[arg(long, value_name = "N", conflicts_with_all = ["names", "list", "check"])]
    sample: Option<usize>,
    /// Seed of the sample; a random one is printed if it is not set
    #[arg(long, requires = "sample")]
    seed: Option<u64>,
    /// Crate to sample, such as domain; may be repeated
    #[arg(long, requires = "sample", value_name = "CRATE", default_values_t = sample::PACKAGES.map(str::to_owned))]
    package: Vec<String>,
}

impl Mutants {
    pub(crate) fn run(self) -> Result<ExitCode> {
        if let Some(size) = self.sample {
            let seed = self.seed.unwrap_or_else(|| rand::random::<u32>().into());
            return Sample { size, seed, packages: self.package }.run(&Copy::update()?);
        }
        let mut mutants = patch::all()?;
        mutants.retain(|mutant| {
            self.names.is_empty() || self.names.iter().any(|name| mutant.name.contains(name.as_str()))
        });
        if mutants.is_empty() {
            bail!("no file name in mutants/ contains any of {:?}; see cargo xtask mutants --list", self.names);
        }
        if self.list {
            for Mutant { name, breaks, target, test, .. } in &mutants {
                println!("{name}\n    {breaks}\n    detected by {} {test}", target.package);
            }
            return Ok(ExitCode::SUCCESS);
        }
        if self.check {
            mutants.iter().try_for_each(Mutant::check)?;
            say(&format!("all {} patches apply", mutants.len()));
            return Ok(ExitCode::SUCCESS);
        }
        test_all(&mutants)
    }
}

/// Checks that every patch applies to the checkout.
pub(crate) fn check() -> Result<()> {
    patch::all()?.iter().try_for_each(Mutant::check)
}

/// The result of a mutant.
enum Verdict {
    /// A test failed with this message.
    Killed(String),
    /// The test did not fail, and did not finish.
    TimedOut,
    Survived,
    DoesNotBuild,
    DoesNotApply(String),
}

/// Tests each mutant in the copy. Fails early when a test fails without any mutant.
fn test_all(mutants: &[Mutant]) -> Result<ExitCode> {
    Tools::from_env().ensure(&[Tool::Etcd], &mut say)?;
    let copy = Copy::update()?;
    say("running the tests without a mutant");
    let mut tests: BTreeMap<&Target, Vec<&str>> = BTreeMap::new();
    for Mutant { target, test, .. } in mutants {
        tests.entry(target).or_default().push(test);
    }
    for (target, mut tests) in tests {
        tests.sort_unstable();
        tests.dedup();
        let (package, names) = (&target.package, tests.join(", "));
        let Some(binary) = build(&copy, target)? else {
            bail!("the tests of {package} do not compile; the errors are above");
        };
        match run_tests(&copy, target, &binary, &tests)? {
            TestRun::Passed(passed) if passed == tests.len() => {}
            TestRun::Passed(passed) => bail!("only {passed} of these tests exist in {package}: {names}"),
            TestRun::Failed(message) => {
                bail!("one of these tests of {package} fails without a mutant: {names}: {message}")
            }
            TestRun::TimedOut => bail!("one of these tests of {package} hangs without a mutant: {names}"),
        }
    }
    let (mut killed, started) = (0, Instant::now());
    for (index, mutant) in mutants.iter().enumerate() {
        let test_started = Instant::now();
        let verdict = test_one(&copy, mutant)?;
        let duration = test_started.elapsed().as_secs_f64();
        let (word, detail) = match &verdict {
            Verdict::Killed(message) => ("killed", message.as_str()),
            Verdict::TimedOut => ("TIMED OUT", "the test did not fail, and did not finish"),
            Verdict::Survived => ("SURVIVED", "the test passes"),
            Verdict::DoesNotBuild => ("DOES NOT BUILD", "the errors are above"),
            Verdict::DoesNotApply(reason) => ("DOES NOT APPLY", reason.as_str()),
        };
        killed += usize::from(matches!(verdict, Verdict::Killed(_)));
        let number = format!("{}/{}", index + 1, mutants.len());
        println!("{number:>5} {:<44} {word} in {duration:.0} s: {}\n    {detail}", mutant.name, mutant.test);
    }
    println!("{killed} of {} mutants killed in {:.0} s", mutants.len(), started.elapsed().as_secs_f64());
    Ok(if killed == mutants.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Applies the mutant, runs its test, and reverts it.
fn test_one(copy: &Copy, mutant: &Mutant) -> Result<Verdict> {
    if let Err(reason) = copy.apply(&mutant.patch, &[]) {
        return Ok(Verdict::DoesNotApply(format!("{reason:#}").trim().to_owned()));
    }
    let verdict = match build(copy, &mutant.target)? {
        None => Verdict::DoesNotBuild,
        Some(binary) => match run_tests(copy, &mutant.target, &binary, &[&mutant.test])? {
            TestRun::Passed(_) => Verdict::Survived,
            TestRun::Failed(message) => Verdict::Killed(message),
            TestRun::TimedOut => Verdict::TimedOut,
        },
    };
    copy.apply(&mutant.patch, &["--reverse"])?;
    Ok(verdict)
}

/// Builds a test target in the copy. Prints the errors and returns `None` if it does not compile.
fn build(copy: &Copy, target: &Target) -> Result<Option<PathBuf>> {
    let mut cargo = cargo();
    cargo.current_dir(&copy.tree).env("CARGO_TARGET_DIR", &copy.target);
    test_binary::build(cargo, &target.package, &target.arguments)
}

/// The result of running some tests.
enum TestRun {
    /// This many tests ran, and all passed.
    Passed(usize),
    /// A test failed with this message.
    Failed(String),
    TimedOut,
}

fn run_tests(copy: &Copy, target: &Target, binary: &Path, tests: &[&str]) -> Result<TestRun> {
    let log = copy.tree.with_file_name("test.log");
    let stdout = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
    let stderr = stdout.try_clone().context("open the log a second time")?;
    let mut test = Command::new(binary);
    test.arg("--exact").args(tests).current_dir(copy.tree.join(test_binary::directory(&target.package)));
    test.env("RUST_BACKTRACE", "0").stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let child = spawn_bound(test).with_context(|| format!("run {}", binary.display()))?;
    let has_passed = wait(child)?;
    let output = fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
    Ok(match has_passed {
        None => TestRun::TimedOut,
        Some(true) => TestRun::Passed(
            output.lines().filter(|line| line.starts_with("test ") && line.ends_with(" ... ok")).count(),
        ),
        Some(false) => TestRun::Failed(failure_message(&output)),
    })
}

/// Waits for a test binary, at most [`TEST_TIMEOUT`], and kills it then. Returns whether it succeeded, or `None` if it was killed.
fn wait(mut child: Child) -> Result<Option<bool>> {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().context("wait for a test")? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= deadline {
            child.kill().context("kill a test")?;
            child.wait().context("wait for a test")?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The message with which a test panicked, on one line.
fn failure_message(output: &str) -> String {
    let lines = output.lines().skip_while(|line| !line.contains(" panicked at ")).skip(1);
    let words: Vec<&str> = lines.take_while(|line| !line.starts_with("note: ")).map(str::trim).take(4).collect();
    let message: String = words.join(" ").chars().take(200).collect();
    if message.is_empty() { "it failed without a message".to_owned() } else { message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_message_is_one_line() {
        let output = "\nrunning 1 test\n\nthread 'a' (1) panicked at src/a.rs:1:2:\na promise is broken\n  left: 1\nnote: more\n";
        assert_eq!(failure_message(output), "a promise is broken left: 1");
        assert_eq!(failure_message("killed"), "it failed without a message");
    }
}
