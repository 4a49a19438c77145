//! A listening socket of any kind, and the connections that it accepts.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Result, anyhow};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixStream},
};
use tokio_rustls::TlsAcceptor;

use super::{Endpoint, tls::Certificates, unix::UnixSocket};
use crate::peer::{ClientCertificate, PeerAddress};

/// A byte stream to a client, decrypted.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A listening socket.
pub(crate) enum Socket {
    Tcp(TcpListener),
    Tls(TcpListener, Certificates),
    Unix(UnixSocket),
}

/// A connection that has been accepted, before any byte has been exchanged.
pub(crate) struct Accepted {
    pub(crate) address: PeerAddress,
    stream: Raw,
}

enum Raw {
    Tcp(TcpStream),
    Tls(TcpStream, TlsAcceptor),
    Unix(UnixStream),
}

impl Socket {
    /// Listens. `name` is what is served there, for errors. TLS needs `certificates`.
    ///
    /// # Errors
    /// The address or path cannot be used; the text says what to do.
    pub(crate) async fn bind(endpoint: &Endpoint, name: &str, certificates: Option<Certificates>) -> Result<Self> {
        Ok(match endpoint {
            Endpoint::Tcp(address) => Self::Tcp(bind(*address, name).await?),
            Endpoint::Tls(address) => {
                let certificates = certificates.ok_or_else(|| anyhow!("{endpoint} has no certificate"))?;
                Self::Tls(bind(*address, name).await?, certificates)
            }
            Endpoint::Unix { path, mode } => Self::Unix(UnixSocket::bind(path, *mode)?),
        })
    }

    /// The bound address, with the actual port; `None` for unix sockets.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Waits for a connection.
    ///
    /// # Cancel safety
    /// If the future is dropped, no connection is lost.
    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        let (stream, address) = match self {
            Self::Unix(socket) => {
                let (stream, address) = socket.accept().await?;
                return Ok(Accepted { address, stream: Raw::Unix(stream) });
            }
            Self::Tcp(listener) | Self::Tls(listener, _) => listener.accept().await?,
        };
        // Responses are written whole: Nagle's algorithm would only delay them.
        let _ = stream.set_nodelay(true);
        let stream = match self {
            Self::Tls(_, certificates) => Raw::Tls(stream, certificates.acceptor()),
            _ => Raw::Tcp(stream),
        };
        Ok(Accepted { address: PeerAddress::Tcp(address), stream })
    }
}

impl Accepted {
    /// Completes the TLS handshake, if there is one, within `timeout`. Returns the stream, and the client's certificate.
    ///
    /// # Errors
    /// The handshake failed; the text is the reason for the metric.
    pub(crate) async fn handshake(
        self,
        timeout: Duration,
    ) -> Result<(Box<dyn Duplex>, Option<ClientCertificate>), &'static str> {
        let (stream, acceptor) = match self.stream {
            Raw::Tcp(stream) => return Ok((Box::new(stream), None)),
            Raw::Unix(stream) => return Ok((Box::new(stream), None)),
            Raw::Tls(stream, acceptor) => (stream, acceptor),
        };
        let stream = match tokio::time::timeout(timeout, acceptor.accept(stream)).await {
            Err(_) => return Err("handshake_timeout"),
            Ok(Err(error)) => {
                tracing::debug!(peer = %self.address, %error, "TLS handshake failed");
                return Err("handshake_failed");
            }
            Ok(Ok(stream)) => stream,
        };
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.map(|certificate| ClientCertificate::new(certificate.as_ref()));
        Ok((Box::new(stream), certificate))
    }
}

async fn bind(address: SocketAddr, name: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => anyhow!(
            "cannot listen on {address} for the {name}: address in use; stop the process using it (`ss -ltnp sport = :{}`) or choose another port",
            address.port()
        ),
        _ => anyhow!("cannot listen on {address} for the {name}: {error}"),
    })
}
