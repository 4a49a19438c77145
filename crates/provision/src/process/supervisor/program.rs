//! The process that becomes the instance's program, or process 1 of its sandbox. It is started before the instance is known.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, PipeReader, PipeWriter, Read as _},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
};

use gauntlet_sandbox::{
    Failure, Level, Running, Spec, Stage,
    forward::{Limits, Protocol, Published, Setup},
};
use rustix::{
    net::{SocketType, sockopt},
    process::{Pid, Signal},
};

use crate::process::{
    ports::HeldPorts,
    record::{self, MARKER, Record, UIDS},
    uids,
};

/// A process that becomes the program of the instance that it is assigned.
pub(super) struct UnassignedProgram(Stage);

/// The sockets that hold the instance's ports.
pub(super) struct InstancePorts(Vec<Published>);

impl InstancePorts {
    /// `held` is the descriptor that the manager passed.
    pub(super) fn receive(held: Option<OwnedFd>) -> io::Result<Self> {
        let publish = |outer: OwnedFd| -> io::Result<Published> {
            let address = std::net::SocketAddr::try_from(rustix::net::getsockname(&outer)?)?;
            let is_stream = sockopt::socket_type(&outer)? == SocketType::STREAM;
            let protocol = if is_stream { Protocol::Tcp } else { Protocol::Udp };
            Ok(Published { outer, inner: address.port(), protocol })
        };
        let sockets = held.as_ref().map(HeldPorts::receive).unwrap_or_default();
        Ok(Self(sockets.into_iter().map(publish).collect::<io::Result<_>>()?))
    }

    /// Whether these are the ports of the record. They are not if another launch has replaced the one that started this supervisor.
    pub(super) fn match_record(&self, record: &Record) -> bool {
        let held: BTreeSet<u16> = self.0.iter().map(|port| port.inner).collect();
        held == record.ports.values().copied().collect()
    }
}

/// The instance's program.
pub(super) struct Program {
    running: Running,
    level: Level,
    /// Closing it ends the forwarder of ports.
    forwarding: Option<PipeWriter>,
}

impl UnassignedProgram {
    pub(super) fn start(level: Level) -> Result<Self, Failure> {
        Stage::start(level).map(Self)
    }

    /// The process. It is the instance's first process: once it has been reaped, no process of its PID namespace is left.
    pub(super) fn pid(&self) -> Pid {
        self.0.pid()
    }

    /// Lets it become the program. Returns it with its output.
    ///
    /// # Errors
    /// If the manager is of another release, or a step of the start fails.
    pub(super) fn assign(self, dir: &Path, record: &Record, ports: InstancePorts) -> io::Result<(Program, PipeReader)> {
        let level = self.0.level();
        let launch = &record.launch;
        if record.version != record::VERSION || launch.isolation != level {
            self.dismiss();
            return Err(io::Error::other("the manager and its supervisor are of different releases"));
        }
        let mut env = launch.env.clone();
        if !level.has_namespaces() {
            env.insert(MARKER.to_owned(), dir.to_string_lossy().into_owned());
        }
        let (uid, lock) = if level == Level::Uid { take_uid(dir, launch.uids)? } else { (0, None) };
        let spec = Spec {
            program: Some(launch.program.clone()),
            args: launch.args.clone(),
            env,
            directory: launch.directory.clone(),
            limits: launch.resource_limits,
            view: launch.view.clone(),
            uid,
        };
        let InstancePorts(ports) = ports;
        let (forward, forwarding, hold) = if level.has_namespaces() {
            let (setup, stop) = forward_ports(ports)?;
            (Some(setup), Some(stop), lock.into_iter().map(OwnedFd::from).collect())
        } else {
            // Held until the program starts, and binds them itself.
            (None, None, ports.into_iter().map(|port| port.outer).collect())
        };
        let (running, output) = self.0.run(&spec, hold, forward)?;
        Ok((Program { running, level, forwarding }, output))
    }

    /// Ends it without an instance, and reaps it.
    pub(super) fn dismiss(self) {
        self.0.dismiss();
    }
}

impl Program {
    pub(super) fn pid(&self) -> Pid {
        self.running.pid()
    }

    /// Sends SIGTERM: in a sandbox, to all of its processes, otherwise to the program's process group.
    pub(super) fn terminate(&mut self) {
        if self.level.has_namespaces() {
            let _ = self.running.terminate();
        } else {
            let _ = rustix::process::kill_process_group(self.pid(), Signal::TERM);
        }
    }

    /// How the program ended, if process 1 of its sandbox has told; call it once that process was reaped.
    pub(super) fn exit(&mut self) -> Option<gauntlet_sandbox::Exit> {
        if self.level.has_namespaces() { self.running.exit() } else { None }
    }

    /// Becomes readable when the forwarder of ports has ended.
    pub(super) fn forwarder(&mut self) -> Option<&mut PipeReader> {
        self.running.forwarder()
    }

    /// The error that ended the forwarder of ports, if there was one. Blocks until it has ended.
    pub(super) fn forwarder_error(&mut self) -> Option<String> {
        let mut text = String::new();
        self.running.forwarder()?.read_to_string(&mut text).ok()?;
        Some(text).filter(|text| !text.is_empty())
    }

    /// Lets the forwarder of ports deliver what the program sent to clients that read it, and waits for that. Blocks for a second at most.
    pub(super) fn drain(&mut self) {
        self.forwarding = None;
        let _ = self.forwarder_error();
    }
}

fn take_uid(dir: &Path, (first, last): (u32, u32)) -> io::Result<(u32, Option<File>)> {
    let top = dir.parent().and_then(Path::parent).ok_or(io::ErrorKind::NotFound)?;
    let key = dir.file_name().and_then(|key| key.to_str()).unwrap_or_default();
    uids::take(&top.join(UIDS), first..=last, key).map(|(uid, lock)| (uid, Some(lock)))
}

/// Forwards to the same ports of the sandbox.
fn forward_ports(ports: Vec<Published>) -> io::Result<(Setup, PipeWriter)> {
    let (stopped, stop) = io::pipe()?;
    let setup = Setup {
        ports,
        limits: Limits::default(),
        client_addresses: true,
        counters: Arc::default(),
        stop: stopped.into(),
    };
    Ok((setup, stop))
}
