//! Unix sockets: created with their permission bits, and removed when the manager stops.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::net::{UnixListener, UnixStream};

use crate::peer::PeerAddress;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A listening unix socket. Its file is removed when this is dropped, unless another one has taken its place.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl UnixSocket {
    /// Listens on `path`. A socket that nobody listens on, left behind by a crash, is replaced.
    ///
    /// # Errors
    /// A process listens on it, the path is another kind of file, or its directory cannot be written; the text says what to do.
    pub(super) fn bind(path: &Path, mode: u32) -> Result<Self> {
        check_free(path)?;
        let cannot = || format!("cannot listen on unix://{}; the directory must exist and be writable", path.display());
        // Under a name of its own until it has its permission bits; the rename replaces a stale socket in one step.
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let _ = fs::remove_file(&new);
        let bound = bind(&new, mode).and_then(|listener| {
            fs::rename(&new, path)?;
            let metadata = fs::symlink_metadata(path)?;
            Ok(Self { listener, path: path.to_owned(), file: (metadata.dev(), metadata.ino()) })
        });
        if bound.is_err() {
            let _ = fs::remove_file(&new);
        }
        bound.with_context(cannot)
    }

    /// Accepts a connection, with the process at its other end.
    ///
    /// # Cancel safety
    /// If the future is dropped, no connection is lost.
    pub(super) async fn accept(&self) -> io::Result<(UnixStream, PeerAddress)> {
        let (stream, _) = self.listener.accept().await?;
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok());
        Ok((stream, PeerAddress::Unix { uid: credentials.uid(), pid }))
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn check_free(path: &Path) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot listen on unix://{shown}")),
        Ok(file) if !file.file_type().is_socket() => {
            bail!(
                "cannot listen on unix://{shown}: the file exists and is not a socket; remove it or choose another path"
            )
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
            Ok(_) => bail!(
                "cannot listen on unix://{shown}: address in use; stop the process listening on it (`ss -lxp`) or choose another path"
            ),
            Err(error) => Err(error).with_context(|| format!("cannot listen on unix://{shown}")),
        },
    }
}

fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before `listen`.
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn socket_has_its_mode_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        for bits in [0o600, 0o666] {
            let socket = UnixSocket::bind(&path, bits).unwrap();
            assert_eq!(mode(&path), bits);
            drop(socket);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[tokio::test]
    async fn peer_is_the_process_at_the_other_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let socket = UnixSocket::bind(&path, 0o600).unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        let (_, peer) = socket.accept().await.unwrap();
        let uid = rustix::process::getuid().as_raw();
        assert_eq!(peer, PeerAddress::Unix { uid, pid: Some(std::process::id()) });
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_a_used_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = UnixSocket::bind(&path, 0o600).unwrap();
        let error = UnixSocket::bind(&path, 0o600).unwrap_err().to_string();
        assert!(error.contains("address in use") && error.contains("ss -lxp"), "{error}");
        UnixStream::connect(&path).await.unwrap();
        // The socket of a manager that has taken over stays.
        fs::remove_file(&path).unwrap();
        let successor = UnixSocket::bind(&path, 0o600).unwrap();
        drop(socket);
        UnixStream::connect(&path).await.unwrap();
        drop(successor);
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        fs::write(&path, "kept").unwrap();
        let error = UnixSocket::bind(&path, 0o600).unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
        let error = format!("{:#}", UnixSocket::bind(&dir.path().join("none/api.sock"), 0o600).unwrap_err());
        assert!(error.contains("the directory must exist"), "{error}");
    }
}
