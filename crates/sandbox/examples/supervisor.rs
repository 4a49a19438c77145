//! A supervisor for tests: reads a level and a specification, runs it, copies its output, and prints how it ended.
//!
//! With the arguments `greet PORT` it is a program for a sandbox: it answers each connection with the client's address.
//!
//! Standard input is JSON: `{"level": …, "spec": …, "ports": […]}`. `ports` are TCP ports of 127.0.0.1 to forward. On SIGTERM it terminates the sandbox.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
    sync::Arc,
    time::Duration,
};

use gauntlet_sandbox::{
    Level, Spec, Stage,
    forward::{Limits, Protocol, Published, Setup},
};
use rustix::{
    net::{AddressFamily, SocketAddrV4, SocketType},
    process::WaitOptions,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Input {
    level: Level,
    spec: Spec,
    #[serde(default)]
    ports: Vec<u16>,
    /// Whether to send SIGTERM when the output has this many bytes.
    #[serde(default)]
    terminate_after: Option<usize>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    gauntlet_sandbox::run_if_requested();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [mode, port] = arguments.as_slice()
        && mode == "greet"
    {
        return greet(port.parse()?);
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let Input { level, spec, ports, terminate_after } = serde_json::from_str(&text)?;
    let ports = ports.into_iter().map(publish).collect::<io::Result<Vec<_>>>()?;
    // Forwards until this process ends.
    let (stop, _stopped) = io::pipe()?;
    let forward =
        Setup { ports, limits: Limits::default(), client_addresses: true, counters: Arc::default(), stop: stop.into() };
    let forward = level.has_namespaces().then_some(forward);
    let started = Stage::start(level).and_then(|stage| stage.run(&spec, Vec::new(), forward));
    let (mut running, mut output) = match started {
        Ok(started) => started,
        Err(failure) => {
            println!("failed {failure}");
            return Ok(());
        }
    };
    let mut total = 0;
    loop {
        let mut bytes = [0; 4096];
        match output.read(&mut bytes) {
            Ok(0) => break,
            Ok(read) => {
                io::stdout().write_all(bytes.get(..read).unwrap_or_default())?;
                io::stdout().flush()?;
                if terminate_after.is_some_and(|after| total < after && total + read >= after) {
                    running.terminate()?;
                }
                total += read;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    let status = rustix::process::waitpid(Some(running.pid()), WaitOptions::empty())?;
    match (running.exit(), status.and_then(|(_, status)| status.exit_status())) {
        (Some(exit), _) => println!("ended with {exit}"),
        (None, status) => println!("ended with {status:?}"),
    }
    Ok(())
}

/// Answers one connection, after it was told to end.
fn greet(port: u16) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    println!("listening");
    let (mut stream, _) = listener.accept()?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    stream.write_all(format!("{text} was received").as_bytes())?;
    Ok(())
}

fn publish(port: u16) -> io::Result<Published> {
    let outer = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&outer, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
    Ok(Published { outer, inner: port, protocol: Protocol::Tcp })
}
