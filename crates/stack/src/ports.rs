//! The ports of the stack: the documented ones, or free ones that no other test can take. A test that needs a port number before something
//! listens on the port reserves it here.

use std::fs::{File, TryLockError};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process;

use crate::{Doing as _, Error, Result, create_dir};

/// One listening port of the observability stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The collector's OTLP over gRPC.
    OtlpGrpc,
    /// The collector's OTLP over HTTP.
    OtlpHttp,
    /// The metrics that applications pushed to the collector, for Prometheus to scrape.
    CollectorPrometheus,
    /// The collector's own metrics.
    CollectorTelemetry,
    /// The collector's health check.
    CollectorHealth,
    /// The collector's zpages.
    CollectorZpages,
    /// Jaeger's web page and HTTP API.
    JaegerQuery,
    /// Jaeger's gRPC API.
    JaegerGrpc,
    /// Jaeger's OTLP over gRPC.
    JaegerOtlp,
    /// Jaeger's health check.
    JaegerHealth,
    /// Jaeger's own metrics.
    JaegerTelemetry,
    /// Prometheus.
    Prometheus,
    /// Alertmanager.
    Alertmanager,
}

impl Port {
    /// Every port, in the order of the enum, which [`Ports`] relies on.
    pub const ALL: [Port; 13] = [
        Port::OtlpGrpc,
        Port::OtlpHttp,
        Port::CollectorPrometheus,
        Port::CollectorTelemetry,
        Port::CollectorHealth,
        Port::CollectorZpages,
        Port::JaegerQuery,
        Port::JaegerGrpc,
        Port::JaegerOtlp,
        Port::JaegerHealth,
        Port::JaegerTelemetry,
        Port::Prometheus,
        Port::Alertmanager,
    ];

    /// The name used on the command line, and the number that docs/stack.md documents.
    const fn entry(self) -> (&'static str, u16) {
        match self {
            Port::OtlpGrpc => ("otlp-grpc", 4317),
            Port::OtlpHttp => ("otlp-http", 4318),
            Port::CollectorPrometheus => ("collector-prometheus", 8889),
            Port::CollectorTelemetry => ("collector-telemetry", 8888),
            Port::CollectorHealth => ("collector-health", 13133),
            Port::CollectorZpages => ("collector-zpages", 55679),
            Port::JaegerQuery => ("jaeger-query", 16686),
            Port::JaegerGrpc => ("jaeger-grpc", 16685),
            Port::JaegerOtlp => ("jaeger-otlp", 14317),
            Port::JaegerHealth => ("jaeger-health", 13134),
            Port::JaegerTelemetry => ("jaeger-telemetry", 8887),
            Port::Prometheus => ("prometheus", 9090),
            Port::Alertmanager => ("alertmanager", 9093),
        }
    }

    /// The name used on the command line.
    pub const fn name(self) -> &'static str {
        self.entry().0
    }

    /// The documented number.
    pub const fn default_number(self) -> u16 {
        self.entry().1
    }

    /// The port with that name.
    pub fn named(name: &str) -> Option<Port> {
        Port::ALL.into_iter().find(|port| port.name() == name)
    }
}

/// A number for each [`Port`].
#[derive(Debug)]
pub struct Ports {
    numbers: [u16; Port::ALL.len()],
    reserved: Vec<Reserved>,
}

impl Ports {
    /// The documented numbers.
    pub fn documented() -> Ports {
        Ports { numbers: Port::ALL.map(Port::default_number), reserved: Vec::new() }
    }

    /// Free numbers, reserved among users of this crate until the value is dropped.
    ///
    /// # Errors
    /// [`Error::NoFreePort`], or [`Error::Io`] if a reservation file can't be locked.
    pub fn free() -> Result<Ports> {
        let reserved = Port::ALL.iter().map(|_| Reserved::any()).collect::<Result<Vec<_>>>()?;
        let mut ports = Ports::documented();
        for (number, reserved) in ports.numbers.iter_mut().zip(&reserved) {
            *number = reserved.number();
        }
        ports.reserved = reserved;
        Ok(ports)
    }

    /// The number of the port.
    pub fn get(&self, port: Port) -> u16 {
        self.numbers.get(port as usize).copied().unwrap_or_else(|| port.default_number())
    }

    /// Sets the number of the port.
    pub fn set(&mut self, port: Port, number: u16) {
        if let Some(slot) = self.numbers.get_mut(port as usize) {
            *slot = number;
        }
    }

    /// `127.0.0.1:NUMBER`
    pub(crate) fn address(&self, port: Port) -> String {
        format!("127.0.0.1:{}", self.get(port))
    }

    /// `http://127.0.0.1:NUMBER`
    pub(crate) fn url(&self, port: Port) -> String {
        format!("http://{}", self.address(port))
    }

    /// Checks that no process listens on any of the ports.
    ///
    /// # Errors
    /// [`Error::PortTaken`] with the first port in use.
    pub(crate) fn check_free(&self) -> Result<()> {
        match Port::ALL.into_iter().find(|port| !can_bind(self.get(*port))) {
            Some(port) => Err(Error::PortTaken { port: self.get(port), name: port.name() }),
            None => Ok(()),
        }
    }
}

/// A free port. A locked file reserves it among the users of this crate on this machine, until the value is dropped or the process ends.
///
/// Ports come from below the system's ephemeral range, so that no outgoing connection and no listener on port 0 takes the port while its
/// component is stopped.
#[derive(Debug)]
pub struct Reserved {
    number: u16,
    _lock: File,
}

// Tests use ports 30000 to 32699: above those of a `dev` that runs at the same time (its own, and 20000 to 29999 for instances), below Linux's
// ephemeral range. The first part is for single ports, the second for ranges.
const FROM: u16 = 30_000;
const TO: u16 = 31_000;
const ROWS_TO: u16 = 32_680;

/// A range of ports for the instances of one directory, reserved like a [`Reserved`] port.
#[derive(Debug)]
pub struct Row {
    first: u16,
    _lock: File,
}

impl Row {
    /// The number of ports in the range.
    pub const LENGTH: u16 = 40;

    /// Reserves a range.
    ///
    /// # Errors
    /// [`Error::NoFreePort`], or [`Error::Io`] if a reservation file can't be locked.
    pub fn any() -> Result<Row> {
        for first in (TO..ROWS_TO).step_by(usize::from(Row::LENGTH)) {
            if let Some(lock) = lock(&format!("{first}-row"))? {
                return Ok(Row { first, _lock: lock });
            }
        }
        Err(Error::NoFreePort { from: TO, to: ROWS_TO })
    }

    /// The port numbers.
    pub fn numbers(&self) -> RangeInclusive<u16> {
        self.first..=self.first + (Row::LENGTH - 1)
    }
}

impl Reserved {
    /// Reserves a port.
    ///
    /// # Errors
    /// [`Error::NoFreePort`], or [`Error::Io`] if a reservation file can't be locked.
    pub fn any() -> Result<Reserved> {
        let span = u32::from(TO - FROM);
        // Processes start at different offsets, so that they rarely compete for a port.
        let start = process::id().wrapping_mul(97) % span;
        for step in 0..span {
            let offset = (start + step) % span;
            let Ok(offset) = u16::try_from(offset) else { continue };
            let number = FROM + offset;
            if let Some(lock) = lock(&number.to_string())?
                && can_bind(number)
            {
                return Ok(Reserved { number, _lock: lock });
            }
        }
        Err(Error::NoFreePort { from: FROM, to: TO })
    }

    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

/// Locks the file `name`; `None` if another process has locked it.
fn lock(name: &str) -> Result<Option<File>> {
    let dir = lock_dir();
    create_dir(&dir)?;
    let path = dir.join(name);
    let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(source)) => Err(Error::Io { doing: format!("lock {}", path.display()), source }),
    }
}

fn lock_dir() -> PathBuf {
    std::env::temp_dir().join(format!("gauntlet-ports-{}", rustix::process::getuid().as_raw()))
}

fn can_bind(port: u16) -> bool {
    TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn all_lists_the_ports_in_order() {
        for (place, port) in Port::ALL.into_iter().enumerate() {
            assert_eq!(port as usize, place);
            assert_eq!(Port::named(port.name()), Some(port));
        }
        let numbers: HashSet<u16> = Port::ALL.into_iter().map(Port::default_number).collect();
        assert_eq!(numbers.len(), Port::ALL.len(), "two documented ports are equal");
    }

    #[test]
    fn free_ports_are_distinct() {
        let one = Ports::free().unwrap();
        let two = Ports::free().unwrap();
        let all: HashSet<u16> = Port::ALL.into_iter().flat_map(|port| [one.get(port), two.get(port)]).collect();
        assert_eq!(all.len(), 2 * Port::ALL.len());
    }

    #[test]
    fn ranges_overlap_neither_each_other_nor_single_ports() {
        let (one, two, port) = (Row::any().unwrap(), Row::any().unwrap(), Reserved::any().unwrap());
        let all: HashSet<u16> = one.numbers().chain(two.numbers()).chain([port.number()]).collect();
        assert_eq!(all.len(), 2 * usize::from(Row::LENGTH) + 1);
        assert!(all.iter().all(|number| (FROM..ROWS_TO).contains(number)), "{all:?}");
    }

    #[test]
    fn error_names_a_port_in_use() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ports = Ports::free().unwrap();
        ports.set(Port::Prometheus, listener.local_addr().unwrap().port());
        let error = ports.check_free().unwrap_err().to_string();
        assert!(error.contains("(prometheus) is in use"), "{error}");
    }
}
