//! Clients that occupy connections without using them, on real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{Extension, body::Bytes, routing::get};
use futures::stream;
use gauntlet_access::Scope;
use gauntlet_telemetry::Instruments;
use gauntlet_testing::eventually;
use http::StatusCode;
use opentelemetry_sdk::metrics::{
    InMemoryMetricExporter, SdkMeterProvider,
    data::{AggregatedMetrics, MetricData},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
};

use super::*;
use crate::{listen::Endpoint, origin::Hosts, peer::PeerAddress};

/// Longer than anything takes on a busy machine: only a real hang reaches it.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(100);

/// No timeout expires unless the test sets it.
const NO_TIMEOUTS: Limits = Limits {
    connections: 100,
    calls: 100,
    peer: PeerLimits { connections: 100, calls: 1000 },
    header_timeout: LONG,
    stall_timeout: LONG,
    keepalive: LONG,
};

struct Served {
    address: SocketAddr,
    tasks: Tasks,
    /// Lets one handler of `/waits` respond.
    release: Arc<Notify>,
    /// How many responses of `/endless` have not been dropped.
    streams: Arc<AtomicUsize>,
    metrics: SdkMeterProvider,
    exported: InMemoryMetricExporter,
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve(limits: Limits) -> Served {
    serve_origins(limits, OriginPolicy { hosts: Hosts::Any, ..OriginPolicy::default() }).await
}

async fn serve_origins(limits: Limits, origins: OriginPolicy) -> Served {
    serve_port(|port| Port { limits, origins, ..port }).await
}

async fn serve_port(change: impl FnOnce(Port) -> Port) -> Served {
    let (release, streams) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (released, counted) = (release.clone(), streams.clone());
    let endless = move || {
        counted.fetch_add(1, Ordering::SeqCst);
        let guard = Counted(counted.clone());
        let frames = stream::repeat_with(move || {
            let _ = &guard;
            Ok::<_, Infallible>(Bytes::from(vec![b'.'; 64 * 1024]))
        });
        async move { Body::from_stream(frames) }
    };
    let waits = move || {
        let released = released.clone();
        async move { released.notified().await }
    };
    let exported = InMemoryMetricExporter::default();
    let metrics = SdkMeterProvider::builder().with_periodic_exporter(exported.clone()).build();
    let router = Router::new()
        .route("/", get(async || "here"))
        .route("/healthcheck", get(async || "ok"))
        .route("/peer", get(peer))
        .route("/waits", get(waits))
        .route("/endless", get(endless));
    let port = Port { router, ..port(&metrics) };
    let tasks = Tasks::default();
    let socket = Socket::bind(&Endpoint::Tcp(([127, 0, 0, 1], 0).into()), "test", None).await.unwrap();
    let address = socket.address().unwrap();
    crate::server::serve(&tasks, socket, change(port));
    Served { address, tasks, release, streams, metrics, exported }
}

impl Served {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn connect_and_send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// Sends a request on a new connection and returns the head of the response, or nothing if the connection was closed.
    async fn get(&self, path: &str) -> String {
        read_head(&mut self.connect_and_send(request(path).as_bytes()).await).await
    }

    /// Waits until `count` refusals have been counted, all for `reason`.
    async fn wait_for_refusals(&self, reason: &str, count: u64) {
        let expected = BTreeMap::from([(reason.to_owned(), count)]);
        eventually(&format!("{expected:?}"), async || self.refusals() == expected).await;
    }

    /// The refusals counted so far, by reason.
    fn refusals(&self) -> BTreeMap<String, u64> {
        self.exported.reset();
        self.metrics.force_flush().unwrap();
        let mut refusals = BTreeMap::new();
        for resource in self.exported.get_finished_metrics().unwrap() {
            for metric in resource.scope_metrics().flat_map(|scope| scope.metrics()) {
                if let AggregatedMetrics::U64(MetricData::Sum(sum)) = metric.data() {
                    for point in sum.data_points() {
                        let reason = point.attributes().find(|attribute| attribute.key.as_str() == "reason");
                        refusals.insert(reason.unwrap().value.as_str().into_owned(), point.value());
                    }
                }
            }
        }
        refusals
    }

    async fn wait_for_streams(&self, count: usize) {
        eventually(&format!("{count} open streams"), async || self.streams.load(Ordering::SeqCst) == count).await;
    }
}

/// A port that serves nothing, without limits and checks.
fn port(metrics: &SdkMeterProvider) -> Port {
    Port {
        name: "test",
        limits: NO_TIMEOUTS,
        policy: Policy { anonymous: Some(Scope::Operate) },
        exposed: false,
        router: Router::new(),
        is_exempt: crate::server::is_health_check,
        refuse: crate::server::refuse,
        origins: OriginPolicy { hosts: Hosts::Any, ..OriginPolicy::default() },
        refusals: Instruments::new(metrics).server,
    }
}

async fn peer(Extension(peer): Extension<Peer>) -> String {
    format!("{} {:?} {}", peer.address, peer.policy.anonymous, peer.certificate.is_none())
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

/// Reads what has arrived, or nothing if the connection is closed.
async fn read_head(stream: &mut TcpStream) -> String {
    let mut buffer = vec![0; 4096];
    let read = tokio::time::timeout(LONG, stream.read(&mut buffer)).await.expect("a response, or a closed connection");
    buffer.truncate(read.unwrap_or_default());
    String::from_utf8_lossy(&buffer).into_owned()
}

/// Waits until the server has closed the connection.
async fn wait_until_closed(mut stream: TcpStream) {
    let reading = async { while !matches!(stream.read(&mut [0; 64 * 1024]).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(LONG, reading).await.expect("the connection to be closed");
}

#[tokio::test]
async fn requests_carry_their_peer() {
    let served = serve(NO_TIMEOUTS).await;
    let mut stream = served.connect_and_send(request("/peer").as_bytes()).await;
    let expected = format!("{} Some(Operate) true", stream.local_addr().unwrap());
    assert!(read_head(&mut stream).await.ends_with(&expected));
}

#[tokio::test]
async fn half_sent_headers_close_the_connection() {
    let served = serve(Limits { header_timeout: SHORT, ..NO_TIMEOUTS }).await;
    for sent in
        ["", "P", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost", "GET / HTTP/1.1\r\nhost: somewhere.example\r\nx: "]
    {
        wait_until_closed(served.connect_and_send(sent.as_bytes()).await).await;
    }
    served.wait_for_refusals("header_timeout", 5).await;
    // An idle connection is closed after the same time, but is not counted as refused.
    wait_until_closed(served.connect_and_send(request("/").as_bytes()).await).await;
    served.wait_for_refusals("header_timeout", 5).await;
    // The timeout of the headers does not apply to the call.
    let mut waits = served.connect_and_send(request("/waits").as_bytes()).await;
    wait_until_closed(served.connect_and_send(b"GET").await).await;
    served.release.notify_one();
    assert!(read_head(&mut waits).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn silent_http2_client_is_closed_and_idle_one_is_kept() {
    let served = serve(Limits { header_timeout: SHORT, keepalive: SHORT, ..NO_TIMEOUTS }).await;
    // The preface and empty settings; pings are not answered.
    wait_until_closed(served.connect_and_send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await).await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor(), TokioIo::new(served.connect().await)).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..3 {
        // By the time this one is closed, header timeout and ping timeout have passed.
        wait_until_closed(served.connect_and_send(b"GET").await).await;
        let request = hyper::Request::get("http://test/").body(Body::empty()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), StatusCode::OK);
    }
    assert!(!connection.is_finished());
    connection.abort();
}

fn executor() -> hyper_util::rt::TokioExecutor {
    hyper_util::rt::TokioExecutor::new()
}

#[tokio::test]
async fn connections_over_the_limit_are_closed() {
    let served = serve(Limits { connections: 8, ..NO_TIMEOUTS }).await;
    let mut open = Vec::new();
    for _ in 0..8 {
        let mut stream = served.connect_and_send(request("/").as_bytes()).await;
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 200"));
        open.push(stream);
    }
    wait_until_closed(served.connect().await).await;
    assert_eq!(served.get("/").await, "");
    served.wait_for_refusals("connections", 2).await;
    // Accepted connections are not affected, and a closed one makes room for another.
    let first = open.first_mut().unwrap();
    first.write_all(request("/").as_bytes()).await.unwrap();
    assert!(read_head(first).await.starts_with("HTTP/1.1 200"));
    drop(open.pop());
    eventually("room for another", async || served.get("/").await.starts_with("HTTP/1.1 200")).await;
}

#[tokio::test]
async fn calls_over_the_limit_are_unavailable() {
    let served = serve(Limits { calls: 1, ..NO_TIMEOUTS }).await;
    let mut waits = served.connect_and_send(request("/waits").as_bytes()).await;
    eventually("the first call", async || served.get("/").await.starts_with("HTTP/1.1 503")).await;
    let mut refused = served.connect_and_send(request("/").as_bytes()).await;
    let response = read_head(&mut refused).await;
    assert!(response.contains("\"code\":14") && response.contains("TOO_MANY_CALLS"), "{response}");
    let grpc = "POST /api.v1.challenge.ChallengeStore/QueryChallenge HTTP/1.1\r\nhost: test\r\ncontent-type: application/grpc\r\n\r\n";
    let response = read_head(&mut served.connect_and_send(grpc.as_bytes()).await).await;
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("grpc-status: 14"), "{response}");
    assert!(served.refusals()["calls"] >= 3);
    assert!(served.get("/healthcheck").await.starts_with("HTTP/1.1 200"));
    served.release.notify_one();
    assert!(read_head(&mut waits).await.starts_with("HTTP/1.1 200"));
    eventually("room for another", async || served.get("/").await.starts_with("HTTP/1.1 200")).await;
}

#[tokio::test]
async fn web_pages_of_others_are_refused_in_the_protocol_of_their_request() {
    let served = serve_origins(NO_TIMEOUTS, OriginPolicy::default()).await;
    let refused = async |head: &str| read_head(&mut served.connect_and_send(head.as_bytes()).await).await;
    let simple = "POST /api/v1/challenge HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}";
    let response = refused(simple).await;
    assert!(response.starts_with("HTTP/1.1 403") && response.contains("CROSS_ORIGIN"), "{response}");
    let rebound = "GET / HTTP/1.1\r\nhost: evil.example\r\nsec-fetch-site: same-origin\r\n\r\n";
    let response = refused(rebound).await;
    assert!(response.starts_with("HTTP/1.1 403") && response.contains("HOST_NOT_ALLOWED"), "{response}");
    let grpc_web = "POST /api.v1.challenge.ChallengeStore/CreateChallenge HTTP/1.1\r\nhost: localhost\r\norigin: null\r\ncontent-type: application/grpc-web+proto\r\n\r\n";
    let response = refused(grpc_web).await;
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("grpc-status: 7"), "{response}");
    let expected = BTreeMap::from([("cross_origin".to_owned(), 2), ("host".to_owned(), 1)]);
    assert_eq!(served.refusals(), expected);
    let own =
        "GET / HTTP/1.1\r\nhost: localhost:1\r\norigin: http://localhost:1\r\nsec-fetch-site: same-origin\r\n\r\n";
    assert!(refused(own).await.ends_with("here"));
}

#[test]
fn plaintext_credentials_are_refused_where_others_may_read_them() {
    let peer = |address| Peer { address, certificate: None, policy: Policy { anonymous: None } };
    let remote = peer(PeerAddress::Tcp(([10, 0, 0, 1], 1).into()));
    let local = [PeerAddress::Tcp(([127, 0, 0, 1], 1).into()), PeerAddress::Unix { uid: 0, pid: None }].map(peer);
    let headers: HeaderMap = [(AUTHORIZATION, "Bearer hunter2".parse().unwrap())].into_iter().collect();
    let port = |exposed| Port { exposed, ..port(&SdkMeterProvider::default()) };
    let refusal = port(true).check_secrecy(&remote, &headers).unwrap_err();
    assert_eq!(refusal.reason, "plaintext_credentials");
    assert_eq!(gauntlet_api::error::reason(&refusal.status).unwrap(), "PLAINTEXT_CREDENTIALS");
    assert!(!format!("{refusal:?}").contains("hunter2"));
    assert!(port(true).check_secrecy(&remote, &HeaderMap::new()).is_ok());
    assert!(port(false).check_secrecy(&remote, &headers).is_ok());
    assert!(local.iter().all(|peer| port(true).check_secrecy(peer, &headers).is_ok()));
}

#[tokio::test]
async fn headers_beyond_the_limit_are_refused_and_not_buffered() {
    let served = serve(NO_TIMEOUTS).await;
    let send = async |headers: String| {
        let request = format!("GET / HTTP/1.1\r\nhost: test\r\n{headers}\r\n");
        read_head(&mut served.connect_and_send(request.as_bytes()).await).await
    };
    let many = |count: usize| (0..count).map(|number| format!("x-{number}: y\r\n")).collect::<String>();
    assert!(send(many(99)).await.ends_with("here"));
    for headers in [many(100), format!("x: {}\r\n", "y".repeat(17 * 1024))] {
        let response = send(headers).await;
        assert!(response.starts_with("HTTP/1.1 400") && response.contains("HEADERS_TOO_LARGE"), "{response}");
    }
    let response = send(many(1000)).await;
    assert!(response.starts_with("HTTP/1.1 431"), "{response}");
    served.wait_for_refusals("headers", 3).await;
}

#[tokio::test]
async fn rapid_resets_close_the_connection() {
    let served = serve(NO_TIMEOUTS).await;
    let (mut sender, connection) = h2::client::handshake(served.connect().await).await.unwrap();
    let connection = tokio::spawn(connection);
    let resetting = async {
        for _ in 0..5000 {
            let Ok(ready) = sender.clone().ready().await else { return };
            sender = ready;
            let request = http::Request::get("http://test/waits").body(()).unwrap();
            // Dropping the response resets the stream.
            drop(sender.send_request(request, true));
            // The connection sends what has been queued.
            tokio::task::yield_now().await;
        }
    };
    resetting.await;
    eventually("the connection to be closed", async || connection.is_finished()).await;
    served.wait_for_refusals("rapid_reset", 1).await;
    assert!(served.get("/").await.ends_with("here"));
}

#[tokio::test]
async fn calls_cancelled_without_end_close_the_connection() {
    let activity = Activity::default();
    let cancel = || drop(activity.begin_call(http::Version::HTTP_2));
    let abused = async || futures::poll!(std::pin::pin!(activity.abused())).is_ready();
    (0..1000).for_each(|_| cancel());
    assert!(!abused().await);
    // Responses that are not read to their end don't count.
    drop(activity.begin_call(http::Version::HTTP_2).response(Body::empty(), None));
    assert!(!abused().await);
    cancel();
    assert!(abused().await);
}

#[tokio::test]
async fn unread_stream_ends_after_the_stall_timeout() {
    let served = serve(Limits { stall_timeout: SHORT, calls: 1, ..NO_TIMEOUTS }).await;
    let stalled = served.connect_and_send(request("/endless").as_bytes()).await;
    served.wait_for_streams(1).await;
    served.wait_for_streams(0).await;
    wait_until_closed(stalled).await;
    // With HTTP/2, the connection stays responsive while one of its streams is not read.
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor(), TokioIo::new(served.connect().await)).await.unwrap();
    let connection = tokio::spawn(connection);
    let stream = async |sender: &mut hyper::client::conn::http2::SendRequest<Body>| {
        let request = hyper::Request::get("http://test/endless").body(Body::empty()).unwrap();
        sender.send_request(request).await.unwrap()
    };
    let unread = stream(&mut sender).await;
    assert_eq!(unread.status(), StatusCode::OK);
    served.wait_for_streams(1).await;
    served.wait_for_streams(0).await;
    eventually("the client's connection to end", async || connection.is_finished()).await;
    drop(unread);
    served.wait_for_refusals("stalled_reader", 2).await;
    // The call no longer counts towards the limit.
    assert!(served.get("/").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn slow_reader_has_not_stalled() {
    let activity = Activity::default();
    let frames = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(b".")));
    let mut body = activity.begin_call(http::Version::HTTP_2).response(Body::from_stream(frames), None);
    for _ in 0..3 {
        // The time of each frame counts from when it was passed on.
        assert!(!activity.is_stalled(LONG));
        let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(std::pin::Pin::new(&mut body), cx)).await;
        assert!(frame.unwrap().is_ok() && activity.is_stalled(Duration::ZERO));
    }
    assert_eq!(activity.calls(), 1);
    drop(body);
    assert!(activity.calls() == 0 && !activity.is_stalled(Duration::ZERO));
}

#[tokio::test]
async fn half_sent_headers_do_not_delay_shutdown() {
    let served = serve(NO_TIMEOUTS).await;
    let mut idle = served.connect_and_send(request("/").as_bytes()).await;
    assert!(read_head(&mut idle).await.starts_with("HTTP/1.1 200"));
    let half = served.connect_and_send(b"GET / HTTP/1.1\r\nhost").await;
    let silent = served.connect().await;
    let mut waits = served.connect_and_send(request("/waits").as_bytes()).await;
    // The four connections have been accepted before this one.
    assert!(served.get("/").await.starts_with("HTTP/1.1 200"));
    let (tasks, release) = (served.tasks.clone(), served.release.clone());
    let drained = tokio::spawn(async move { tasks.drain(LONG / 2).await });
    for stream in [idle, half, silent] {
        wait_until_closed(stream).await;
    }
    assert!(!drained.is_finished(), "a call is still running");
    release.notify_one();
    assert!(read_head(&mut waits).await.starts_with("HTTP/1.1 200"));
    assert_eq!(drained.await.unwrap(), 0);
}
