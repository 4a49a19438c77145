//! A minimal Debian in a directory, its accounts, and the commands that run in it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use gauntlet_stack::{Tool, Tools, workspace_root};
use rustix::process::{Pid, Signal, kill_process_group};

use super::readme::Readme;
use crate::command::command_line;
use crate::console::say;

const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";
const RUST: &str = "opt/rust";
const GO: &str = "usr/local/go";
/// How often to report a command that is still running.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);

/// The settings that are needed to reach registries. Credentials are not among them.
const NETWORK_SETTINGS: [&str; 17] = [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "CARGO_HTTP_PROXY",
    "CARGO_HTTP_CHECK_REVOKE",
    "CARGO_HTTP_MULTIPLEXING",
    "CARGO_HTTP_TIMEOUT",
    "CARGO_NET_RETRY",
    "CARGO_NET_GIT_FETCH_WITH_CLI",
    "CARGO_REGISTRIES_CRATES_IO_PROTOCOL",
    "CARGO_REGISTRIES_CRATES_IO_INDEX",
    "CARGO_SOURCE_CRATES_IO_REPLACE_WITH",
];
const GO_SETTINGS: [&str; 6] = ["GOPROXY", "GOSUMDB", "GONOSUMDB", "GONOPROXY", "GOFLAGS", "GOTOOLCHAIN"];

/// A user of the room.
#[derive(Debug)]
pub(super) struct Account {
    name: &'static str,
    uid: u32,
    /// Relative to the room.
    home: PathBuf,
}

#[derive(Debug)]
pub(super) struct Room {
    dir: PathBuf,
    logs: PathBuf,
}

impl Room {
    /// Creates a room with the packages that the README lists, this machine's Rust, and a protoc on PATH that lacks include files, as on some
    /// newcomers' machines.
    pub(super) fn create(dir: &Path, logs: &Path) -> Result<Room> {
        let room = Room { dir: dir.to_path_buf(), logs: logs.to_path_buf() };
        let started = Instant::now();
        room.bootstrap()?;
        say(&format!("created a minimal Debian ({} s)", started.elapsed().as_secs()));
        room.mount(&["-t", "proc", "proc"], "proc")?;
        room.mount(&["--rbind", "/dev"], "dev")?;
        room.mount(&["--rbind", "/sys"], "sys")?;
        for file in ["/etc/resolv.conf", "/etc/hosts"] {
            fs::copy(file, room.path(file)).with_context(|| format!("copy {file}"))?;
        }
        let certificates =
            std::env::var_os("SSL_CERT_FILE").map_or_else(|| Path::new("/").join(CERTIFICATES), PathBuf::from);
        fs::copy(&certificates, room.path(CERTIFICATES)).with_context(|| format!("copy {}", certificates.display()))?;
        // The toolchain that compiled this command, with or without rustup.
        let rust = output_of(Command::new("rustc").args(["--print", "sysroot"]))?;
        room.mount_read_only(Path::new(&rust), RUST)?;
        let protoc = room.path("usr/local/bin/protoc");
        fs::write(&protoc, "#!/bin/sh\necho 'google/protobuf/empty.proto: File not found.' >&2\nexit 1\n")?;
        fs::set_permissions(&protoc, fs::Permissions::from_mode(0o755))?;
        Ok(room)
    }

    fn bootstrap(&self) -> Result<()> {
        let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
        let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        let suite = suite
            .filter(|_| release.contains("\nID=debian\n"))
            .context("this machine does not run Debian (/etc/os-release)")?;
        let options = self.logs.join("apt.conf");
        let acquire = output_of(Command::new("apt-config").args(["dump", "Acquire"]))?;
        fs::write(&options, acquire).with_context(|| format!("write {}", options.display()))?;
        let mut mmdebstrap = Command::new(Tools::from_env().require(Tool::Mmdebstrap)?);
        mmdebstrap
            .args(["--mode=root", "--variant=minbase"])
            .arg(format!("--include={}", Readme::read()?.packages.join(",")))
            .arg(format!("--aptopt={}", options.display()))
            .arg(suite)
            .arg(&self.dir)
            .args(sources(suite)?);
        let mut running = Running::spawn(mmdebstrap, "debian", &self.logs)?;
        let status = running.wait(Duration::from_secs(15 * 60))?;
        if !status.success() {
            return Err(running.failure(&format!("mmdebstrap failed ({status})")));
        }
        Ok(())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.join(path.trim_start_matches('/'))
    }

    fn mount(&self, arguments: &[&str], at: &str) -> Result<()> {
        let at = self.path(at);
        fs::create_dir_all(&at).with_context(|| format!("create {}", at.display()))?;
        succeed(Command::new("mount").args(arguments).arg(at))
    }

    fn mount_read_only(&self, from: &Path, at: &str) -> Result<()> {
        self.mount(&["--bind", &from.to_string_lossy()], at)?;
        succeed(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(self.path(at)))
    }

    /// Adds this machine's Go to PATH.
    pub(super) fn add_go(&self) -> Result<()> {
        let go = output_of(Command::new("go").args(["env", "GOROOT"]))
            .context("running both commands needs Go on this machine")?;
        self.mount_read_only(Path::new(&go), GO)
    }

    /// Adds an ordinary user.
    pub(super) fn add_user(&self, name: &'static str) -> Result<Account> {
        succeed(Command::new("chroot").arg(&self.dir).args([
            "useradd",
            "--create-home",
            "--shell",
            "/bin/bash",
            name,
        ]))?;
        let uid = output_of(Command::new("chroot").arg(&self.dir).args(["id", "-u", name]))?;
        let account =
            Account { name, uid: uid.parse().context("read the user id")?, home: format!("home/{name}").into() };
        self.share_downloads(&account)?;
        Ok(account)
    }

    /// The root account, with this machine's Go downloads.
    pub(super) fn root(&self) -> Result<Account> {
        let account = Account { name: "root", uid: 0, home: "root".into() };
        self.share_downloads(&account)?;
        let modules = output_of(Command::new("go").args(["env", "GOMODCACHE"]))?;
        let from = Path::new(&modules).join("cache/download");
        if from.exists() {
            copy(&from, &self.dir.join(&account.home).join("go/pkg/mod/cache"))?;
        }
        Ok(account)
    }

    /// Copies this machine's downloaded crates and cargo settings to an account, but not its credentials.
    fn share_downloads(&self, account: &Account) -> Result<()> {
        let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let from = cargo_home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cargo")));
        let from = from.context("neither CARGO_HOME nor HOME is set")?;
        let to = self.dir.join(&account.home).join(".cargo");
        for (part, into) in [("registry/index", "registry"), ("registry/cache", "registry"), ("config.toml", "")] {
            if from.join(part).exists() {
                copy(&from.join(part), &to.join(into))?;
            }
        }
        self.give_home_to(account)
    }

    /// Clones HEAD into the home directory of an account.
    pub(super) fn clone_head(&self, account: &Account) -> Result<()> {
        let root = workspace_root();
        let changed = output_of(Command::new("git").args(["status", "--porcelain"]).current_dir(&root))?;
        if !changed.is_empty() {
            say(&format!("{} uncommitted changes are not in the clone", changed.lines().count()));
        }
        let head = output_of(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&root))?;
        let to = self.dir.join(&account.home).join("gauntlet");
        succeed(Command::new("git").args(["clone", "--quiet", "--no-hardlinks", "--no-checkout"]).arg(&root).arg(&to))?;
        succeed(Command::new("git").args(["checkout", "--quiet", "--detach", &head]).current_dir(&to))?;
        self.give_home_to(account)
    }

    fn give_home_to(&self, account: &Account) -> Result<()> {
        let home = self.dir.join(&account.home);
        succeed(Command::new("chown").args(["-R", &format!("{0}:{0}", account.uid)]).arg(home))
    }

    /// A shell in the room, with the environment of a login and this machine's settings for reaching registries.
    fn shell(&self, account: &Account, script: &str) -> Command {
        let mut shell = Command::new("chroot");
        shell.arg(format!("--userspec={0}:{0}", account.name)).arg(&self.dir).args(["/bin/sh", "-c", script]);
        shell.env_clear().stdin(Stdio::null());
        let certificates = format!("/{CERTIFICATES}");
        for name in ["SSL_CERT_FILE", "CARGO_HTTP_CAINFO", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"] {
            shell.env(name, &certificates);
        }
        shell.env("HOME", Path::new("/").join(&account.home)).env("USER", account.name).env("LANG", "C.UTF-8");
        // /usr/local/bin comes first, so that its protoc is found before any other.
        shell
            .env("PATH", format!("/usr/local/bin:/{RUST}/bin:/{GO}/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"));
        shell.envs(NETWORK_SETTINGS.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        if self.path(GO).join("bin/go").exists() {
            for name in GO_SETTINGS {
                shell.envs(output_of(Command::new("go").args(["env", name])).map(|value| (name, value)));
            }
        }
        shell
    }

    /// Starts a command in the account's clone, with its output in the log `log`.
    pub(super) fn start(&self, account: &Account, command: &str, log: &str) -> Result<Running> {
        say(&format!("as {}: {command}", account.name));
        Running::spawn(self.shell(account, &format!("cd ~/gauntlet && exec {command}")), log, &self.logs)
    }

    /// Runs a command and returns its output.
    pub(super) fn output(&self, account: &Account, command: &str) -> Result<String> {
        output_of(&mut self.shell(account, command))
    }

    /// Waits until the account has no processes, and returns those that still run after `timeout`.
    pub(super) fn left_over(&self, account: &Account, timeout: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = processes_of(account.uid)?;
            if left.is_empty() || Instant::now() >= deadline {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The processes of a user in this PID namespace, without zombies and this process.
fn processes_of(uid: u32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let path = entry.context("list /proc")?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else { continue };
        // Empty if the process has exited since.
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        let is_theirs = field("Uid:").is_some_and(|of| of == uid.to_string());
        if is_theirs && field("State:") != Some("Z") && pid != std::process::id() {
            let words = fs::read(path.join("cmdline")).unwrap_or_default();
            found.push(format!("{pid} {}", String::from_utf8_lossy(&words).replace('\0', " ")));
        }
    }
    Ok(found)
}

/// This machine's apt sources for a suite.
fn sources(suite: &str) -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let is_used = |path: &PathBuf| {
        let known = path.extension().is_some_and(|extension| extension == "list" || extension == "sources");
        known && fs::read_to_string(path).is_ok_and(|text| text.contains(suite))
    };
    files.retain(is_used);
    if files.is_empty() {
        bail!("no apt source in /etc/apt provides {suite}");
    }
    Ok(files)
}

/// Copies a file or a directory into a directory, with its attributes.
fn copy(from: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
    succeed(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(into))
}

fn succeed(command: &mut Command) -> Result<()> {
    output_of(command).map(drop)
}

/// Runs a command and returns its output without trailing whitespace.
fn output_of(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {line}"))?;
    if !output.status.success() {
        bail!("{line} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// A running command with its output in a log. It has a process group of its own, as in a terminal.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    log: PathBuf,
    started: Instant,
    next_report: Duration,
}

impl Running {
    fn spawn(mut command: Command, name: &str, logs: &Path) -> Result<Running> {
        let log = logs.join(format!("{name}.log"));
        let out = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let errors = out.try_clone().context("open the log a second time")?;
        let line = command_line(&command);
        command.stdin(Stdio::null()).stdout(out).stderr(errors).process_group(0);
        let child = command.spawn().with_context(|| format!("run {line}"))?;
        Ok(Running { child, log, started: Instant::now(), next_report: REPORT_INTERVAL })
    }

    /// Waits until `done` returns a value. Fails after `timeout`, or when the command exits first.
    pub(super) fn wait_until<T>(&mut self, timeout: Duration, event: &str, done: impl Fn() -> Option<T>) -> Result<T> {
        self.poll(timeout, event, |status| match status {
            Some(status) => Err(format!("the command exited ({status}) before {event}")),
            None => Ok(done()),
        })
    }

    /// Waits for the command's exit.
    pub(super) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.poll(timeout, "the command exited", Ok)
    }

    /// Calls `check` with the exit status, if any, until it returns a value. An error includes the end of the log.
    fn poll<T>(
        &mut self,
        timeout: Duration,
        event: &str,
        check: impl Fn(Option<ExitStatus>) -> Result<Option<T>, String>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.child.try_wait().context("wait for the command")?;
            match check(status) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(failure) => return Err(self.failure(&failure)),
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("timed out after {} s, before {event}", timeout.as_secs())));
            }
            self.report();
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Sends Ctrl-C and waits for the exit.
    pub(super) fn interrupt(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let group = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("the command has no valid process id")?;
        kill_process_group(group, Signal::INT).context("send SIGINT")?;
        self.wait(timeout)
    }

    /// An error with the end of the log.
    pub(super) fn failure(&self, message: &str) -> anyhow::Error {
        const LINES: usize = 60;
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
        anyhow::anyhow!("{message}. The end of {}:\n{end}", self.log.display())
    }

    fn text(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn report(&mut self) {
        let elapsed = self.started.elapsed();
        if elapsed >= self.next_report {
            self.next_report = elapsed + REPORT_INTERVAL;
            let text = self.text();
            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            let last: String = last.trim().chars().take(100).collect();
            say(&format!("  after {} s: {last}", elapsed.as_secs()));
        }
    }
}
