//! A program for tests: a player who owns an instance. It tries each attack and reports which of them succeeded.
//!
//! The report has a line `NAME denied: ERROR` or `NAME SUCCEEDED` for each attack. It is sent to each client that connects to `LISTEN`, and the
//! attacks begin again then. `TARGETS` are paths of the machine that an instance must not reach, `PORTS` addresses where something listens,
//! `MANAGER` the manager's process id, `ABSTRACT` the name of an abstract socket. With the argument `linger` it does nothing, in a session of its own.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::PermissionsExt as _,
            net::{SocketAddr as UnixAddress, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use io::Write as _;
use nix::{
    sched::CloneFlags,
    unistd::{Gid, Uid},
};
use rustix::{
    fs::{CWD, FileType, FlockOperation, Mode},
    mount::{FsOpenFlags, MountFlags, OpenTreeFlags, UnmountFlags},
    net::{AddressFamily, Protocol, SocketType},
    process::{Pid, Signal},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long what was killed may take to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// More than any limit of a test allows.
const MANY: usize = 10_000;
const CHUNK: usize = 1 << 20;
/// Directories of the machine, as far as an instance could name them.
const HOST_PATHS: [&str; 9] = [
    "/root",
    "/home",
    "/var",
    "/run",
    "/sys/kernel",
    "/etc/shadow",
    "/proc/1/root/etc/shadow",
    "/proc/1/environ",
    "/proc/kcore",
];
const DEVICES: [&str; 5] = ["/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/net/tun"];
const VSOCK: u16 = 40;
const ALG: u16 = 38;
const NETFILTER: u32 = 12;

fn main() -> io::Result<()> {
    if std::env::args().nth(1).as_deref() == Some("linger") {
        let _ = rustix::process::setsid();
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let listener = TcpListener::bind(std::env::var("LISTEN").unwrap_or_default())?;
    println!("listening");
    for stream in listener.incoming() {
        let report = attack();
        stream?.write_all(report.as_bytes())?;
    }
    Ok(())
}

fn list(name: &str) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_default();
    text.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Tries every attack.
fn attack() -> String {
    let mut report = Report(String::new());
    files(&mut report);
    processes(&mut report);
    privileges(&mut report);
    network(&mut report);
    exhaustion(&mut report);
    report.0
}

struct Report(String);

impl Report {
    fn add<T, E: std::fmt::Display>(&mut self, name: &str, result: Result<T, E>) {
        let line = match result {
            Ok(_) => format!("{name} SUCCEEDED\n"),
            Err(error) => format!("{name} denied: {error}\n"),
        };
        self.0.push_str(&line);
    }

    fn add_if(&mut self, name: &str, succeeded: bool) {
        self.add(name, if succeeded { Ok(()) } else { Err("no effect") });
    }
}

fn files(report: &mut Report) {
    let relative = ["..", "../instance.json", "../state.json", "../../../ports", "../../../../flag.key", "../run.lock"];
    // In its own root, `..` of the working directory is the root.
    let seen = |path: &str| -> io::Result<PathBuf> {
        let path = Path::new("/work").join(path).canonicalize()?;
        if path == Path::new("/") { Err(io::ErrorKind::NotFound.into()) } else { Ok(path) }
    };
    for path in relative {
        report.add(&format!("reach {path}"), seen(path));
    }
    for path in list("TARGETS").iter().map(String::as_str).chain(HOST_PATHS) {
        let kind = fs::metadata(path)
            .and_then(|found| if found.is_dir() { fs::read_dir(path).map(drop) } else { fs::read(path).map(drop) });
        report.add(&format!("read {path}"), kind);
        report.add(&format!("write {path}"), fs::OpenOptions::new().append(true).open(path));
        report.add(&format!("chmod {path}"), fs::set_permissions(path, fs::Permissions::from_mode(0o000)));
        let lock = || -> io::Result<()> {
            let file = fs::File::open(path)?;
            Ok(rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?)
        };
        report.add(&format!("flock {path}"), lock());
        let link = PathBuf::from("/work/link");
        let _ = fs::remove_file(&link);
        let follow =
            std::os::unix::fs::symlink(path, &link).and_then(|()| fs::metadata(&link)).and_then(|_| fs::read(&link));
        report.add(&format!("follow a link to {path}"), follow);
        report.add(&format!("hard link to {path}"), fs::hard_link(path, "/work/hard"));
    }
    let scenario = fs::read_dir("/scenario").into_iter().flatten().flatten().map(|entry| entry.path());
    for path in scenario.chain(
        [
            "/scenario/new",
            "/usr/bin/new",
            "/etc/passwd",
            "/new",
            "/proc/sys/kernel/core_pattern",
            "/proc/sysrq-trigger",
        ]
        .map(PathBuf::from),
    ) {
        report.add(&format!("change {}", path.display()), fs::OpenOptions::new().append(true).create(true).open(&path));
    }
    report.add("remove the scenario", fs::remove_dir_all("/scenario"));
    report.add("hard link to a setuid program", fs::hard_link("/usr/bin/su", "/work/su"));
    let device = rustix::fs::makedev(1, 1);
    report.add("mknod", rustix::fs::mknodat(CWD, "/work/mem", FileType::CharacterDevice, Mode::RUSR, device));
    for path in DEVICES {
        report.add(&format!("open {path}"), fs::File::open(path));
    }
}

fn processes(report: &mut Report) {
    let manager = std::env::var("MANAGER").ok().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    if let Some(manager) = manager {
        // The id may be one of this PID namespace by chance: only the program itself and process 1 are here.
        report.add("signal the manager", rustix::process::test_kill_process(manager));
        report.add(
            "attach to the manager",
            nix::sys::ptrace::attach(nix::unistd::Pid::from_raw(manager.as_raw_nonzero().get())),
        );
        report.add("read the manager's environment", fs::read(format!("/proc/{}/environ", manager.as_raw_nonzero())));
    }
    report.add("attach to process 1", nix::sys::ptrace::attach(nix::unistd::Pid::from_raw(1)));
    report.add("write the memory of process 1", fs::OpenOptions::new().write(true).open("/proc/1/mem"));
    report.add("follow a descriptor of process 1", fs::read_link("/proc/1/fd/0"));
    // Of those in this PID namespace, none but this process is left, nor is there another one outside.
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
    let mut others = other_processes();
    let deadline = Instant::now() + EXIT_TIMEOUT;
    while !others.is_empty() && Instant::now() < deadline {
        others = other_processes();
    }
    report.add_if(&format!("see other processes {others:?}"), !others.is_empty());
    report.add_if("inherit a variable of the manager", std::env::vars().any(|(name, _)| name.starts_with("CARGO")));
    let inherited: Vec<_> =
        (3..64).filter(|fd| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.starts_with("/"))).collect();
    report.add_if(&format!("inherit files {inherited:?}"), !inherited.is_empty());
    // Left behind: its end is what the test checks.
    let me = std::env::current_exe().unwrap_or_default();
    let mark = std::env::var("MARK").unwrap_or_default();
    let mut left = Command::new("/bin/sh");
    left.arg("-c").arg(format!("\"$0\" linger {mark} >/dev/null 2>&1 & exit")).arg(me);
    let _ = left.stdin(Stdio::null()).status();
}

/// What is visible besides this process and process 1.
fn other_processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != 1 && *pid != std::process::id() && !is_zombie(*pid)).collect()
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

fn privileges(report: &mut Report) {
    let root = (Uid::from_raw(0), Gid::from_raw(0));
    report.add("setuid", nix::unistd::setuid(root.0));
    report.add("setgid", nix::unistd::setgid(root.1));
    report.add("setgroups", nix::unistd::setgroups(&[root.1]));
    for (name, flags) in [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("mount", CloneFlags::CLONE_NEWNS),
        ("network", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
    ] {
        report.add(&format!("unshare the {name} namespace"), nix::sched::unshare(flags));
    }
    report.add("mount", rustix::mount::mount("tmpfs", "/work", "tmpfs", MountFlags::empty(), None));
    report.add("bind mount", rustix::mount::mount_bind("/proc", "/work"));
    report.add("unmount", rustix::mount::unmount("/scenario", UnmountFlags::DETACH));
    report.add("fsopen", rustix::mount::fsopen("tmpfs", FsOpenFlags::empty()));
    report.add("open_tree", rustix::mount::open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLONE));
    report.add("pivot_root", nix::unistd::pivot_root(".", "."));
    report.add("chroot", rustix::process::chroot("/work"));
    report.add("sethostname", rustix::system::sethostname(b"mine"));
    report.add("load a module", rustix::system::init_module(b"", c""));
    let su = Command::new("/usr/bin/su").args(["-c", "id -u"]).stdin(Stdio::null()).output();
    report.add_if("become root by su", su.is_ok_and(|output| output.stdout.starts_with(b"0")));
}

fn network(report: &mut Report) {
    for address in list("PORTS").iter().map(String::as_str).chain(["169.254.169.254:80", "[fd00:ec2::254]:80"]) {
        let Ok(address) = address.parse::<SocketAddr>() else { continue };
        report.add(&format!("connect to {address}"), TcpStream::connect_timeout(&address, CONNECT_TIMEOUT));
    }
    let name = std::env::var("ABSTRACT").unwrap_or_default();
    report.add(
        "connect to an abstract socket",
        UnixAddress::from_abstract_name(name).and_then(|address| UnixStream::connect_addr(&address)),
    );
    for (name, family, kind, protocol) in [
        ("a raw socket", AddressFamily::INET, SocketType::RAW, 1),
        ("a packet socket", AddressFamily::PACKET, SocketType::RAW, 0),
        ("a vsock socket", AddressFamily::from_raw(VSOCK), SocketType::STREAM, 0),
        ("an AF_ALG socket", AddressFamily::from_raw(ALG), SocketType::SEQPACKET, 0),
        ("a netfilter socket", AddressFamily::NETLINK, SocketType::RAW, NETFILTER),
    ] {
        let protocol = std::num::NonZeroU32::new(protocol).map(Protocol::from_raw);
        report.add(&format!("open {name}"), rustix::net::socket(family, kind, protocol));
    }
}

/// Uses up what the instance may have. It succeeds only if there is no end.
fn exhaustion(report: &mut Report) {
    let dir = Path::new("/tmp/fill");
    let _ = fs::remove_dir_all(dir);
    let _ = fs::create_dir(dir);
    let chunk = vec![0; CHUNK];
    report.add("fill the disk", (0..MANY).try_for_each(|number| fs::write(dir.join(number.to_string()), &chunk)));
    let _ = fs::remove_dir_all(dir);
    let start = std::env::current_dir();
    let deep = (0..MANY).try_for_each(|_| fs::create_dir("d").and_then(|()| std::env::set_current_dir("d")));
    report.add("nest directories without end", deep);
    let _ = start.and_then(std::env::set_current_dir);
    let _ = Command::new("/bin/rm").args(["-r", "d"]).status();
    let mut children = Vec::new();
    let sleep = |_| {
        Command::new("/bin/sleep").arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let forked = (0..MANY).map(sleep).try_for_each(|child| child.map(|child| children.push(child)));
    report.add("fork without end", forked);
    for mut child in children {
        let _ = child.kill().and_then(|()| child.wait());
    }
    let mut open = Vec::new();
    let opened = (0..MANY * 10).try_for_each(|_| fs::File::open("/dev/null").map(|file| open.push(file)));
    report.add("open files without end", opened);
}
