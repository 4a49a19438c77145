//! Solves the challenge as a player would, and validates its scenario.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

struct Running {
    child: Child,
    door: String,
    status: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run() -> Running {
    let mut child = Command::new(env!("CARGO_BIN_EXE_example-vault"))
        .args(["--door", "127.0.0.1:0", "--status", "127.0.0.1:0"])
        .envs([("FLAG_STATUS", "FLAG{one}"), ("FLAG_VAULT", "FLAG{two}")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (door, status) = line.trim().strip_prefix("listening: door on ").unwrap().split_once(", status on ").unwrap();
    Running { child, door: door.to_owned(), status: status.to_owned() }
}

fn get(running: &Running, path: &str) -> String {
    let mut stream = TcpStream::connect(&running.status).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn diagnostics_reveal_the_code_of_the_door() {
    let running = run();
    assert!(get(&running, "/").contains("vault: closed\nwrong codes: 0\n"));
    let diagnostics = get(&running, "/diagnostics");
    assert!(diagnostics.contains("FLAG{one}"), "{diagnostics}");
    let code = diagnostics.lines().find_map(|line| line.strip_prefix("expected: ")).unwrap();

    let door = TcpStream::connect(&running.door).unwrap();
    let mut lines = BufReader::new(&door).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().contains("say OPEN"));
    for (input, answer) in [("OPEN", "wrong"), ("OPEN sesame", "wrong"), ("hello", "what?")] {
        writeln!(&door, "{input}").unwrap();
        assert_eq!(lines.next().unwrap(), answer);
    }
    writeln!(&door, "OPEN {code}").unwrap();
    assert_eq!(lines.next().unwrap(), "open: FLAG{two}");
    assert_eq!(lines.next(), None);
    assert!(get(&running, "/").contains("wrong codes: 2\n"));
}

#[test]
fn missing_arguments_print_the_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_example-vault")).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8(output.stderr).unwrap().contains("usage: FLAG_STATUS="));
}

#[test]
fn scenario_is_valid() {
    let report = gauntlet_scenario::validate(&Path::new(env!("CARGO_MANIFEST_DIR")).join("scenario")).unwrap();
    assert!(report.is_valid(), "{report:?}");
}
