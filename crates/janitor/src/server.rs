//! A server of the v1 API: its address, a channel to it, a call with a deadline.

use std::{error::Error as _, fmt, str::FromStr, time::Duration};

use gauntlet_telemetry::{
    Instruments,
    layers::{GrpcClientLayer, Observe},
};
use http::Uri;
use tonic::{
    Request, Status,
    transport::{ClientTlsConfig, Endpoint},
};
use tower::Layer as _;

/// A connection that is made when it is first needed, and again when it is lost. Each call has its CLIENT span, its measurement
/// and W3C context. Cheap to clone.
pub type Channel = Observe<tonic::transport::Channel, GrpcClientLayer>;

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The address of a server of the v1 API.
///
/// Read from `host:port`, `http://host[:port]` (80) or `https://host[:port]` (443, checked against the system's roots).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server(Uri);

/// Why a text is no [`Server`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}; give it as localhost:8080, http://localhost:8080 or https://example.org")]
pub struct NotServer {
    problem: &'static str,
}

/// Why there cannot be a channel, whether the server is there or not.
#[derive(Debug, thiserror::Error)]
#[error("TLS to {server} cannot be set up: {reason}")]
pub struct NotConnectable {
    server: String,
    reason: String,
}

impl FromStr for Server {
    type Err = NotServer;

    fn from_str(text: &str) -> Result<Self, NotServer> {
        let no = |problem| NotServer { problem };
        let bare = !text.contains("://");
        let uri: Uri = if bare { format!("http://{text}") } else { text.to_owned() }
            .parse()
            .map_err(|_| no("it is no address"))?;
        let authority = uri.authority().ok_or_else(|| no("it is no address"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(no("its scheme is neither http nor https"));
        }
        if authority.as_str().contains('@') {
            return Err(no("it has a user, which the API does not know"));
        }
        if authority.host().is_empty() {
            return Err(no("it has no host"));
        }
        // `Uri` lets a port that is no number pass as none.
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        if !port.is_empty() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err(no("its port is no number from 1 to 65535"));
        }
        if bare && port.is_empty() {
            return Err(no("it has no port"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(no("it has a path, which gRPC has no use for"));
        }
        Ok(Self(uri))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

impl Server {
    /// A channel to the server. Nothing is sent yet, so a server that is away shows at the first call (`UNAVAILABLE`).
    /// `agent` is how callers are named to it, as in `gauntlet-janitor/0.1.0`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the system's certificates cannot be read, for `https`.
    pub fn channel(&self, agent: &str, instruments: &Instruments) -> Result<Channel, NotConnectable> {
        let fail = |error: tonic::transport::Error| NotConnectable { server: self.to_string(), reason: causes(&error) };
        let mut endpoint =
            Endpoint::from(self.0.clone()).connect_timeout(CONNECT_WITHIN).user_agent(agent).map_err(fail)?;
        if self.0.scheme_str() == Some("https") {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(fail)?;
        }
        Ok(GrpcClientLayer::new(instruments, &self.0).layer(endpoint.connect_lazy()))
    }
}

/// A call that ends within `limit`: the server is told (`grpc-timeout`), and it is given up here when the time is over, with
/// `DEADLINE_EXCEEDED`. Covers whatever `call` awaits, a stream read to its end included. Dropping it cancels the call.
///
/// # Errors
/// What the call answers; where the transport itself failed, with the causes in the message.
pub async fn within<M, T>(
    limit: Duration,
    message: M,
    call: impl AsyncFnOnce(Request<M>) -> Result<T, Status>,
) -> Result<T, Status> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    let late = || Status::deadline_exceeded(format!("no answer within {limit:?}"));
    match tokio::time::timeout(limit, call(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        // The transport keeps the same deadline, and calls it so when it is first.
        Ok(Err(status)) if status.source().is_some_and(|source| source.is::<tonic::TimeoutExpired>()) => Err(late()),
        Ok(Err(status)) if status.source().is_some() => Err(with_causes(&status)),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(late()),
    }
}

fn with_causes(status: &Status) -> Status {
    let causes = status.source().map(causes).unwrap_or_default();
    Status::with_details(status.code(), causes, status.details().to_vec().into())
}

/// An error and its causes, without those that repeat the one before.
fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use gauntlet_telemetry::layers::code_name;
    use tonic::Code;

    use super::*;

    #[test]
    fn codes_as_grpc_writes_them() {
        assert_eq!(code_name(Code::DeadlineExceeded), "DEADLINE_EXCEEDED");
        assert_eq!(code_name(Code::Ok), "OK");
    }

    #[test]
    fn addresses() {
        for (text, shown) in [
            ("localhost:8080", "http://localhost:8080"),
            ("10.0.0.1:80", "http://10.0.0.1:80"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("http://manager:8080/", "http://manager:8080"),
            ("http://manager", "http://manager"),
            ("https://ctf.example.org", "https://ctf.example.org"),
        ] {
            assert_eq!(text.parse::<Server>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address_says_why() {
        for (text, problem) in [
            ("", "no address"),
            ("localhost", "no port"),
            ("[::1]", "no port"),
            ("localhost:http", "no number"),
            ("localhost:0", "no number"),
            ("localhost:70000", "no number"),
            (":8080", "no host"),
            ("ftp://localhost", "neither http nor https"),
            ("http://user:secret@localhost:8080", "has a user"),
            ("http://localhost:8080/api/v1", "has a path"),
            ("two words:1", "no address"),
        ] {
            let refused = text.parse::<Server>().unwrap_err().to_string();
            assert!(refused.contains(problem) && !refused.contains("secret"), "{text}: {refused}");
        }
    }
}
