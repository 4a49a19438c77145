//! How the binary reacts to signals.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    cell::RefCell,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything takes on a busy machine: only a real hang reaches it.
const LONG: Duration = Duration::from_secs(30);

struct Manager {
    child: Child,
    lines: Receiver<String>,
    earlier: RefCell<Vec<String>>,
    _dir: tempfile::TempDir,
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Manager {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_gauntlet-manager"))
            .args(["--bind", "127.0.0.1", "--port", "0", "--debug-address", "off", "--drain", "10m", "--dir"])
            .arg(dir.path())
            .env("OTEL_SDK_DISABLED", "true")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        // The thread ends when the process closes its log.
        thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, earlier: RefCell::default(), _dir: dir }
    }

    /// Waits for a log line that contains `part`, also if it was logged before the line of an earlier wait.
    fn wait_for_line(&self, part: &str) -> String {
        let mut earlier = self.earlier.borrow_mut();
        if let Some(line) = earlier.iter().find(|line| line.contains(part)) {
            return line.clone();
        }
        loop {
            let line = self.lines.recv_timeout(LONG).unwrap_or_else(|_| panic!("no line with {part:?}: {earlier:?}"));
            earlier.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }
}

#[test]
fn second_signal_exits_at_once() {
    let mut manager = Manager::start();
    let listening = manager.wait_for_line("listening");
    let address = listening.split("127.0.0.1:").nth(1).unwrap();
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    // This call runs until its body has arrived.
    let mut call = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    call.write_all(b"POST /api/v1/challenge HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{").unwrap();
    manager.wait_for_line("health changed");
    manager.terminate();
    manager.wait_for_line("stopping");
    assert!(manager.child.try_wait().unwrap().is_none(), "the manager waits for the call");
    manager.terminate();
    let (sender, ended) = mpsc::channel();
    let mut child = std::mem::replace(&mut manager.child, Command::new("true").spawn().unwrap());
    thread::spawn(move || sender.send(child.wait().unwrap()));
    assert_eq!(ended.recv_timeout(LONG).expect("the manager to exit").signal(), Some(15));
}

#[test]
fn manager_without_running_calls_stops_without_a_warning() {
    let mut manager = Manager::start();
    manager.wait_for_line("listening");
    manager.terminate();
    manager.wait_for_line("stopping");
    let mut left = Vec::new();
    while let Ok(line) = manager.lines.recv_timeout(LONG) {
        left.push(line);
    }
    assert!(!left.iter().any(|line| line.contains("calls were still running")), "{left:?}");
    assert!(manager.child.wait().unwrap().success());
}
