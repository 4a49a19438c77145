//! A minimal Debian in a directory, and what runs in it.

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
use crate::console::say;
use crate::test::line;

const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";
const RUST: &str = "opt/rust";
const GO: &str = "usr/local/go";
/// How often a command that goes on is reported.
const REPORT_EVERY: Duration = Duration::from_secs(30);

/// By which registries are reached. Tokens are not among them.
const NETWORK: [&str; 17] = [
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

/// Somebody who runs commands in the room.
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
    /// Makes it, with what the README asks for, this machine's Rust, and a protoc on PATH that has no include files.
    pub(super) fn make(dir: &Path, logs: &Path) -> Result<Room> {
        let room = Room { dir: dir.to_path_buf(), logs: logs.to_path_buf() };
        let started = Instant::now();
        room.debootstrap()?;
        say(&format!("a minimal Debian: {} s", started.elapsed().as_secs()));
        room.mount(&["-t", "proc", "proc"], "proc")?;
        room.mount(&["--rbind", "/dev"], "dev")?;
        room.mount(&["--rbind", "/sys"], "sys")?;
        for file in ["/etc/resolv.conf", "/etc/hosts"] {
            fs::copy(file, room.path(file)).with_context(|| format!("copy {file}"))?;
        }
        let certificates =
            std::env::var_os("SSL_CERT_FILE").map_or_else(|| Path::new("/").join(CERTIFICATES), PathBuf::from);
        fs::copy(&certificates, room.path(CERTIFICATES)).with_context(|| format!("copy {}", certificates.display()))?;
        // The toolchain that compiled this, whether rustup put it there or not.
        let rust = said(Command::new("rustc").args(["--print", "sysroot"]))?;
        room.mount_read_only(Path::new(&rust), RUST)?;
        let protoc = room.path("usr/local/bin/protoc");
        fs::write(&protoc, "#!/bin/sh\necho 'google/protobuf/empty.proto: File not found.' >&2\nexit 1\n")?;
        fs::set_permissions(&protoc, fs::Permissions::from_mode(0o755))?;
        Ok(room)
    }

    fn debootstrap(&self) -> Result<()> {
        let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
        let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        let suite =
            suite.filter(|_| release.contains("\nID=debian\n")).context("this is not Debian: see /etc/os-release")?;
        let options = self.logs.join("apt.conf");
        let acquire = said(Command::new("apt-config").args(["dump", "Acquire"]))?;
        fs::write(&options, acquire).with_context(|| format!("write {}", options.display()))?;
        let mut make = Command::new(Tools::from_env().require(Tool::Mmdebstrap)?);
        make.args(["--mode=root", "--variant=minbase"])
            .arg(format!("--include={}", Readme::read()?.packages.join(",")))
            .arg(format!("--aptopt={}", options.display()))
            .arg(suite)
            .arg(&self.dir)
            .args(sources(suite)?);
        let mut running = Running::spawn(make, "debian", &self.logs)?;
        let status = running.wait(Duration::from_secs(15 * 60))?;
        if !status.success() {
            return Err(running.failure(&format!("mmdebstrap failed ({status})")));
        }
        Ok(())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.join(path.trim_start_matches('/'))
    }

    fn mount(&self, what: &[&str], at: &str) -> Result<()> {
        let at = self.path(at);
        fs::create_dir_all(&at).with_context(|| format!("create {}", at.display()))?;
        succeed(Command::new("mount").args(what).arg(at))
    }

    fn mount_read_only(&self, from: &Path, at: &str) -> Result<()> {
        self.mount(&["--bind", &from.to_string_lossy()], at)?;
        succeed(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(self.path(at)))
    }

    /// This machine's Go. From now on it is found on PATH.
    pub(super) fn add_go(&self) -> Result<()> {
        let go = said(Command::new("go").args(["env", "GOROOT"])).context("both commands need Go on this machine")?;
        self.mount_read_only(Path::new(&go), GO)
    }

    /// An ordinary user, in no group of their own choice.
    pub(super) fn add_user(&self, name: &'static str) -> Result<Account> {
        succeed(Command::new("chroot").arg(&self.dir).args([
            "useradd",
            "--create-home",
            "--shell",
            "/bin/bash",
            name,
        ]))?;
        let uid = said(Command::new("chroot").arg(&self.dir).args(["id", "-u", name]))?;
        let account = Account { name, uid: uid.parse().context("a user id")?, home: format!("home/{name}").into() };
        self.share_downloads(&account)?;
        Ok(account)
    }

    /// Root, with what this machine has downloaded for Go, too.
    pub(super) fn root(&self) -> Result<Account> {
        let account = Account { name: "root", uid: 0, home: "root".into() };
        self.share_downloads(&account)?;
        let modules = said(Command::new("go").args(["env", "GOMODCACHE"]))?;
        let from = Path::new(&modules).join("cache/download");
        if from.exists() {
            copy(&from, &self.dir.join(&account.home).join("go/pkg/mod/cache"))?;
        }
        Ok(account)
    }

    /// Gives an account the crates that this machine has downloaded, and its settings of cargo: not its credentials.
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
        self.hand_over(account)
    }

    /// Clones HEAD into the home of an account.
    pub(super) fn clone_head(&self, account: &Account) -> Result<()> {
        let root = workspace_root();
        let changed = said(Command::new("git").args(["status", "--porcelain"]).current_dir(&root))?;
        if !changed.is_empty() {
            say(&format!("{} changes that are not committed are not in the room", changed.lines().count()));
        }
        let head = said(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&root))?;
        let to = self.dir.join(&account.home).join("gauntlet");
        succeed(Command::new("git").args(["clone", "--quiet", "--no-hardlinks", "--no-checkout"]).arg(&root).arg(&to))?;
        succeed(Command::new("git").args(["checkout", "--quiet", "--detach", &head]).current_dir(&to))?;
        self.hand_over(account)
    }

    fn hand_over(&self, account: &Account) -> Result<()> {
        let home = self.dir.join(&account.home);
        succeed(Command::new("chown").args(["-R", &format!("{0}:{0}", account.uid)]).arg(home))
    }

    /// A shell in the room, as that account, with the environment of a login and what reaches the registries from here.
    fn shell(&self, account: &Account, script: &str) -> Command {
        let mut shell = Command::new("chroot");
        shell.arg(format!("--userspec={0}:{0}", account.name)).arg(&self.dir).args(["/bin/sh", "-c", script]);
        shell.env_clear().stdin(Stdio::null());
        let certificates = format!("/{CERTIFICATES}");
        for name in ["SSL_CERT_FILE", "CARGO_HTTP_CAINFO", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"] {
            shell.env(name, &certificates);
        }
        shell.env("HOME", Path::new("/").join(&account.home)).env("USER", account.name).env("LANG", "C.UTF-8");
        // The protoc of /usr/local/bin comes before any other.
        shell
            .env("PATH", format!("/usr/local/bin:/{RUST}/bin:/{GO}/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"));
        shell.envs(NETWORK.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        if self.path(GO).join("bin/go").exists() {
            for name in GO_SETTINGS {
                shell.envs(said(Command::new("go").args(["env", name])).map(|value| (name, value)));
            }
        }
        shell
    }

    /// Starts a command in the account's clone; its output goes to a log of that name.
    pub(super) fn start(&self, account: &Account, command: &str, log: &str) -> Result<Running> {
        say(&format!("as {}: {command}", account.name));
        Running::spawn(self.shell(account, &format!("cd ~/gauntlet && exec {command}")), log, &self.logs)
    }

    /// What a command answers.
    pub(super) fn output(&self, account: &Account, command: &str) -> Result<String> {
        said(&mut self.shell(account, command))
    }

    /// The processes of an account that are left, once `within` is over or none is.
    pub(super) fn left_over(&self, account: &Account, within: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + within;
        loop {
            let left = processes_of(account.uid)?;
            if left.is_empty() || Instant::now() >= deadline {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The living processes of a user in this process namespace, but for this one.
fn processes_of(uid: u32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let path = entry.context("list /proc")?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else { continue };
        // It may have ended meanwhile.
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

/// This machine's apt sources that have a suite.
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
        bail!("no file of /etc/apt/sources.list.d has {suite}");
    }
    Ok(files)
}

/// Copies a file or a directory into a directory, as it is.
fn copy(from: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
    succeed(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(into))
}

fn succeed(command: &mut Command) -> Result<()> {
    said(command).map(drop)
}

/// What a command answers, without the line's end.
fn said(command: &mut Command) -> Result<String> {
    let line = line(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {line}"))?;
    if !output.status.success() {
        bail!("{line} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// A command with its output in a log. It is in a group of its own, as in a terminal.
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
        let line = line(&command);
        command.stdin(Stdio::null()).stdout(out).stderr(errors).process_group(0);
        let child = command.spawn().with_context(|| format!("run {line}"))?;
        Ok(Running { child, log, started: Instant::now(), next_report: REPORT_EVERY })
    }

    /// Waits until `done` answers, while the command goes on.
    pub(super) fn until<T>(&mut self, within: Duration, what: &str, done: impl Fn() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the command")? {
                return Err(self.failure(&format!("it ended ({status}) before {what}")));
            }
            if let Some(value) = done() {
                return Ok(value);
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("not within {} s: {what}", within.as_secs())));
            }
            self.report();
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the command")? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("it did not end within {} s", within.as_secs())));
            }
            self.report();
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ctrl-C, and waits for its end.
    pub(super) fn interrupt(&mut self, within: Duration) -> Result<ExitStatus> {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        kill_process_group(group, Signal::INT).context("send SIGINT")?;
        self.wait(within)
    }

    /// An error with the end of the log.
    pub(super) fn failure(&self, what: &str) -> anyhow::Error {
        const LINES: usize = 60;
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
        anyhow::anyhow!("{what}. The end of {}:\n{end}", self.log.display())
    }

    fn text(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn report(&mut self) {
        let elapsed = self.started.elapsed();
        if elapsed >= self.next_report {
            self.next_report = elapsed + REPORT_EVERY;
            let text = self.text();
            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            let last: String = last.trim().chars().take(100).collect();
            say(&format!("  {} s so far: {last}", elapsed.as_secs()));
        }
    }
}
