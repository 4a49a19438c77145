//! Runs etcd: one member or a cluster.

use std::path::Path;

use crate::ports::Reserved;
use crate::{Process, Ready, Result, Spec, Tool, Tools, create_dir};

/// One etcd member without TLS or authentication, on loopback.
#[derive(Debug)]
pub struct Etcd {
    /// The member's process.
    pub process: Process,
    client_port: u16,
    _reserved: Vec<Reserved>,
}

impl Etcd {
    /// Starts a cluster of one member on free ports and waits until it is ready. Its data and log are in `dir`; starting it again with the
    /// same directory keeps the data.
    ///
    /// # Errors
    /// [`crate::Error::Missing`] if there is no etcd binary, and the errors of [`Process::run`].
    pub fn start(dir: impl AsRef<Path>) -> Result<Etcd> {
        let (client, peer) = (Reserved::any()?, Reserved::any()?);
        let mut etcd = Etcd::start_on(dir, client.number(), peer.number())?;
        etcd._reserved = vec![client, peer];
        Ok(etcd)
    }

    /// Starts a cluster of one member on the given loopback ports and waits until it is ready.
    ///
    /// # Errors
    /// As [`Etcd::start`].
    pub fn start_on(dir: impl AsRef<Path>, client_port: u16, peer_port: u16) -> Result<Etcd> {
        let mut etcd = member(dir.as_ref(), "m0", client_port, peer_port, &peer_of("m0", peer_port))?;
        etcd.process.wait_ready()?;
        Ok(etcd)
    }

    /// Starts a cluster of `size` members on free ports and waits until all are ready. The directory of each is `dir/mN`.
    ///
    /// # Errors
    /// As [`Etcd::start`].
    pub fn cluster(dir: impl AsRef<Path>, size: usize) -> Result<Vec<Etcd>> {
        let mut planned = Vec::with_capacity(size);
        for index in 0..size {
            planned.push((format!("m{index}"), Reserved::any()?, Reserved::any()?));
        }
        let peers: Vec<String> = planned.iter().map(|(name, _, peer)| peer_of(name, peer.number())).collect();
        let peers = peers.join(",");
        let mut members = Vec::with_capacity(size);
        for (name, client, peer) in planned {
            let mut etcd = member(&dir.as_ref().join(&name), &name, client.number(), peer.number(), &peers)?;
            etcd._reserved = vec![client, peer];
            members.push(etcd);
        }
        // Waiting starts once all members are started: a member is healthy only if a majority runs.
        members.iter_mut().try_for_each(|member| member.process.wait_ready())?;
        Ok(members)
    }

    /// `http://127.0.0.1:PORT`, for clients.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }
}

fn peer_of(name: &str, port: u16) -> String {
    format!("{name}=http://127.0.0.1:{port}")
}

fn member(dir: &Path, name: &str, client_port: u16, peer_port: u16, peers: &str) -> Result<Etcd> {
    create_dir(dir)?;
    let (client, peer) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut data_dir = std::ffi::OsString::from("--data-dir=");
    data_dir.push(dir.join("data"));
    let spec = Spec::new(
        &format!("etcd {name}"),
        Tools::from_env().require(Tool::Etcd)?,
        dir.join("etcd.log"),
        Ready::Http(format!("{client}/health")),
    )
    .arg(format!("--name={name}"))
    .arg(data_dir)
    .arg(format!("--listen-client-urls={client}"))
    .arg(format!("--advertise-client-urls={client}"))
    .arg(format!("--listen-peer-urls={peer}"))
    .arg(format!("--initial-advertise-peer-urls={peer}"))
    .arg(format!("--initial-cluster={peers}"))
    .arg("--initial-cluster-token=gauntlet")
    // Without compaction, etcd keeps every revision, and scans slow down.
    .arg("--auto-compaction-mode=periodic")
    .arg("--auto-compaction-retention=10m")
    .arg("--logger=zap");
    Ok(Etcd { process: Process::spawn(spec)?, client_port, _reserved: Vec::new() })
}
