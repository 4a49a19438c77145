//! The binary and the signals that ask it to end.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// What takes longer has stopped for good.
const LONG: Duration = Duration::from_secs(30);

struct Manager {
    child: Child,
    lines: Receiver<String>,
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
        let said = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        // Ends with the process.
        thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, _dir: dir }
    }

    /// Waits for a line with this in it.
    fn line(&self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(LONG).unwrap_or_else(|_| panic!("it never says {part:?}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    fn signal(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }
}

#[test]
fn second_signal_ends_at_once() {
    let mut manager = Manager::start();
    let listening = manager.line("listening");
    let address = listening.split("127.0.0.1:").nth(1).unwrap();
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    // A call that goes on until its body is there.
    let mut call = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    call.write_all(b"POST /api/v1/challenge HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{").unwrap();
    manager.line("health changed");
    manager.signal();
    manager.line("stopping");
    assert!(manager.child.try_wait().unwrap().is_none(), "it waits for the call");
    manager.signal();
    let (sender, ended) = mpsc::channel();
    let mut child = std::mem::replace(&mut manager.child, Command::new("true").spawn().unwrap());
    thread::spawn(move || sender.send(child.wait().unwrap()));
    assert_eq!(ended.recv_timeout(LONG).expect("it does not end").signal(), Some(15));
}
