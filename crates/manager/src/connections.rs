//! The connections of one port: accepted up to a bound, watched, and closed when the manager stops.
//!
//! A client can hold on to a connection without using it in three ways: by not finishing a request's head, by not reading an answer, and by
//! going away without a word. Each has its limit here; each refusal is counted.

mod watch;

use std::{convert::Infallible, future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::{IntoResponse as _, Response},
};
use gauntlet_telemetry::instruments;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use self::watch::Watch;
use crate::tasks::Tasks;

/// At a stop: how long a connection without a call may take to say goodbye, and a half-sent head to become a call.
const CLOSE_WITHIN: Duration = Duration::from_millis(500);
/// How often connections look whether they may close at a stop.
const CLOSE_EVERY: Duration = Duration::from_millis(50);
/// How long the operating system's refusal to accept (too many open files) is waited out.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);
/// How long a client may take to answer a ping.
const PONG_WITHIN: Duration = Duration::from_secs(20);

/// What the clients of a port may use up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections at once.
    pub(crate) connections: usize,
    /// Calls at once, over all connections.
    pub(crate) calls: usize,
    /// How long the head of a request may take; also how long a connection of HTTP/1 may be idle.
    pub(crate) header_timeout: Duration,
    /// How long an answer may wait for its reader.
    pub(crate) stall_timeout: Duration,
    /// How long a connection of HTTP/2 may be silent before it is sent a ping.
    pub(crate) keepalive: Duration,
}

/// A port: whom it serves and how.
#[derive(Clone)]
pub(crate) struct Port {
    /// Its name on metrics and in logs.
    pub(crate) name: &'static str,
    pub(crate) limits: Limits,
    pub(crate) router: Router,
    /// Whether a request is answered however many calls there are: a health check.
    pub(crate) exempt: fn(&Request) -> bool,
    /// The answer to a call beyond the bound.
    pub(crate) overloaded: fn(&Request) -> Response,
    pub(crate) refusals: instruments::Server,
}

impl Port {
    fn refused(&self, reason: &'static str) {
        self.refusals.record_refusal(self.name, reason);
        tracing::debug!(server = self.name, reason, "refused a client");
    }
}

/// Accepts connections until `stop`; each is a task of its own, which ends soon after.
pub(crate) async fn accept(tasks: Tasks, port: Port, listener: TcpListener, stop: CancellationToken) {
    let connections = Arc::new(Semaphore::new(port.limits.connections));
    let calls = Arc::new(Semaphore::new(port.limits.calls));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_of_the_client(&error) => continue,
            Err(error) => {
                port.refused("accept_failed");
                tracing::error!(server = port.name, %error, "cannot accept connections; will try again");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let Ok(slot) = connections.clone().try_acquire_owned() else {
            port.refused("connections");
            continue;
        };
        // Answers are written whole: waiting for more to send only delays them.
        let _ = stream.set_nodelay(true);
        let (port, calls, executor) = (port.clone(), calls.clone(), tasks.clone());
        tasks.background("connection", |stop| async move {
            if let Some(reason) = connection(&port, calls, executor, stream, stop).await {
                port.refused(reason);
            }
            drop(slot);
        });
    }
}

/// The client is gone before it was accepted.
fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves one connection to its end; returns why the client was refused, if it was.
async fn connection(
    port: &Port,
    calls: Arc<Semaphore>,
    executor: Tasks,
    stream: TcpStream,
    stop: CancellationToken,
) -> Option<&'static str> {
    let limits = port.limits;
    let watch = Watch::default();
    let mut builder = auto::Builder::new(executor);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(PONG_WITHIN.min(limits.keepalive));
    let service = service_fn(|request| call(port.clone(), calls.clone(), watch.clone(), request));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(watch.stream(stream)), service));

    // Until it is clear which HTTP it speaks nothing else bounds its silence.
    let mut silence = pin!(tokio::time::sleep(limits.header_timeout));
    let mut silence_over = false;
    let mut check = tokio::time::interval(limits.stall_timeout.div_f64(4.0).max(Duration::from_millis(1)));
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = false;
    let mut idle_since = None;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                let late = ended.err().is_some_and(|error| is_timeout(error.as_ref()));
                return (late && watch.in_head()).then_some("header_timeout");
            }
            () = &mut silence, if !silence_over => {
                silence_over = true;
                if !watch.has_spoken() {
                    return Some("header_timeout");
                }
            }
            _ = check.tick() => {
                if watch.stalled(limits.stall_timeout) {
                    return Some("stalled_reader");
                }
                if stopping && watch.calls() == 0 {
                    if idle_since.get_or_insert_with(Instant::now).elapsed() >= CLOSE_WITHIN {
                        return None;
                    }
                } else {
                    idle_since = None;
                }
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
                check = tokio::time::interval(CLOSE_EVERY.min(check.period()));
            }
        }
    }
}

fn is_timeout(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_timeout)
}

async fn call(
    port: Port,
    calls: Arc<Semaphore>,
    watch: Watch,
    request: hyper::Request<Incoming>,
) -> Result<Response, Infallible> {
    let call = watch.begin(request.version());
    let request = request.map(Body::new);
    let permit = match calls.try_acquire_owned() {
        Ok(permit) => Some(permit),
        Err(_) if (port.exempt)(&request) => None,
        Err(_) => {
            port.refused("calls");
            return Ok((port.overloaded)(&request).into_response());
        }
    };
    let response = port.router.oneshot(request).await?;
    // The call goes on until its answer has been read.
    Ok(response.map(|body| Body::new(call.answer(body, permit))))
}

/// So that the streams of HTTP/2 are tasks of the manager too.
impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        self.background("stream", |_| stream);
    }
}

#[cfg(test)]
mod tests;
