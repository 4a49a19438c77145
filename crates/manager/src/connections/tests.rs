//! Clients that hold on to what they do not use, on real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{body::Bytes, routing::get};
use futures::stream;
use gauntlet_telemetry::Instruments;
use http::StatusCode;
use opentelemetry_sdk::metrics::{
    InMemoryMetricExporter, SdkMeterProvider,
    data::{AggregatedMetrics, MetricData},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
};

use super::*;

/// What takes longer has stopped for good.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(100);

/// Nothing ends by itself, unless a test says so.
const PATIENT: Limits =
    Limits { connections: 100, calls: 100, header_timeout: LONG, stall_timeout: LONG, keepalive: LONG };

struct Served {
    address: SocketAddr,
    tasks: Tasks,
    /// Lets the handlers of `/waits` answer.
    release: Arc<Notify>,
    /// Endless answers that somebody still reads, or could.
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
    let port = Port {
        name: "test",
        limits,
        router: Router::new()
            .route("/", get(async || "here"))
            .route("/healthcheck", get(async || "ok"))
            .route("/waits", get(waits))
            .route("/endless", get(endless)),
        exempt: crate::server::is_health_check,
        overloaded: crate::server::overloaded,
        refusals: Instruments::new(&metrics).server,
    };
    let tasks = Tasks::default();
    let address = crate::server::serve(&tasks, ([127, 0, 0, 1], 0).into(), port).await.unwrap();
    Served { address, tasks, release, streams, metrics, exported }
}

impl Served {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn sent(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// The answer's head to a request on a connection of its own, or nothing if the connection was closed before.
    async fn answer(&self, path: &str) -> String {
        head(&mut self.sent(request(path).as_bytes()).await).await
    }

    /// Waits until so many refusals have been counted, all for that reason.
    async fn refused(&self, reason: &str, count: u64) {
        let expected = BTreeMap::from([(reason.to_owned(), count)]);
        eventually(&format!("{expected:?}"), async || self.counted() == expected).await;
    }

    fn counted(&self) -> BTreeMap<String, u64> {
        self.exported.reset();
        self.metrics.force_flush().unwrap();
        let mut counted = BTreeMap::new();
        for all in self.exported.get_finished_metrics().unwrap() {
            for metric in all.scope_metrics().flat_map(|scope| scope.metrics()) {
                if let AggregatedMetrics::U64(MetricData::Sum(sum)) = metric.data() {
                    for point in sum.data_points() {
                        let reason = point.attributes().find(|attribute| attribute.key.as_str() == "reason");
                        counted.insert(reason.unwrap().value.as_str().into_owned(), point.value());
                    }
                }
            }
        }
        counted
    }

    async fn reading(&self, count: usize) {
        eventually("reading", async || self.streams.load(Ordering::SeqCst) == count).await;
    }
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

/// What there is to read at once, or nothing if the connection is closed.
async fn head(stream: &mut TcpStream) -> String {
    let mut buffer = vec![0; 4096];
    let read = tokio::time::timeout(LONG, stream.read(&mut buffer)).await.expect("it neither answers nor closes");
    buffer.truncate(read.unwrap_or_default());
    String::from_utf8_lossy(&buffer).into_owned()
}

/// Waits until the other side has closed.
async fn closed(mut stream: TcpStream) {
    let reading = async { while !matches!(stream.read(&mut [0; 64 * 1024]).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(LONG, reading).await.expect("the connection is not closed");
}

async fn eventually(what: &str, reached: impl AsyncFn() -> bool) {
    let reaching = async {
        while !reached().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, reaching).await.unwrap_or_else(|_| panic!("{what} never came to be"));
}

#[tokio::test]
async fn half_sent_head_is_closed() {
    let served = serve(Limits { header_timeout: SHORT, ..PATIENT }).await;
    for sent in
        ["", "P", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost", "GET / HTTP/1.1\r\nhost: somewhere.example\r\nx: "]
    {
        closed(served.sent(sent.as_bytes()).await).await;
    }
    served.refused("header_timeout", 5).await;
    // One that has been idle for as long is closed too, and is no refusal.
    closed(served.sent(request("/").as_bytes()).await).await;
    served.refused("header_timeout", 5).await;
    // A call may take longer than its head.
    let mut waits = served.sent(request("/waits").as_bytes()).await;
    closed(served.sent(b"GET").await).await;
    served.release.notify_one();
    assert!(head(&mut waits).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn silent_http2_client_is_closed_and_idle_one_is_kept() {
    let served = serve(Limits { header_timeout: SHORT, keepalive: SHORT, ..PATIENT }).await;
    // The preface and empty settings; pings are not answered.
    closed(served.sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await).await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor(), TokioIo::new(served.connect().await)).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..3 {
        // Longer than a head may take, and than a ping may.
        closed(served.sent(b"GET").await).await;
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
async fn connections_beyond_the_bound_are_closed() {
    let served = serve(Limits { connections: 8, ..PATIENT }).await;
    let mut open = Vec::new();
    for _ in 0..8 {
        let mut stream = served.sent(request("/").as_bytes()).await;
        assert!(head(&mut stream).await.starts_with("HTTP/1.1 200"));
        open.push(stream);
    }
    closed(served.connect().await).await;
    assert_eq!(served.answer("/").await, "");
    served.refused("connections", 2).await;
    // Those that are in are not touched, and who leaves makes room.
    let first = open.first_mut().unwrap();
    first.write_all(request("/").as_bytes()).await.unwrap();
    assert!(head(first).await.starts_with("HTTP/1.1 200"));
    drop(open.pop());
    eventually("room", async || served.answer("/").await.starts_with("HTTP/1.1 200")).await;
}

#[tokio::test]
async fn calls_beyond_the_bound_are_told_to_try_again() {
    let served = serve(Limits { calls: 1, ..PATIENT }).await;
    let mut waits = served.sent(request("/waits").as_bytes()).await;
    eventually("the first call", async || served.answer("/").await.starts_with("HTTP/1.1 503")).await;
    let mut refused = served.sent(request("/").as_bytes()).await;
    let answer = head(&mut refused).await;
    assert!(answer.contains("\"code\":14") && answer.contains("TOO_MANY_CALLS"), "{answer}");
    let grpc = "POST /api.v1.challenge.ChallengeStore/QueryChallenge HTTP/1.1\r\nhost: test\r\ncontent-type: application/grpc\r\n\r\n";
    let answer = head(&mut served.sent(grpc.as_bytes()).await).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("grpc-status: 14"), "{answer}");
    assert!(served.counted()["calls"] >= 3);
    assert!(served.answer("/healthcheck").await.starts_with("HTTP/1.1 200"));
    served.release.notify_one();
    assert!(head(&mut waits).await.starts_with("HTTP/1.1 200"));
    eventually("room", async || served.answer("/").await.starts_with("HTTP/1.1 200")).await;
}

#[tokio::test]
async fn stream_to_a_stalled_reader_ends() {
    let served = serve(Limits { stall_timeout: SHORT, calls: 1, ..PATIENT }).await;
    let stalled = served.sent(request("/endless").as_bytes()).await;
    served.reading(1).await;
    served.reading(0).await;
    closed(stalled).await;
    // Over HTTP/2 the connection lives on while a stream stands still.
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor(), TokioIo::new(served.connect().await)).await.unwrap();
    let connection = tokio::spawn(connection);
    let stream = async |sender: &mut hyper::client::conn::http2::SendRequest<Body>| {
        let request = hyper::Request::get("http://test/endless").body(Body::empty()).unwrap();
        sender.send_request(request).await.unwrap()
    };
    let unread = stream(&mut sender).await;
    assert_eq!(unread.status(), StatusCode::OK);
    served.reading(1).await;
    served.reading(0).await;
    eventually("the client's end", async || connection.is_finished()).await;
    drop(unread);
    served.refused("stalled_reader", 2).await;
    // The call's place is free again.
    assert!(served.answer("/").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn slow_reader_is_not_stalled() {
    let watch = Watch::default();
    let frames = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(b".")));
    let mut answer = watch.begin(http::Version::HTTP_2).answer(Body::from_stream(frames), None);
    for _ in 0..3 {
        // Each frame counts from when it was given.
        assert!(!watch.stalled(LONG));
        let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(std::pin::Pin::new(&mut answer), cx)).await;
        assert!(frame.unwrap().is_ok() && watch.stalled(Duration::ZERO));
    }
    assert_eq!(watch.calls(), 1);
    drop(answer);
    assert!(watch.calls() == 0 && !watch.stalled(Duration::ZERO));
}

#[tokio::test]
async fn half_sent_head_does_not_use_up_the_drain() {
    let served = serve(PATIENT).await;
    let mut idle = served.sent(request("/").as_bytes()).await;
    assert!(head(&mut idle).await.starts_with("HTTP/1.1 200"));
    let half = served.sent(b"GET / HTTP/1.1\r\nhost").await;
    let silent = served.connect().await;
    let mut waits = served.sent(request("/waits").as_bytes()).await;
    // All four have been accepted.
    assert!(served.answer("/").await.starts_with("HTTP/1.1 200"));
    let (tasks, release) = (served.tasks.clone(), served.release.clone());
    let drained = tokio::spawn(async move { tasks.drain(LONG / 2).await });
    for stream in [idle, half, silent] {
        closed(stream).await;
    }
    assert!(!drained.is_finished(), "a call is under way");
    release.notify_one();
    assert!(head(&mut waits).await.starts_with("HTTP/1.1 200"));
    assert_eq!(drained.await.unwrap(), 0);
}
