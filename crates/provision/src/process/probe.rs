//! Checks whether an instance is ready.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use gauntlet_domain::Probe;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::output;

/// The longest status line that is read.
const STATUS_LINE: u64 = 1024;

/// Checks once, within `timeout`. `Err` describes the failure for the operator.
pub(super) async fn check(
    probe: &Probe,
    ports: &BTreeMap<String, u16>,
    address: IpAddr,
    dir: &Path,
    timeout: Duration,
) -> Result<(), String> {
    let answer = async {
        match probe {
            Probe::Tcp { port } => connect(ports, port, address).await.map(drop),
            Probe::Http { port, path, status } => {
                let answer = get(connect(ports, port, address).await?, path).await?;
                if answer == *status { Ok(()) } else { Err(format!("it returned status {answer}")) }
            }
            Probe::Output { contains: text } => {
                let dir = dir.to_owned();
                let output = tokio::task::spawn_blocking(move || output::read_all(&dir)).await.unwrap_or_default();
                let found = output.split(|byte| *byte == b'\n').any(|line| contains(line, text.as_bytes()));
                if found { Ok(()) } else { Err("no line of its output contains the text".to_owned()) }
            }
        }
    };
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| Err("it timed out".to_owned()))
}

/// Describes the check for the operator.
pub(super) fn describe(probe: &Probe, ports: &BTreeMap<String, u16>, address: IpAddr) -> String {
    let at = |port: &String| match ports.get(port) {
        Some(number) => format!("{port:?} ({})", SocketAddr::new(address, *number)),
        None => format!("{port:?} (not a port of this instance)"),
    };
    match probe {
        Probe::Tcp { port } => format!("a TCP connection to port {}", at(port)),
        Probe::Http { port, path, status } => format!("GET {path} with status {status} on port {}", at(port)),
        Probe::Output { contains } => format!("a line of output that contains {contains:?}"),
    }
}

async fn connect(ports: &BTreeMap<String, u16>, port: &str, address: IpAddr) -> Result<TcpStream, String> {
    let number = ports.get(port).ok_or_else(|| format!("the scenario has no port {port:?}, which the probe names"))?;
    TcpStream::connect((address, *number)).await.map_err(|error| error.to_string())
}

async fn get(mut stream: TcpStream, path: &str) -> Result<u16, String> {
    if !path.starts_with('/') || path.chars().any(|c| c.is_control() || c == ' ') {
        return Err(format!("the probe's path {path:?} must start with / and contain no space or control character"));
    }
    let host = stream.peer_addr().map_err(|error| error.to_string())?;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: gauntlet-probe\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut line = Vec::new();
    let mut limited = stream.take(STATUS_LINE);
    while !line.contains(&b'\n') {
        if limited.read_buf(&mut line).await.map_err(|error| error.to_string())? == 0 {
            break;
        }
    }
    status(&line).ok_or_else(|| "its response is not HTTP".to_owned())
}

fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.trim_end().split(' ');
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next().filter(|code| code.len() == 3)?.parse().ok()
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    text.is_empty() || line.windows(text.len()).any(|window| window == text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn status_is_parsed() {
        assert_eq!(status(b"HTTP/1.1 204 No Content\r\nA: b\r\n"), Some(204));
        assert_eq!(status(b"HTTP/1.0 200\r\n"), Some(200));
        for wrong in ["", "SSH-2.0-x\r\n", "HTTP/1.1\r\n", "HTTP/1.1 2000 x\r\n", "HTTP/1.1 abc\r\n"] {
            assert_eq!(status(wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_response_panics(answer: Vec<u8>) {
            let _ = status(&answer);
        }

        #[test]
        fn contains_finds_every_occurrence(line in "[ab]{0,12}", text in "[ab]{0,4}") {
            prop_assert_eq!(contains(line.as_bytes(), text.as_bytes()), line.contains(&text));
        }
    }
}
