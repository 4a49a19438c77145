//! Where the binary listens, and where it refuses to.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, ChildStderr, Command, Output, Stdio},
    sync::Arc,
};

use gauntlet_testing::eventually;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustix::process::{Pid, Signal, kill_process};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring};

fn manager(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gauntlet-manager"));
    command.args(arguments).args(["--debug-address", "off", "--dir"]).arg(dir.join("data"));
    command.env("OTEL_SDK_DISABLED", "true").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Calls over a unix socket.
fn get(socket: &Path, path: &str) -> std::io::Result<String> {
    call(UnixStream::connect(socket)?, path)
}

fn call(mut stream: impl std::io::Read + std::io::Write, path: &str) -> std::io::Result<String> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    Ok(response)
}

/// Waits for the log line of the listener of this kind, and returns its port.
fn port(log: &mut BufReader<ChildStderr>, scheme: &str) -> u16 {
    let url = format!("{scheme}://127.0.0.1:");
    let line =
        log.lines().map_while(Result::ok).find(|line| line.contains("listening") && line.contains(&url)).unwrap();
    let port: String = line.split(&url).nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    port.parse().unwrap()
}

#[tokio::test]
async fn unix_sockets_are_served_beside_each_other_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["a.sock", "b.sock"].map(|name| dir.path().join(name));
    let urls = sockets.each_ref().map(|socket| format!("unix://{}", socket.display()));
    let arguments = ["--listen", &urls[0], "--listen", &format!("{}?mode=0660", urls[1])];
    let mut running = Running(manager(dir.path(), &arguments).stderr(Stdio::null()).spawn().unwrap());
    for socket in &sockets {
        eventually("the API", async || {
            get(socket, "/api/v1/challenge").is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
        })
        .await;
    }
    kill_process(Pid::from_child(&running.0), Signal::TERM).unwrap();
    assert!(running.0.wait().unwrap().success());
    assert!(!sockets.iter().any(|socket| socket.exists()));
}

#[test]
fn other_machines_are_refused_at_start_unless_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, parts) in [
        (&["--bind", "0.0.0.0"][..], ["tcp://0.0.0.0:8080", "--insecure-no-auth"]),
        (&["--listen", "tcp://[::]:0"], ["tcp://[::]:0", "tls://"]),
        (&["--listen", "tls://0.0.0.0:0"], ["tls://0.0.0.0:0", "--tls-cert"]),
        (
            &["--listen", "tls://127.0.0.1:0", "--tls-cert", "/none", "--tls-key", "/none"],
            ["--tls-cert /none", "no such file"],
        ),
    ] {
        let Output { status, stderr, .. } = manager(dir.path(), arguments).output().unwrap();
        let text = String::from_utf8_lossy(&stderr);
        assert!(!status.success() && parts.iter().all(|part| text.contains(part)), "{arguments:?}: {text}");
    }
}

#[test]
fn client_without_credentials_works_on_its_listener_and_is_refused_on_the_protected_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (file("tls.crt", &cert.pem()), file("tls.key", &signing_key.serialize_pem()));
    let tokens = file("tokens.jsonl", "");
    let listen = ["--listen", "tls://127.0.0.1:0", "--listen", "tcp://127.0.0.1:0?anonymous=read"];
    let arguments = [&listen[..], &["--tls-cert", &certificate, "--tls-key", &key, "--tokens", &tokens]].concat();
    let mut running = Running(manager(dir.path(), &arguments).spawn().unwrap());
    let mut log = BufReader::new(running.0.stderr.take().unwrap());
    let (protected, open) = (port(&mut log, "tls"), port(&mut log, "tcp"));
    // The manager must not block on a full pipe when it logs.
    let drain = std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));

    let connect = |port| TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let session = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
    let refused = call(StreamOwned::new(session, connect(protected)), "/api/v1/challenge").unwrap();
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("CREDENTIALS_REQUIRED"), "{refused}");
    let served = call(connect(open), "/api/v1/challenge").unwrap();
    assert!(served.starts_with("HTTP/1.1 200"), "{served}");
    drop(running);
    drain.join().unwrap().unwrap();
}
