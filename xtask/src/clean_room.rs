//! `cargo xtask clean-room`: the commands of the README, run on a bare Debian as somebody who comes to it new runs them.
//!
//! The room is a directory with a minimal Debian. What runs there has mounts and process ids of its own: when this command ends, however it ends,
//! the kernel ends those processes and their mounts go with them.

mod readme;
mod room;

use std::fs::{self, File, OpenOptions, TryLockError};
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

/// For `unshare`: its mounts are seen nowhere else, and its processes end with it.
const NAMESPACES: [&str; 7] =
    ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"];
/// How long a command of the README may take until an instance answers: it compiles everything, on a machine that may be busy.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60 * 60);
/// How long `cargo xtask test` may take.
const TESTS_WITHIN: Duration = Duration::from_secs(3 * 60 * 60);
/// How long a command may take to end after Ctrl-C.
const ENDS_WITHIN: Duration = Duration::from_secs(60);
/// How long the processes that a command ended may take to be gone after it.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// How long what was killed may take to leave the room's directory.
const LEAVES_WITHIN: Duration = Duration::from_secs(30);

/// Fails when the packages that were installed left what starts their services, or what keeps others from starting.
const NOTHING_STARTS: &str = "left=$(ls /usr/sbin/policy-rc.d 2>/dev/null; find /etc/systemd/system /etc/rc[2345].d -name '*prometheus*' \
                              ! -name 'K*'); echo \"$left\" >&2; [ -z \"$left\" ]";

#[derive(Debug, Args)]
#[command(
    after_help = "Makes a minimal Debian, clones HEAD into it and runs there the first command of README.md as an ordinary user, without \
                  sudo and without Go, until an instance answers; Ctrl-C must leave nothing. Then, as root and with Go, both commands.\n\n\
                  Needs root, and mmdebstrap, which it installs. What this machine has downloaded is shared, what it has built is not. \
                  Logs are in .cache/clean-room."
)]
pub(crate) struct CleanRoom {
    /// Only the ordinary user, with --no-stack
    #[arg(long)]
    short: bool,
    /// The directory of the room: set where this command runs itself in namespaces of its own
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

    /// Runs this command again in namespaces of its own, and removes the room after it.
    fn outside(&self) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "only root can make a Debian and run commands in it as somebody else: run cargo xtask clean-room as root"
            );
        }
        let probe = Command::new("unshare").args(NAMESPACES).args(["--", "true"]).output().context("run unshare")?;
        if !probe.status.success() {
            let why = String::from_utf8_lossy(&probe.stderr).trim().to_owned();
            bail!("mount and process namespaces cannot be made here ({why}): a container needs CAP_SYS_ADMIN for it");
        }
        let home = home();
        fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
        let _held = hold(&home)?;
        let started = Instant::now();
        let stop = Stop::listen()?;
        Tools::from_env().ensure(&[Tool::Mmdebstrap], &mut Screen(&stop))?;
        let room = home.join("room");
        // What a command that was killed left.
        remove(&room, Some(&stop))?;
        let mut unshare = Command::new("unshare");
        unshare
            .args(NAMESPACES)
            .arg("--")
            .arg(std::env::current_exe().context("find this binary")?)
            .args(["clean-room", "--room"])
            .arg(&room)
            .args(self.short.then_some("--short"))
            // Ctrl-C is for this process, which kills that one.
            .process_group(0);
        let mut child = spawn_bound(unshare).context("run unshare")?;
        let status = loop {
            if let Some(status) = child.try_wait().context("wait for unshare")? {
                break Some(status);
            }
            if stop.asked() {
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
                say(&format!("the README holds: {} s", started.elapsed().as_secs()));
                Ok(())
            }
            Some(_) => bail!(
                "the README does not hold on a fresh machine: the reason is above, logs are in {}",
                home.display()
            ),
            None => bail!("given up on request"),
        }
    }

    fn inside(&self, dir: &Path) -> Result<()> {
        let readme = Readme::read()?;
        let room = Room::make(dir, &home())?;
        let user = room.add_user("newcomer")?;
        room.clone_head(&user)?;
        self.as_newcomer(&room, &user, &readme)?;
        if !self.short {
            room.add_go()?;
            let root = room.root()?;
            room.clone_head(&root)?;
            as_root(&room, &root, &readme)?;
        }
        Ok(())
    }

    /// The first command, by somebody who has Rust and nothing else.
    fn as_newcomer(&self, room: &Room, user: &Account, readme: &Readme) -> Result<()> {
        let (api, debug) = (Reserved::any()?, Reserved::any()?);
        let no_stack = if self.short { " --no-stack" } else { "" };
        let command = format!("{}{no_stack} -- --port {} --debug-port {}", readme.start, api.number(), debug.number());
        let running = room.start(user, &command, "newcomer")?;
        until_served(room, user, readme, api.number(), running, &|| true)
    }
}

/// Both commands, with root and Go.
fn as_root(room: &Room, root: &Account, readme: &Readme) -> Result<()> {
    let (api, debug, ports) = (Reserved::any()?, Reserved::any()?, Ports::free()?);
    let mut command = readme.start.clone();
    for port in Port::ALL {
        command += &format!(" --port {}={}", port.name(), ports.get(port));
    }
    command += &format!(" -- --port {} --debug-port {}", api.number(), debug.number());
    let running = room.start(root, &command, "root")?;
    let stack_is_up = || observability::readiness(&ports).iter().all(|(_, ready)| ready.is_met());
    until_served(room, root, readme, api.number(), running, &stack_is_up)?;
    room.output(root, NOTHING_STARTS)
        .context("services of the installed packages stay enabled, or a policy-rc.d is left")?;
    let status = room.start(root, &readme.test, "tests")?.wait(TESTS_WITHIN)?;
    if !status.success() {
        bail!("{} failed ({status})", readme.test);
    }
    Ok(())
}

/// Waits until an instance answers and `is_up`, tries the other lines of the README, then ends the command with Ctrl-C: nothing may be left.
fn until_served(
    room: &Room,
    account: &Account,
    readme: &Readme,
    api: u16,
    mut running: Running,
    is_up: &dyn Fn() -> bool,
) -> Result<()> {
    let started = Instant::now();
    let create = readme.at(&readme.create, api);
    let page =
        running.until(ANSWERS_WITHIN, "an instance is created", || created(&room.output(account, &create).ok()?))?;
    running.until(ENDS_WITHIN, "the instance answers", || room.output(account, &format!("curl -sf {page}")).ok())?;
    say(&format!("an instance answers at {page}, after {} s", started.elapsed().as_secs()));
    for line in &readme.others {
        room.output(account, &readme.at(line, api)).with_context(|| format!("README.md: {line}"))?;
    }
    running.until(ANSWERS_WITHIN, "everything is up", || is_up().then_some(()))?;
    let status = running.interrupt(ENDS_WITHIN)?;
    if !status.success() {
        bail!("Ctrl-C ended it with {status}, not with 0");
    }
    let left = room.left_over(account, GONE_WITHIN)?;
    if !left.is_empty() {
        bail!("Ctrl-C left processes: {}", left.join(", "));
    }
    say("Ctrl-C ended it with 0 and left no process");
    Ok(())
}

/// The address in the answer to a create: the connection info of the example is `http://HOST:PORT`.
fn created(answer: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_str(answer).ok()?;
    let info = answer.get("connectionInfo")?.as_str()?;
    let words = info.split_whitespace();
    words.filter(|word| word.starts_with("http://")).map(str::to_owned).next()
}

fn home() -> PathBuf {
    workspace_root().join(".cache/clean-room")
}

/// One room at a time: the next begins by removing it.
fn hold(home: &Path) -> Result<File> {
    let path = home.join("lock");
    let cannot = || format!("lock {}", path.display());
    let file = OpenOptions::new().create(true).append(true).open(&path).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("cargo xtask clean-room already runs in this checkout"),
        Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
    }
}

/// Removes the room, until asked to stop. Its mounts were never seen in this namespace, so nothing but its own files is removed. What was
/// killed just now may still be writing.
fn remove(room: &Path, stop: Option<&Stop>) -> Result<()> {
    let deadline = Instant::now() + LEAVES_WITHIN;
    while room.exists() {
        let mut rm = Command::new("rm");
        // Ctrl-C is for this process.
        rm.args(["-rf", "--"]).arg(room).process_group(0);
        let mut child = spawn_bound(rm).context("run rm")?;
        let removed = loop {
            if let Some(status) = child.try_wait().context("wait for rm")? {
                break status.success();
            }
            if stop.is_some_and(Stop::asked) {
                child.kill().context("kill rm")?;
                child.wait().context("wait for rm")?;
                bail!("given up on request: the next clean-room removes the rest of {}", room.display());
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
    use super::created;

    #[test]
    fn the_address_of_an_instance_is_read_from_the_answer() {
        let answer = r#"{"challengeId":"web","sourceId":"me","connectionInfo":"http://127.0.0.1:20001"}"#;
        assert_eq!(created(answer).as_deref(), Some("http://127.0.0.1:20001"));
        assert_eq!(created(r#"{"code":14,"message":"not yet"}"#), None);
        assert_eq!(created(""), None);
    }
}
