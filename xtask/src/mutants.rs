//! `cargo xtask mutants`: the known ways to get coordination wrong, each a patch in `mutants/`, and each to be noticed by a test.
//!
//! The checkout is copied, so that nothing here ever touches it; the copy and what is built of it stay in `target/mutants`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Tool, Tools, process::spawn_bound, workspace_root};

use crate::binary;
use crate::console::say;
use crate::sample::{self, Sample};
use crate::test::{cargo, run};

/// A test that takes longer has been stopped by its mutant, and has not noticed.
const LONGEST: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(crate) struct Mutants {
    /// Only those whose file name contains one of these
    names: Vec<String>,
    /// Say what each breaks and which test is to notice it
    #[arg(long)]
    list: bool,
    /// Only see whether each still applies to the checkout
    #[arg(long, conflicts_with = "list")]
    check: bool,
    /// Instead of these, try so many random changes of cargo-mutants', each with the tests of its crate
    #[arg(long, value_name = "N", conflicts_with_all = ["names", "list", "check"])]
    sample: Option<usize>,
    /// What the choice of the sample follows from; printed if it is not set
    #[arg(long, requires = "sample")]
    seed: Option<u64>,
    /// The crates of the sample, such as domain; may be repeated
    #[arg(long, requires = "sample", value_name = "CRATE", default_values_t = sample::PACKAGES.map(str::to_owned))]
    package: Vec<String>,
}

/// A patch, and what its first lines say of it.
#[derive(Debug, PartialEq, Eq)]
struct Mutant {
    name: String,
    patch: PathBuf,
    breaks: String,
    killer: Killer,
}

/// The test that is to notice it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Killer {
    package: String,
    /// `--lib`, or `--test` and a name.
    target: Vec<String>,
    test: String,
}

enum Outcome {
    /// By a test that says so in these words.
    Killed(String),
    /// The test noticed nothing, and never ended.
    StoodStill,
    Survived,
    DoesNotBuild,
    DoesNotApply(String),
}

impl Mutants {
    pub(crate) fn run(self) -> Result<ExitCode> {
        if let Some(size) = self.sample {
            let seed = self.seed.unwrap_or_else(|| rand::random::<u32>().into());
            let copy = Copy::make()?;
            return Sample { size, seed, packages: self.package }.run(&copy.tree, &copy.target);
        }
        let mut mutants = all()?;
        mutants.retain(|mutant| {
            self.names.is_empty() || self.names.iter().any(|name| mutant.name.contains(name.as_str()))
        });
        if mutants.is_empty() {
            bail!("no file in mutants/ has {:?} in its name: cargo xtask mutants --list", self.names);
        }
        if self.list {
            for Mutant { name, breaks, killer, .. } in &mutants {
                println!("{name}\n    {breaks}\n    killed by {} {}", killer.package, killer.test);
            }
            return Ok(ExitCode::SUCCESS);
        }
        if self.check {
            mutants.iter().try_for_each(Mutant::check)?;
            say(&format!("all {} apply", mutants.len()));
            return Ok(ExitCode::SUCCESS);
        }
        hunt(&mutants)
    }
}

/// Whether every patch applies to the checkout.
pub(crate) fn check() -> Result<()> {
    all()?.iter().try_for_each(Mutant::check)
}

/// Every mutant, in order of its number.
fn all() -> Result<Vec<Mutant>> {
    let dir = workspace_root().join("mutants");
    let mut patches = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            patches.push(path);
        }
    }
    patches.sort();
    patches.into_iter().map(Mutant::read).collect()
}

impl Mutant {
    fn read(patch: PathBuf) -> Result<Mutant> {
        let text = fs::read_to_string(&patch).with_context(|| format!("read {}", patch.display()))?;
        let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (breaks, killer) = header(&text).with_context(|| {
            format!(
                "{}: begin it with `Breaks: TEXT` and `Killed by: PACKAGE [--lib|--test NAME] TEST`",
                patch.display()
            )
        })?;
        Ok(Mutant { name, patch, breaks, killer })
    }

    fn check(&self) -> Result<()> {
        let apply = run(Command::new("git").args(["apply", "--check"]).arg(&self.patch));
        apply.with_context(|| format!("{} no longer applies: make its change anew", self.patch.display()))
    }
}

/// What the text before a patch says.
fn header(text: &str) -> Option<(String, Killer)> {
    let (before, _) = text.split_once("\n--- ")?;
    let (breaks, killer) = before.strip_prefix("Breaks: ")?.split_once("\nKilled by: ")?;
    let mut words = killer.split_whitespace().map(str::to_owned);
    let (package, test) = (words.next()?, words.next_back()?);
    Some((breaks.replace('\n', " "), Killer { package, target: words.collect(), test }))
}

/// Applies each to the copy, one after the other, and runs its test.
fn hunt(mutants: &[Mutant]) -> Result<ExitCode> {
    Tools::from_env().ensure(&[Tool::Etcd], &mut say)?;
    let copy = Copy::make()?;
    say("the tests as they are");
    let mut killers: BTreeMap<(&str, &[String]), Vec<&str>> = BTreeMap::new();
    for Mutant { killer, .. } in mutants {
        killers.entry((&killer.package, &killer.target)).or_default().push(&killer.test);
    }
    for ((package, target), mut tests) in killers {
        tests.sort_unstable();
        tests.dedup();
        let Some(binary) = copy.build(package, target)? else {
            bail!("the tests of {package} do not build: the errors are above");
        };
        match copy.test(package, &binary, &tests)? {
            Tested::Passed(passed) if passed == tests.len() => {}
            Tested::Passed(passed) => bail!("of these tests of {package} only {passed} exist: {}", tests.join(", ")),
            Tested::Failed(why) => {
                bail!("without a mutant one of these tests of {package} fails: {}: {why}", tests.join(", "))
            }
            Tested::StoodStill => {
                bail!("without a mutant one of these tests of {package} stands still: {}", tests.join(", "))
            }
        }
    }
    let (mut killed, began) = (0, Instant::now());
    for mutant in mutants {
        let started = Instant::now();
        let outcome = copy.try_out(mutant)?;
        let took = started.elapsed().as_secs_f64();
        let (verdict, words) = match &outcome {
            Outcome::Killed(words) => ("killed", words.as_str()),
            Outcome::StoodStill => ("STOOD STILL", "the test noticed nothing, and never ended"),
            Outcome::Survived => ("SURVIVED", "the test passes"),
            Outcome::DoesNotBuild => ("DOES NOT BUILD", "the errors are above"),
            Outcome::DoesNotApply(why) => ("DOES NOT APPLY", why.as_str()),
        };
        killed += usize::from(matches!(outcome, Outcome::Killed(_)));
        println!("{:<44} {verdict} in {took:.0} s: {}\n    {words}", mutant.name, mutant.killer.test);
    }
    println!("{killed} of {} killed in {:.0} s", mutants.len(), began.elapsed().as_secs_f64());
    Ok(if killed == mutants.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A copy of the checkout, as it is now.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// Writes what differs from an earlier copy and no more: so that only that is built again.
    fn make() -> Result<Copy> {
        let root = workspace_root();
        let dir = root.join("target/mutants");
        let copy = Copy { tree: dir.join("tree"), target: dir.join("target") };
        fs::create_dir_all(&copy.tree).with_context(|| format!("create {}", copy.tree.display()))?;
        let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listed = Command::new("git").args(list).current_dir(&root).output().context("run git ls-files")?;
        if !listed.status.success() {
            bail!("git ls-files failed: {}", String::from_utf8_lossy(&listed.stderr));
        }
        let mut paths = Vec::new();
        for path in String::from_utf8(listed.stdout).context("a file's name is no UTF-8")?.split_terminator('\0') {
            let (from, to) = (root.join(path), copy.tree.join(path));
            // One that is removed and not committed is listed still.
            let Ok(now) = fs::read(&from) else { continue };
            if fs::read(&to).ok().as_ref() != Some(&now) {
                let doing = || format!("write {}", to.display());
                fs::create_dir_all(to.parent().unwrap_or(&to)).with_context(doing)?;
                fs::write(&to, now).with_context(doing)?;
            }
            paths.push(to);
        }
        paths.sort();
        prune(&copy.tree, &paths).with_context(|| format!("tidy {}", copy.tree.display()))?;
        Ok(copy)
    }

    /// Applies it, runs its test, and takes it back.
    fn try_out(&self, mutant: &Mutant) -> Result<Outcome> {
        if let Err(why) = self.patch(mutant, &[]) {
            return Ok(Outcome::DoesNotApply(format!("{why:#}").trim().to_owned()));
        }
        let Killer { package, target, test } = &mutant.killer;
        let outcome = match self.build(package, target)? {
            None => Outcome::DoesNotBuild,
            Some(binary) => match self.test(package, &binary, &[test])? {
                Tested::Passed(_) => Outcome::Survived,
                Tested::Failed(words) => Outcome::Killed(words),
                Tested::StoodStill => Outcome::StoodStill,
            },
        };
        self.patch(mutant, &["--reverse"])?;
        Ok(outcome)
    }

    fn patch(&self, mutant: &Mutant, how: &[&str]) -> Result<()> {
        let mut apply = Command::new("git");
        // It lies in a repository whose paths are not its own.
        apply.arg("apply").args(how).arg(&mutant.patch).current_dir(&self.tree);
        let applied = apply.env("GIT_CEILING_DIRECTORIES", self.parent()).output().context("run git apply")?;
        if !applied.status.success() {
            bail!("{} does not apply: {}", mutant.patch.display(), String::from_utf8_lossy(&applied.stderr));
        }
        Ok(())
    }

    fn parent(&self) -> &Path {
        self.tree.parent().unwrap_or(&self.tree)
    }

    /// Builds the tests of a package and answers their binary; `None`, its errors on the screen, if they do not build.
    fn build(&self, package: &str, target: &[String]) -> Result<Option<PathBuf>> {
        let mut build = cargo();
        build.current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.target);
        binary::of_tests(build, package, target)
    }

    fn test(&self, package: &str, binary: &Path, tests: &[&str]) -> Result<Tested> {
        let log = self.parent().join("test.log");
        let output = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let errors = output.try_clone().context("open the log a second time")?;
        let mut test = Command::new(binary);
        let folder = package.strip_prefix("gauntlet-").unwrap_or(package);
        test.arg("--exact").args(tests).current_dir(self.tree.join("crates").join(folder)).env("RUST_BACKTRACE", "0");
        let child = spawn_bound_to_log(test, output, errors).with_context(|| format!("run {}", binary.display()))?;
        let ended = ended(child)?;
        let said = fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
        Ok(match ended {
            None => Tested::StoodStill,
            Some(true) => Tested::Passed(
                said.lines().filter(|line| line.starts_with("test ") && line.ends_with(" ... ok")).count(),
            ),
            Some(false) => Tested::Failed(complaint(&said)),
        })
    }
}

/// What came of some tests.
enum Tested {
    /// So many of them.
    Passed(usize),
    /// One has, in these words.
    Failed(String),
    StoodStill,
}

/// The words with which a test failed: what follows the line that says where, on one line.
fn complaint(said: &str) -> String {
    let lines = said.lines().skip_while(|line| !line.contains(" panicked at ")).skip(1);
    let words: Vec<&str> = lines.take_while(|line| !line.starts_with("note: ")).map(str::trim).take(4).collect();
    let words: String = words.join(" ").chars().take(200).collect();
    if words.is_empty() { "it ended without a word".to_owned() } else { words }
}

fn spawn_bound_to_log(mut command: Command, output: fs::File, errors: fs::File) -> std::io::Result<Child> {
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    spawn_bound(command)
}

/// Waits for a test, as long as one may take: whether it ended well, or `None` if it did not end.
fn ended(mut child: Child) -> Result<Option<bool>> {
    let ends = Instant::now() + LONGEST;
    loop {
        if let Some(status) = child.try_wait().context("wait for a test")? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= ends {
            child.kill().context("end a test")?;
            child.wait().context("wait for a test")?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Removes every file but these, which are in order.
fn prune(dir: &Path, keep: &[PathBuf]) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            prune(&path, keep)?;
        } else if keep.binary_search(&path).is_err() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_patch_says_what_it_breaks_and_who_notices() {
        let text = "Breaks: One thing\nand another.\nKilled by: some-crate --test faults a::b\n\n--- a/x\n+++ b/x\n";
        let (breaks, killer) = header(text).unwrap();
        assert_eq!(breaks, "One thing and another.");
        assert_eq!((killer.package.as_str(), killer.test.as_str()), ("some-crate", "a::b"));
        assert_eq!(killer.target, ["--test", "faults"]);
        assert_eq!(header("Breaks: all\n--- a/x\n+++ b/x\n"), None);
    }

    #[test]
    fn a_failed_test_says_why_in_one_line() {
        let said = "\nrunning 1 test\n\nthread 'a' (1) panicked at src/a.rs:1:2:\na promise is broken\n  left: 1\nnote: more\n";
        assert_eq!(complaint(said), "a promise is broken left: 1");
        assert_eq!(complaint("killed"), "it ended without a word");
    }

    #[test]
    fn every_mutant_can_be_read() {
        let mutants = all().unwrap();
        assert!(mutants.len() >= 12 && mutants.is_sorted_by_key(|mutant| mutant.name.clone()));
    }
}
