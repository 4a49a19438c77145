//! Installs Debian packages.

use std::path::Path;
use std::process::{Command, Stdio};

use super::command::{LongCommand, OnCancel, succeeds};
use super::{Tool, Tools};
use crate::{Error, Progress, Result};

const SCRIPT: &str = include_str!("install-packages.sh");

/// Installs packages, as root or through a sudo that needs no password. Once started, an install runs to its end.
pub(super) fn install(tools: &Tools, wanted: &[(Tool, &'static str)], progress: &mut dyn Progress) -> Result<()> {
    let mut packages: Vec<&str> = wanted.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    if let Some(obstacle) = obstacle(&packages) {
        let (tool, variable) = wanted.first().map_or(("a package", ""), |(tool, _)| (tool.binary(), tool.variable()));
        return Err(Error::Missing { tool, hint: format!("{obstacle}; or name a binary in {variable}") });
    }
    let shell = if rustix::process::geteuid().is_root() { &["sh"][..] } else { &["sudo", "-n", "sh"] };
    let what = format!("installing {}", packages.join(" "));
    run(script(shell, "", &packages), &what, "under a minute", &tools.cache.join("apt.log"), progress)
}

/// Runs an install to its end, even if the caller cancels it: an interrupted dpkg leaves packages half configured.
fn run(command: Command, what: &str, usual: &str, log: &Path, progress: &mut dyn Progress) -> Result<()> {
    LongCommand { what, usual, log, on_cancel: OnCancel::Wait }.run(command, progress)
}

/// Why packages can't be installed here, with the remedy; `None` if they can.
pub(super) fn obstacle(packages: &[&str]) -> Option<String> {
    let packages = packages.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        return Some(format!("this system has no apt-get: install {packages} with its own package manager"));
    }
    if rustix::process::geteuid().is_root() || succeeds(Command::new("sudo").args(["-n", "true"])) {
        return None;
    }
    // A plain `apt-get install` would start the services, on the ports of the stack.
    Some(format!("as root: sh crates/stack/src/tools/install-packages.sh '' {packages}"))
}

/// The install script, run by `shell`, which may start with sudo. `root` is the root directory to install into; empty means `/`.
fn script(shell: &[&str], root: &str, packages: &[&str]) -> Command {
    let (program, arguments) = shell.split_first().unwrap_or((&"sh", &[]));
    let mut command = Command::new(program);
    command.args(arguments).args(["-c", SCRIPT, "gauntlet-install-packages", root]).args(packages);
    command.stdin(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::PathBuf;

    use gauntlet_testing::eventually_blocking;

    use super::*;

    /// A root directory with a fake apt-get: it waits for the file `go`, then enables the services of a package and of a dependency.
    struct System(PathBuf);

    const APT_GET: &str = r#"#!/bin/sh
case "$*" in *install*) ;; *) exit 0 ;; esac
"$ROOT/usr/sbin/policy-rc.d" prometheus start
echo $? >"$ROOT/policy"
echo >"$ROOT/begun"
tries=0
while [ ! -e "$ROOT/go" ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1)); done
for unit in prometheus prometheus-node-exporter; do
    ln -s "/lib/systemd/system/$unit.service" "$ROOT/etc/systemd/system/multi-user.target.wants/$unit.service"
    ln -s "../init.d/$unit" "$ROOT/etc/rc2.d/S01$unit"
done
echo >"$ROOT/ended"
[ ! -e "$ROOT/fail" ]
"#;

    impl System {
        fn new(root: &Path) -> System {
            for dir in ["bin", "etc/systemd/system/multi-user.target.wants", "etc/rc2.d", "usr/sbin"] {
                fs::create_dir_all(root.join(dir)).unwrap();
            }
            let apt = root.join("bin/apt-get");
            fs::write(&apt, APT_GET).unwrap();
            fs::set_permissions(&apt, fs::Permissions::from_mode(0o755)).unwrap();
            symlink(
                "/lib/systemd/system/ssh.service",
                root.join("etc/systemd/system/multi-user.target.wants/ssh.service"),
            )
            .unwrap();
            symlink("../init.d/ssh", root.join("etc/rc2.d/S01ssh")).unwrap();
            System(root.to_path_buf())
        }

        fn install(&self, progress: &mut dyn Progress) -> Result<()> {
            let mut command = script(&["sh"], self.0.to_str().unwrap(), &["prometheus"]);
            command.env("ROOT", &self.0);
            command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.0.join("bin").display()));
            run(command, "installing prometheus", "a moment", &self.0.join("log"), progress)
        }

        fn has(&self, file: &str) -> bool {
            self.0.join(file).exists()
        }

        fn wait_for(&self, file: &str) {
            self.wait_until(file, true);
        }

        fn wait_until(&self, file: &str, there: bool) {
            eventually_blocking(&format!("{file} exists: {there}"), || self.has(file) == there);
        }

        fn list(&self, dir: &str) -> Vec<String> {
            let entries = fs::read_dir(self.0.join(dir)).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        /// Only the services from before the install are started at boot, and the policy is removed.
        fn assert_clean(&self) {
            assert_eq!(self.list("etc/systemd/system/multi-user.target.wants"), ["ssh.service"]);
            assert_eq!(self.list("etc/rc2.d"), ["K01prometheus", "K01prometheus-node-exporter", "S01ssh"]);
            assert_eq!(self.list("usr/sbin"), Vec::<String>::new());
        }
    }

    #[test]
    fn install_starts_and_enables_no_service() {
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        fs::write(dir.path().join("go"), "").unwrap();
        system.install(&mut |_: &str| {}).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("policy")).unwrap(), "101\n");
        system.assert_clean();
    }

    #[test]
    fn failed_install_enables_no_service() {
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        fs::write(dir.path().join("go"), "").unwrap();
        fs::write(dir.path().join("fail"), "").unwrap();
        assert!(matches!(system.install(&mut |_: &str| {}), Err(Error::Build { .. })));
        system.assert_clean();
    }

    #[test]
    fn existing_policy_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        let policy = dir.path().join("usr/sbin/policy-rc.d");
        fs::write(&policy, "#!/bin/sh\nexit 104\n").unwrap();
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("go"), "").unwrap();
        system.install(&mut |_: &str| {}).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("policy")).unwrap(), "104\n");
        assert_eq!(fs::read_to_string(&policy).unwrap(), "#!/bin/sh\nexit 104\n");
    }

    #[test]
    fn cancelled_install_runs_to_its_end() {
        struct Cancelling<'a>(&'a System, Vec<String>);
        impl Progress for Cancelling<'_> {
            fn report(&mut self, line: &str) {
                self.1.push(line.to_owned());
                // Only once the caller knows that it has to wait.
                if line.contains("must not be interrupted") {
                    fs::write(self.0.0.join("go"), "").unwrap();
                }
            }
            fn cancelled(&self) -> bool {
                self.0.has("begun")
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        let mut progress = Cancelling(&system, Vec::new());
        assert!(matches!(system.install(&mut progress), Err(Error::Cancelled)));
        assert!(system.has("ended"), "{:?}", progress.1);
        system.assert_clean();
    }

    /// Runs the test binary again as the installer, and kills it.
    #[test]
    fn install_continues_after_its_parent_is_killed() {
        const ROLE: &str = "GAUNTLET_STACK_TEST_INSTALLER";
        if let Some(dir) = std::env::var_os(ROLE) {
            let _ = System(PathBuf::from(dir)).install(&mut |_: &str| {});
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        let mut installer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tools::apt::tests::install_continues_after_its_parent_is_killed"])
            .env(ROLE, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        system.wait_for("begun");
        installer.kill().unwrap();
        installer.wait().unwrap();
        assert!(!system.has("ended"));
        fs::write(dir.path().join("go"), "").unwrap();
        system.wait_for("ended");
        system.wait_until("usr/sbin/policy-rc.d", false);
        system.assert_clean();
    }

    #[test]
    fn policy_left_by_a_power_failure_permits_and_removes_itself() {
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        // A power failure leaves the policy without a process that holds its lock.
        let policy = dir.path().join("usr/sbin/policy-rc.d");
        let copy = format!("cp {0} {0}.kept", policy.display());
        fs::write(dir.path().join("bin/apt-get"), format!("#!/bin/sh\n{copy}\n")).unwrap();
        system.install(&mut |_: &str| {}).unwrap();
        fs::rename(policy.with_extension("d.kept"), &policy).unwrap();
        assert!(Command::new(&policy).args(["ssh", "start"]).status().unwrap().success());
        assert_eq!(system.list("usr/sbin"), Vec::<String>::new());
    }
}
