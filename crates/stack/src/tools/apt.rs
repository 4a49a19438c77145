//! Debian packages.

use std::path::Path;
use std::process::{Command, Stdio};

use super::command::{run_logged, succeeds};
use super::{Tool, Tools};
use crate::{Error, Progress, Result};

const SCRIPT: &str = include_str!("install-packages.sh");

/// Installs packages, as root or through a sudo that asks for no password.
pub(super) fn install(tools: &Tools, wanted: &[(Tool, &'static str)], progress: &mut dyn Progress) -> Result<()> {
    let mut packages: Vec<&str> = wanted.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    let list = packages.join(" ");
    let cannot = |why: &str| {
        let tool = wanted.first().map_or("a package", |(tool, _)| tool.binary());
        Error::Missing {
            tool,
            hint: format!("{why}; run `apt-get install {list}` as root, or put the binaries on PATH"),
        }
    };
    if !Path::new("/usr/bin/apt-get").exists() {
        return Err(cannot("there is no apt-get here"));
    }
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("sh")
    } else if succeeds(Command::new("sudo").args(["-n", "true"])) {
        let mut command = Command::new("sudo");
        command.args(["-n", "sh"]);
        command
    } else {
        return Err(cannot("installing needs root, or sudo without a password"));
    };
    command.args(["-c", SCRIPT, "install-packages"]).args(&packages).stdin(Stdio::null());
    run_logged(command, &format!("installing {list}"), "under a minute", &tools.cache.join("apt.log"), progress)
}
