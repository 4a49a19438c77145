//! `cargo xtask clean-room`: runs the README's commands on a minimal Debian, as a newcomer would.
//!
//! The room is a directory with a minimal Debian, entered with chroot. Its processes run in mount and PID namespaces of their own: when this command
//! exits in any way, the kernel kills them, and their mounts disappear.

mod readme;
mod room;

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use gauntlet_stack::{Port, Ports, Tool, Tools, observability, ports::Reserved, process::spawn_bound, workspace_root};

use self::readme::Readme;
use self::room::{Account, Room, Running};
use crate::console::{Screen, Stop, say};
use crate::lock::try_lock;

/// Options of `unshare` that hide the room's mounts from the machine and kill its processes together with `unshare`.
const NAMESPACES: [&str; 7] =
    ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"];
/// How long until an instance answers. The README's first command compiles everything, possibly on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// How long `cargo xtask test` may take.
const TEST_TIMEOUT: Duration = Duration::from_secs(3 * 60 * 60);
/// How long a command may take to exit after Ctrl-C.
const EXIT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the processes of a command may outlive it.
const LEFTOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to retry removing the room, to which killed processes may still be writing.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);

/// A shell script that fails if the installed packages left a service enabled, or a policy that prevents services from starting.
const NO_SERVICE_IS_ENABLED: &str = "left=$(ls /usr/sbin/policy-rc.d 2>/dev/null; find /etc/systemd/system /etc/rc[2345].d -name '*prometheus*' \
                              ! -name 'K*'); echo \"$left\" >&2; [ -z \"$left\" ]";

#[derive(Debug, Args)]
#[command(
    after_help = "Creates a minimal Debian, clones HEAD into it, and runs the first command of README.md as an ordinary user, without sudo and \
                  without Go, until an instance answers. Then stops it with Ctrl-C and checks that nothing is left. After that it runs both \
                  commands as root, with Go.\n\n\
                  Needs root. Installs mmdebstrap. The room shares this machine's downloads, but not its builds. Logs are in .cache/clean-room."
)]
pub(crate) struct CleanRoom {
    /// Run only the first command, as the ordinary user, with --no-stack
    #[arg(long)]
    short: bool,
    /// The directory of the room; set when this command runs itself in new namespaces
    #[arg(long, hide = true)]
    room: Option<PathBuf>,
}

impl CleanRoom {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match &self.room {
            Some(room) => self.inside(room)?,
            None => self.outside()?,
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Runs this command again in new namespaces, and removes the room afterwards.
    fn outside(&self) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "creating a Debian and running commands in it as another user needs root; run cargo xtask clean-room as root"
            );
        }
        let probe = Command::new("unshare").args(NAMESPACES).args(["--", "true"]).output().context("run unshare")?;
        if !probe.status.success() {
            let reason = String::from_utf8_lossy(&probe.stderr).trim().to_owned();
            bail!("cannot create mount and PID namespaces ({reason}); in a container this needs CAP_SYS_ADMIN");
        }
        let dir = room_dir();
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let _lock = lock(&dir)?;
        let started = Instant::now();
        let stop = Stop::listen()?;
        Tools::from_env().ensure(&[Tool::Mmdebstrap], &mut Screen(&stop))?;
        let room = dir.join("room");
        // A killed command leaves its room.
        remove(&room, Some(&stop))?;
        let mut unshare = Command::new("unshare");
        unshare
            .args(NAMESPACES)
            .arg("--")
            .arg(std::env::current_exe().context("find this binary")?)
            .args(["clean-room", "--room"])
            .arg(&room)
            .args(self.short.then_some("--short"))
            // In a process group of its own: Ctrl-C reaches only this process, which kills the other.
            .process_group(0);
        let mut child = spawn_bound(unshare).context("run unshare")?;
        let status = loop {
            if let Some(status) = child.try_wait().context("wait for unshare")? {
                break Some(status);
            }
            if stop.is_requested() {
                child.kill().context("kill unshare")?;
                child.wait().context("wait for unshare")?;
                break None;
            }
            thread::sleep(Duration::from_millis(100));
        };
        say("removing the room");
        remove(&room, None)?;
        match status {
            Some(status) if status.success() => {
                say(&format!("the README works on a fresh machine ({} s)", started.elapsed().as_secs()));
                Ok(())
            }
            Some(_) => bail!(
                "the README does not work on a fresh machine; the error is above, and logs are in {}",
                dir.display()
            ),
            None => bail!("stopped on request"),
        }
    }

    fn inside(&self, dir: &Path) -> Result<()> {
        let readme = Readme::read()?;
        let room = Room::create(dir, &room_dir())?;
        let user = room.add_user("newcomer")?;
        room.clone_head(&user)?;
        self.run_as_newcomer(&room, &user, &readme)?;
        if !self.short {
            room.add_go()?;
            let root = room.root()?;
            room.clone_head(&root)?;
            run_as_root(&room, &root, &readme)?;
        }
        Ok(())
    }

    /// Runs the first command as a user who has Rust and nothing else.
    fn run_as_newcomer(&self, room: &Room, user: &Account, readme: &Readme) -> Result<()> {
        let (api, debug) = (Reserved::any()?, Reserved::any()?);
        let no_stack = if self.short { " --no-stack" } else { "" };
        let command = format!("{}{no_stack} -- --port {} --debug-port {}", readme.start, api.number(), debug.number());
        let running = room.start(user, &command, "newcomer")?;
        try_out(room, user, readme, api.number(), running, &|| true)
    }
}

/// Runs both commands as root, with Go.
fn run_as_root(room: &Room, root: &Account, readme: &Readme) -> Result<()> {
    let (api, debug, ports) = (Reserved::any()?, Reserved::any()?, Ports::free()?);
    let mut command = readme.start.clone();
    for port in Port::ALL {
        command += &format!(" --port {}={}", port.name(), ports.get(port));
    }
    command += &format!(" -- --port {} --debug-port {}", api.number(), debug.number());
    let running = room.start(root, &command, "root")?;
    let stack_is_up = || observability::readiness(&ports).iter().all(|(_, ready)| ready.is_met());
    try_out(room, root, readme, api.number(), running, &stack_is_up)?;
    room.output(root, NO_SERVICE_IS_ENABLED)
        .context("an installed package left a service enabled, or a policy-rc.d")?;
    let status = room.start(root, &readme.test, "tests")?.wait(TEST_TIMEOUT)?;
    if !status.success() {
        bail!("{} failed ({status})", readme.test);
    }
    Ok(())
}

/// Waits until an instance answers and `is_up`, runs the other lines of the README, and stops the command with Ctrl-C. No process may be left.
fn try_out(
    room: &Room,
    account: &Account,
    readme: &Readme,
    api: u16,
    mut running: Running,
    is_up: &dyn Fn() -> bool,
) -> Result<()> {
    let started = Instant::now();
    let create = readme.with_port(&readme.create, api);
    let page = running
        .wait_until(READY_TIMEOUT, "an instance was created", || instance_url(&room.output(account, &create).ok()?))?;
    running
        .wait_until(EXIT_TIMEOUT, "the instance answered", || room.output(account, &format!("curl -sf {page}")).ok())?;
    say(&format!("an instance answers at {page}, after {} s", started.elapsed().as_secs()));
    for line in &readme.others {
        room.output(account, &readme.with_port(line, api)).with_context(|| format!("README.md: {line}"))?;
    }
    running.wait_until(READY_TIMEOUT, "everything was up", || is_up().then_some(()))?;
    let status = running.interrupt(EXIT_TIMEOUT)?;
    if !status.success() {
        bail!("after Ctrl-C the command exited with {status} instead of 0");
    }
    let left = room.left_over(account, LEFTOVER_TIMEOUT)?;
    if !left.is_empty() {
        bail!("after Ctrl-C these processes still ran: {}", left.join(", "));
    }
    say("after Ctrl-C the command exited with 0 and left no process");
    Ok(())
}

/// The URL in the response to a create. The connection info of the example is `http://HOST:PORT`.
fn instance_url(response: &str) -> Option<String> {
    let response: serde_json::Value = serde_json::from_str(response).ok()?;
    let info = response.get("connectionInfo")?.as_str()?;
    let words = info.split_whitespace();
    words.filter(|word| word.starts_with("http://")).map(str::to_owned).next()
}

/// The directory of the room and its logs.
fn room_dir() -> PathBuf {
    workspace_root().join(".cache/clean-room")
}

/// Allows one room at a time, because a command starts by removing the room of the last.
fn lock(dir: &Path) -> Result<File> {
    try_lock(&dir.join("lock"))?.context("cargo xtask clean-room is already running in this checkout")
}

/// Removes the room, unless `stop` is requested. The room's mounts exist only in its own namespace, so this removes nothing but its files.
fn remove(room: &Path, stop: Option<&Stop>) -> Result<()> {
    let deadline = Instant::now() + REMOVE_TIMEOUT;
    while room.exists() {
        let mut rm = Command::new("rm");
        // In a process group of its own: Ctrl-C reaches only this process.
        rm.args(["-rf", "--"]).arg(room).process_group(0);
        let mut child = spawn_bound(rm).context("run rm")?;
        let removed = loop {
            if let Some(status) = child.try_wait().context("wait for rm")? {
                break status.success();
            }
            if stop.is_some_and(Stop::is_requested) {
                child.kill().context("kill rm")?;
                child.wait().context("wait for rm")?;
                bail!("stopped on request; the next cargo xtask clean-room removes the rest of {}", room.display());
            }
            thread::sleep(Duration::from_millis(50));
        };
        if !removed {
            if Instant::now() > deadline {
                bail!("cannot remove {}", room.display());
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::instance_url;

    #[test]
    fn instance_url_is_read_from_the_response() {
        let response = r#"{"challengeId":"web","sourceId":"me","connectionInfo":"http://127.0.0.1:20001"}"#;
        assert_eq!(instance_url(response).as_deref(), Some("http://127.0.0.1:20001"));
        assert_eq!(instance_url(r#"{"code":14,"message":"not yet"}"#), None);
        assert_eq!(instance_url(""), None);
    }
}
