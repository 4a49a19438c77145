//! Solves the challenge as a player would, and validates its scenario.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

struct Running(Child, String);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run() -> Running {
    let mut child = Command::new(env!("CARGO_BIN_EXE_example-web"))
        .args(["--listen", "127.0.0.1:0"])
        .env("FLAG", "FLAG{x}")
        .env("MOTD", "a <b> & c")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
    Running(child, address)
}

fn get(running: &Running, path: &str) -> String {
    let mut stream = TcpStream::connect(&running.1).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn page_source_leads_to_the_flag() {
    let running = run();
    let page = get(&running, "/");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("a &lt;b&gt; &amp; c") && !page.contains("FLAG"), "{page}");
    let note = page.split("is, ").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(get(&running, note).ends_with("\r\n\r\nFLAG{x}\n"));
    assert!(get(&running, "/note").starts_with("HTTP/1.1 403 "));
    assert!(get(&running, "/nowhere").starts_with("HTTP/1.1 404 "));
}

#[test]
fn missing_arguments_print_the_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_example-web")).env_remove("FLAG").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8(output.stderr).unwrap().contains("usage: FLAG="));
}

#[test]
fn scenario_is_valid() {
    let report = gauntlet_scenario::validate(&Path::new(env!("CARGO_MANIFEST_DIR")).join("scenario")).unwrap();
    assert!(report.is_valid(), "{report:?}");
}
