//! A stranger attacks the API's port, from addresses of their own, while an honest caller is served.

mod credentials;
mod floods;
mod oversized;
mod pages;

use std::{
    io::{ErrorKind, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use serde_json::json;

use crate::harness::{Answer, Backend, Manager, World, binary, eventually, local, rest_with};

/// How long a client may take to send its headers, or to read.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The address of the stranger; the honest caller has 127.0.0.1.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 6, 6, 6);

/// A manager that wants credentials, and the honest caller's token.
struct Target {
    world: World,
    manager: Manager,
    token: String,
}

impl Target {
    fn start() -> Self {
        let world = World::bare(Backend::Embedded);
        let token = create_token(&world, "tokens", &["--name", "honest", "--scope", "admin"]);
        let timeout = format!("{}s", CLIENT_TIMEOUT.as_secs());
        let manager = world.manager_with(
            "m1",
            &[
                ("TOKENS", world.path("tokens").display().to_string()),
                ("HEADER_TIMEOUT", timeout.clone()),
                ("STALL_TIMEOUT", timeout.clone()),
                ("KEEPALIVE", timeout),
            ],
        );
        let target = Self { world, manager, token };
        target.call("POST", "/api/v1/challenge", &json!({ "id": "web", "scenario": local("web") }).to_string()).ok();
        target
    }

    /// Calls the API as the honest caller.
    fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        as_holder(&self.manager.url, &self.token, method, path, body).unwrap()
    }

    fn address(&self) -> SocketAddr {
        self.manager.url.trim_start_matches("http://").parse().unwrap()
    }

    /// Connects as the stranger.
    fn connect(&self) -> TcpStream {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> std::io::Result<TcpStream> {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&socket, &SocketAddr::from((STRANGER, 0)))?;
        connect(&socket, &self.address())?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    }

    /// Runs an attack while the honest caller reads, creates and deletes. Each of its calls must succeed.
    fn under_attack(&self, attack: impl FnOnce()) {
        let stop = Arc::new(AtomicBool::new(false));
        let honest = self.honest_caller(Arc::clone(&stop));
        // Also when the attack fails its test.
        let stopped = Stopped(stop);
        attack();
        drop(stopped);
        let rounds = honest.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(rounds > 0, "the honest caller was never served");
    }

    /// Calls until `stop`, at least once after it began, and returns how often everything was served.
    fn honest_caller(&self, stop: Arc<AtomicBool>) -> JoinHandle<usize> {
        let (url, token) = (self.manager.url.clone(), self.token.clone());
        std::thread::spawn(move || {
            let mut rounds = 0;
            loop {
                let last = stop.load(Ordering::Relaxed);
                for (method, path, body) in [
                    ("GET", "/healthcheck", ""),
                    ("POST", "/api/v1/instance", r#"{"challengeId":"web","sourceId":"honest"}"#),
                    ("GET", "/api/v1/instance/web/honest", ""),
                    ("DELETE", "/api/v1/instance/web/honest", ""),
                ] {
                    let answer = as_holder(&url, &token, method, path, body);
                    let answer = answer.unwrap_or_else(|error| panic!("honest {method} {path}: {error}"));
                    assert_eq!(answer.status, 200, "honest {method} {path}: {}", answer.text);
                }
                rounds += 1;
                if last {
                    return rounds;
                }
            }
        })
    }
}

/// Stops the honest caller when it is dropped.
struct Stopped(Arc<AtomicBool>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Calls the API with a token.
fn as_holder(url: &str, token: &str, method: &str, path: &str, body: &str) -> Result<Answer, String> {
    rest_with(url, method, path, Some(body.as_bytes()), &[("authorization", format!("Bearer {token}"))])
}

/// Adds a token to a file in the world's directory.
fn create_token(world: &World, file: &str, arguments: &[&str]) -> String {
    let mut create = Command::new(binary("gauntlet"));
    create.args(["token", "create", "--tokens"]).arg(world.path(file)).args(arguments);
    let output = create.env("OTEL_SDK_DISABLED", "true").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Reads until the server closes the connection, and returns what it sent.
///
/// # Panics
/// When the connection is still open at the deadline.
fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return received,
            Ok(count) => received.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                return received;
            }
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
    }
}
