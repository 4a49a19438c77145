//! Which instance has which port of this machine.
//!
//! A reservation is a symbolic link named by the port that leads to the owner's directory: it appears whole or not at all. Reservations
//! change under one lock, so that managers that share the directory never take the same port.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::{IpAddr, TcpListener, UdpSocket},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gauntlet_domain::{Error, PortSpec, Protocol, Result};

use super::{
    home,
    record::{self, LABEL, Label},
};

/// For how long to wait for others that reserve ports; each takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const STEP: &str = "allocate";

/// The ports of one directory.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    pub(super) dir: PathBuf,
    pub(super) instances: PathBuf,
    pub(super) range: RangeInclusive<u16>,
    pub(super) bind: IpAddr,
}

impl Ports {
    /// Reserves a port for each name, the one it had `before` if that can be had; if it is `running`, it listens there itself. Blocks.
    pub(super) fn assign(
        &self,
        key: &str,
        specs: &[PortSpec],
        before: &BTreeMap<String, u16>,
        running: bool,
    ) -> Result<BTreeMap<String, u16>> {
        if specs.is_empty() {
            return Ok(BTreeMap::new());
        }
        let _lock = self.lock()?;
        let mut assigned = BTreeMap::new();
        for spec in specs {
            let port = match before.get(&spec.name) {
                Some(port) if running && owner(&self.link(*port)).as_deref() == Some(key) => *port,
                Some(port) if self.take(key, *port, spec.protocol)? => *port,
                _ => self.pick(key, spec)?,
            };
            assigned.insert(spec.name.clone(), port);
        }
        Ok(assigned)
    }

    /// Gives back every port of that owner but those. Blocks.
    pub(super) fn release(&self, key: &str, keep: &BTreeMap<String, u16>) -> Result<()> {
        let list = || -> io::Result<()> {
            for entry in std::fs::read_dir(&self.dir)? {
                let path = entry?.path();
                let port: Option<u16> = path.file_name().and_then(|name| name.to_str()?.parse().ok());
                let kept = port.is_some_and(|port| keep.values().any(|kept| *kept == port));
                if !kept && owner(&path).as_deref() == Some(key) {
                    record::remove(&path)?;
                }
            }
            Ok(())
        };
        list().map_err(home::failed(STEP, "giving back ports"))
    }

    fn pick(&self, key: &str, spec: &PortSpec) -> Result<u16> {
        let (first, last) = (u32::from(*self.range.start()), u32::from(*self.range.end()));
        let count = (last + 1).saturating_sub(first);
        // Begins somewhere else for each, so that those that are taken are seldom met.
        let begin = key
            .bytes()
            .chain(spec.name.bytes())
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        for step in 0..count {
            let port = u16::try_from(first + (begin % count + step) % count).unwrap_or(*self.range.end());
            // One that another name of the same instance has is not free either.
            if std::fs::symlink_metadata(self.link(port)).is_ok_and(|_| owner(&self.link(port)).as_deref() == Some(key))
            {
                continue;
            }
            if self.take(key, port, spec.protocol)? {
                return Ok(port);
            }
        }
        Err(Error::Provision {
            step: STEP,
            detail: format!("no free port from {first} to {last} for {:?}: all {count} are taken", spec.name),
        })
    }

    /// Takes the port if nobody has it and nothing listens there.
    fn take(&self, key: &str, port: u16, protocol: Protocol) -> Result<bool> {
        let link = self.link(port);
        let reserve = || -> io::Result<bool> {
            match owner(&link) {
                Some(other) if other == key => {}
                Some(other) if self.still_there(&other) => return Ok(false),
                Some(_) => {
                    record::remove(&link)?;
                    std::os::unix::fs::symlink(Path::new("../instances").join(key), &link)?;
                }
                None => std::os::unix::fs::symlink(Path::new("../instances").join(key), &link)?,
            }
            let free = match protocol {
                Protocol::Tcp => TcpListener::bind((self.bind, port)).map(drop),
                Protocol::Udp => UdpSocket::bind((self.bind, port)).map(drop),
            };
            if free.is_err() {
                record::remove(&link)?;
            }
            Ok(free.is_ok())
        };
        reserve().map_err(home::failed(STEP, format!("reserving port {port}")))
    }

    fn still_there(&self, key: &str) -> bool {
        match record::read::<Label>(&self.instances.join(key), LABEL) {
            Ok(Some(label)) => !label.gone,
            Ok(None) => false,
            // What cannot be read may well be running.
            Err(_) => true,
        }
    }

    fn link(&self, port: u16) -> PathBuf {
        self.dir.join(port.to_string())
    }

    fn lock(&self) -> Result<File> {
        let deadline = Instant::now() + PATIENCE;
        let failed = home::failed(STEP, "locking the ports");
        let file = match File::open(&self.dir) {
            Ok(file) => file,
            Err(error) => return Err(failed(error)),
        };
        loop {
            match record::try_lock(&file) {
                Ok(true) => return Ok(file),
                Ok(false) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(false) => return Err(failed(io::ErrorKind::TimedOut.into())),
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// The key that a reservation leads to.
fn owner(link: &Path) -> Option<String> {
    Some(std::fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}
