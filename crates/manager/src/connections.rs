//! Accepts the connections of one port up to a limit, and closes them when the manager stops.
//!
//! A client can occupy a connection without using it: it doesn't finish the headers of a request, doesn't read a response, or has vanished.
//! Each of these has a timeout. Clients that are refused or cut off are counted.

mod activity;
mod headers;
mod peers;

use std::{convert::Infallible, future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use gauntlet_telemetry::instruments;
use http::{HeaderMap, header::AUTHORIZATION};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt as _;

pub(crate) use self::peers::PeerLimits;
use self::{activity::Activity, peers::Peers};
use crate::{
    listen::socket::{Accepted, Socket},
    origin::OriginPolicy,
    peer::{Peer, Policy},
    refusal::Refusal,
    status,
    tasks::Tasks,
};

/// At shutdown: how long to wait for an idle connection to close, and for half-sent headers to become a call.
const IDLE_CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// At shutdown: how often a connection checks whether it is idle.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// The pause after a failed accept (too many open files), so that the loop doesn't spin.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(200);
/// How long a client may take to answer a ping, at most.
const MAX_PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How many calls of one HTTP/2 connection run at once. A client with more keeps them until others have ended.
const MAX_STREAMS: u32 = 200;
/// How many streams a client may reset before the server has seen them: an attack resets them at once.
const MAX_UNSEEN_RESETS: usize = 20;
/// When a call that is refused for lack of capacity may be tried again.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Limits on the clients of one port.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Open connections.
    pub(crate) connections: usize,
    /// Concurrent calls, over all connections.
    pub(crate) calls: usize,
    pub(crate) peer: PeerLimits,
    /// How long a client may take to send the headers of a request; also how long an HTTP/1 connection may be idle.
    pub(crate) header_timeout: Duration,
    /// How long a client may stop reading a response.
    pub(crate) stall_timeout: Duration,
    /// How long an HTTP/2 connection may be silent before it is pinged.
    pub(crate) keepalive: Duration,
}

/// What one port serves, and within which limits.
#[derive(Clone)]
pub(crate) struct Port {
    /// The value of `server` in metrics and logs.
    pub(crate) name: &'static str,
    pub(crate) limits: Limits,
    pub(crate) policy: Policy,
    /// Whether what clients send can be read on the network.
    pub(crate) exposed: bool,
    pub(crate) router: Router,
    /// Whether the limit on calls doesn't apply to a request: health checks.
    pub(crate) is_exempt: fn(&Request) -> bool,
    /// The response to a call that is refused before the router sees it, in the protocol of the request.
    pub(crate) refuse: fn(&Request, Status) -> Response,
    pub(crate) origins: OriginPolicy,
    pub(crate) refusals: instruments::Server,
}

impl Port {
    fn refused(&self, reason: &'static str) {
        self.refusals.record_refusal(self.name, reason);
        tracing::debug!(server = self.name, reason, "refused a client");
    }

    /// Refuses credentials that could be read on the network: accepting them would make callers think that they are safe.
    fn check_secrecy(&self, peer: &Peer, headers: &HeaderMap) -> Result<(), Refusal> {
        if !self.exposed || peer.address.is_loopback() || !headers.contains_key(AUTHORIZATION) {
            return Ok(());
        }
        let status = gauntlet_api::error::plaintext_credentials();
        Err(Refusal { reason: "plaintext_credentials", status })
    }
}

/// What the connections of one listener share.
#[derive(Clone)]
struct Shared {
    port: Port,
    calls: Arc<Semaphore>,
    peers: Peers,
}

/// Accepts connections until `stop` is cancelled. Each connection is a task of its own, which closes it once its calls have ended.
pub(crate) async fn accept(tasks: Tasks, port: Port, socket: Socket, stop: CancellationToken) {
    let connections = Arc::new(Semaphore::new(port.limits.connections));
    let calls = Arc::new(Semaphore::new(port.limits.calls));
    let shared = Shared { calls, peers: Peers::new(port.limits.peer), port };
    let port = &shared.port;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_client_gone(&error) => continue,
            Err(error) => {
                port.refused("accept_failed");
                tracing::error!(server = port.name, %error, "cannot accept connections; retrying");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        let Ok(slot) = connections.clone().try_acquire_owned() else {
            port.refused("connections");
            continue;
        };
        let Some(connected) = shared.peers.connect(accepted.address) else {
            port.refused("peer_connections");
            continue;
        };
        let (shared, executor) = (shared.clone(), tasks.clone());
        tasks.spawn("connection", |stop| async move {
            if let Some(reason) = serve_connection(&shared, executor, accepted, stop).await {
                shared.port.refused(reason);
            }
            drop((slot, connected));
        });
    }
}

/// Whether the client closed the connection before it was accepted.
fn is_client_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves one connection until it is closed. Returns why the client was cut off, if it was.
async fn serve_connection(
    shared: &Shared,
    executor: Tasks,
    accepted: Accepted,
    stop: CancellationToken,
) -> Option<&'static str> {
    let (port, limits) = (&shared.port, shared.port.limits);
    let address = accepted.address;
    let handshake = accepted.handshake(limits.header_timeout);
    let (stream, certificate) = tokio::select! {
        () = stop.cancelled() => return None,
        done = handshake => match done {
            Ok(done) => done,
            Err(reason) => return Some(reason),
        },
    };
    let peer = Peer { address, certificate, policy: port.policy };
    let activity = Activity::default();
    let mut builder = auto::Builder::new(executor);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(headers::MAX_PARSED)
        .max_buf_size(headers::MAX_BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(headers::MAX_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_UNSEEN_RESETS)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(MAX_PING_TIMEOUT.min(limits.keepalive));
    let service = service_fn(|request| serve_call(shared.clone(), activity.clone(), peer.clone(), request));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(activity.stream(stream)), service));

    // hyper applies its own timeouts only once it knows the version of HTTP.
    let mut first_bytes_deadline = pin!(tokio::time::sleep(limits.header_timeout));
    let mut first_bytes_checked = false;
    let mut check = tokio::time::interval(limits.stall_timeout.div_f64(4.0).max(Duration::from_millis(1)));
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = false;
    let mut idle_since = None;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                return match ended.err().map(|error| fault(error.as_ref()))? {
                    Fault::Timeout => activity.is_reading_headers().then_some("header_timeout"),
                    Fault::TooLarge => Some("headers"),
                    Fault::Excess => Some("rapid_reset"),
                    Fault::Other => None,
                };
            }
            () = &mut first_bytes_deadline, if !first_bytes_checked => {
                first_bytes_checked = true;
                if !activity.has_sent_preface() {
                    return Some("header_timeout");
                }
            }
            () = activity.abused() => return Some("rapid_reset"),
            _ = check.tick() => {
                if activity.is_stalled(limits.stall_timeout) {
                    return Some("stalled_reader");
                }
                if stopping && activity.calls() == 0 {
                    if idle_since.get_or_insert_with(Instant::now).elapsed() >= IDLE_CLOSE_TIMEOUT {
                        return None;
                    }
                } else {
                    idle_since = None;
                }
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
                check = tokio::time::interval(IDLE_CHECK_INTERVAL.min(check.period()));
            }
        }
    }
}

/// What a client did wrong, if its connection ended with an error.
enum Fault {
    Timeout,
    /// Headers beyond what is read.
    TooLarge,
    /// More resets of HTTP/2 streams than a client needs.
    Excess,
    Other,
}

fn fault(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Fault {
    let Some(error) = error.downcast_ref::<hyper::Error>() else { return Fault::Other };
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>());
    if source.and_then(h2::Error::reason) == Some(h2::Reason::ENHANCE_YOUR_CALM) {
        Fault::Excess
    } else if error.is_parse_too_large() {
        Fault::TooLarge
    } else if error.is_timeout() {
        Fault::Timeout
    } else {
        Fault::Other
    }
}

async fn serve_call(
    Shared { port, calls, peers }: Shared,
    activity: Activity,
    peer: Peer,
    request: hyper::Request<Incoming>,
) -> Result<Response, Infallible> {
    let call = activity.begin_call(request.version());
    let mut request = request.map(Body::new);
    // The call ends when its response has been read.
    let answer = |response: Response, permit| response.map(|body| Body::new(call.response(body, permit)));
    let checked = headers::check(&request)
        .and_then(|()| port.origins.check(&request))
        .and_then(|()| port.check_secrecy(&peer, request.headers()));
    if let Err(Refusal { reason, status }) = checked {
        port.refused(reason);
        return Ok(answer((port.refuse)(&request, status), None));
    }
    if let Err(delay) = peers.call(peer.address, Instant::now()) {
        port.refused("peer_calls");
        return Ok(answer(
            (port.refuse)(&request, gauntlet_api::error::rate_exceeded("TOO_MANY_CALLS_OF_PEER", delay)),
            None,
        ));
    }
    let permit = match calls.try_acquire_owned() {
        Ok(permit) => Some(permit),
        Err(_) if (port.is_exempt)(&request) => None,
        Err(_) => {
            port.refused("calls");
            let status = gauntlet_api::error::overloaded("TOO_MANY_CALLS", RETRY_DELAY);
            return Ok(answer((port.refuse)(&request, status), None));
        }
    };
    request.extensions_mut().insert(peer);
    let response = port.router.clone().oneshot(request).await?;
    if let Some(reason) = response.extensions().get::<Status>().and_then(status::exceeded_limit) {
        port.refused(reason);
    }
    Ok(answer(response, permit))
}

/// Makes the streams of HTTP/2 tasks of the manager.
impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        self.spawn("stream", |_| stream);
    }
}

#[cfg(test)]
mod tests;
