//! The tower layers and the observer of etcd calls, on a real server and client in this process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::routing::get;
use bytes::Bytes;
use gauntlet_telemetry::Telemetry;
use gauntlet_telemetry::db::{Database, Operation};
use gauntlet_telemetry::layers::{GrpcClient, GrpcClientLayer, GrpcServerLayer, HttpServerLayer, ObserveService};
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_client::LogsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use support::{Collector, Fixture, attribute, attributes};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server, Uri};
use tonic::{Code, Status};
use tower::{Layer, Service, ServiceExt};
use tracing::Instrument as _;

const METHOD: &str = "opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// A service whose response depends on the number of spans in the request: OK, NOT_FOUND, INTERNAL, and no response for more than two.
#[derive(Clone)]
struct Scripted;

#[tonic::async_trait]
impl TraceService for Scripted {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        tracing::info_span!("inside").in_scope(|| {});
        match request.into_inner().resource_spans.len() {
            0 => Ok(tonic::Response::new(ExportTraceServiceResponse::default())),
            1 => Err(Status::not_found("no such thing")),
            2 => Err(Status::internal("broken")),
            _ => std::future::pending().await,
        }
    }
}

async fn serve(telemetry: &Telemetry) -> Uri {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let server = Server::builder()
        .layer(GrpcServerLayer::new(telemetry.instruments(), [METHOD]))
        .add_service(TraceServiceServer::new(Scripted))
        .add_service(health)
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    uri
}

/// A server, a plain channel to it, and an observed client.
async fn connect(telemetry: &Telemetry) -> (Uri, Channel, TraceServiceClient<ObserveService<Channel, GrpcClient>>) {
    let uri = serve(telemetry).await;
    let channel = Channel::builder(uri.clone()).connect().await.unwrap();
    let observed = GrpcClientLayer::new(telemetry.instruments(), &uri).layer(channel.clone());
    (uri, channel, TraceServiceClient::new(observed))
}

fn request(spans: usize) -> ExportTraceServiceRequest {
    ExportTraceServiceRequest { resource_spans: vec![Default::default(); spans] }
}

fn is_kind(span: &Span, kind: SpanKind) -> bool {
    span.kind == kind as i32
}

/// The series of a histogram, sorted, as `attributes: count`.
fn series(collector: &Collector, name: &str) -> Vec<String> {
    let Some(Data::Histogram(histogram)) = collector.metric(name).and_then(|metric| metric.data) else {
        return Vec::new();
    };
    let mut all: Vec<_> = histogram
        .data_points
        .iter()
        .map(|point| format!("{}: {}", attributes(&point.attributes).join(" "), point.count))
        .collect();
    all.sort();
    all
}

#[tokio::test]
async fn grpc_client_and_server_spans_share_one_trace() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let (uri, _, mut client) = connect(telemetry).await;
    client.export(request(0)).await.unwrap();
    telemetry.flush().unwrap();

    let spans = collector.spans();
    let client = spans.iter().find(|span| is_kind(span, SpanKind::Client)).unwrap();
    let server = spans.iter().find(|span| is_kind(span, SpanKind::Server)).unwrap();
    let inside = collector.span("inside");
    assert_eq!((client.name.as_str(), server.name.as_str()), (METHOD, METHOD));
    assert_eq!(server.parent_span_id, client.span_id);
    assert_eq!(inside.parent_span_id, server.span_id);
    assert_eq!(inside.trace_id, client.trace_id);
    assert!(client.parent_span_id.is_empty());
    insta::assert_debug_snapshot!(attributes(&server.attributes), @r#"
    [
        "rpc.method=opentelemetry.proto.collector.trace.v1.TraceService/Export",
        "rpc.response.status_code=OK",
        "rpc.system.name=grpc",
    ]
    "#);
    assert_eq!(attribute(&client.attributes, "server.address").unwrap(), "127.0.0.1");
    assert_eq!(attribute(&client.attributes, "server.port").unwrap(), uri.port_u16().unwrap().to_string());
    insta::assert_debug_snapshot!(series(collector, "rpc.server.call.duration"), @r#"
    [
        "rpc.method=opentelemetry.proto.collector.trace.v1.TraceService/Export rpc.response.status_code=OK rpc.system.name=grpc: 1",
    ]
    "#);
    assert_eq!(series(collector, "rpc.client.call.duration").len(), 1);
}

#[tokio::test]
async fn grpc_span_is_failed_only_on_the_side_at_fault() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let (_, channel, mut client) = connect(telemetry).await;
    assert_eq!(client.export(request(1)).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.export(request(2)).await.unwrap_err().code(), Code::Internal);
    // Methods that the server does not serve share one name.
    for _ in 0..2 {
        let error =
            LogsServiceClient::new(channel.clone()).export(tonic::Request::new(Default::default())).await.unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented);
        let error = MetricsServiceClient::new(channel.clone())
            .export(tonic::Request::new(Default::default()))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented);
    }
    // Health checks are not observed.
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    health.check(tonic_health::pb::HealthCheckRequest { service: String::new() }).await.unwrap();
    telemetry.flush().unwrap();

    let mut recorded: Vec<_> = collector
        .spans()
        .iter()
        .filter(|span| span.name != "inside")
        .map(|span| {
            let kind = if is_kind(span, SpanKind::Server) { "server" } else { "client" };
            let code = attribute(&span.attributes, "rpc.response.status_code").unwrap();
            assert_eq!(attribute(&span.attributes, "error.type").as_ref(), Some(&code));
            let status = span.status.clone().unwrap_or_default();
            format!("{} {kind} {code} status={}", span.name.rsplit('.').next().unwrap(), status.code)
        })
        .collect();
    recorded.sort();
    insta::assert_debug_snapshot!(recorded, @r#"
    [
        "TraceService/Export client INTERNAL status=2",
        "TraceService/Export client NOT_FOUND status=2",
        "TraceService/Export server INTERNAL status=2",
        "TraceService/Export server NOT_FOUND status=0",
        "_OTHER server UNIMPLEMENTED status=2",
        "_OTHER server UNIMPLEMENTED status=2",
        "_OTHER server UNIMPLEMENTED status=2",
        "_OTHER server UNIMPLEMENTED status=2",
    ]
    "#);
    assert_eq!(series(collector, "rpc.server.call.duration").len(), 3);
}

#[tokio::test]
async fn dropped_grpc_call_is_recorded_as_cancelled_on_both_sides() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let (.., mut client) = connect(telemetry).await;
    let call = tokio::spawn(async move { client.export(request(3)).await });
    flush_until(telemetry, collector, "the handler's span", |spans| spans.iter().any(|span| span.name == "inside"))
        .await;
    call.abort();
    flush_until(telemetry, collector, "the spans of client and server", |spans| {
        spans.iter().filter(|span| span.name == METHOD).count() == 2
    })
    .await;
    for span in collector.spans().iter().filter(|span| span.name == METHOD) {
        assert_eq!(attribute(&span.attributes, "rpc.response.status_code").unwrap(), "CANCELLED");
    }
}

/// Flushes until `done` accepts the exported spans. Yields in between, because the server runs on this thread.
async fn flush_until(telemetry: &Telemetry, collector: &Collector, what: &str, done: impl Fn(&[Span]) -> bool) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
    while !done(&collector.spans()) {
        assert!(
            tokio::time::Instant::now() < deadline,
            "timed out waiting for {what}, received {:?}",
            collector.names()
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        telemetry.flush().unwrap();
    }
}

/// A body that returns its frames one by one.
struct Frames(Vec<Frame<Bytes>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frames = &mut self.0;
        if frames.is_empty() { Poll::Ready(None) } else { Poll::Ready(Some(Ok(frames.remove(0)))) }
    }
}

/// Two data frames, and trailers with the code, if any.
fn frames(trailers: Option<Code>) -> Vec<Frame<Bytes>> {
    let mut frames = vec![Frame::data(Bytes::from("one")), Frame::data(Bytes::from("two"))];
    if let Some(code) = trailers {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", (code as i32).into());
        frames.push(Frame::trailers(trailers));
    }
    frames
}

#[tokio::test]
async fn streamed_grpc_call_ends_with_its_trailers() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let layer = GrpcServerLayer::new(telemetry.instruments(), ["a.B/C", "a.B/D", "a.B/E"]);
    let call = async |path: &str, frames: Vec<Frame<Bytes>>| {
        let frames = std::sync::Mutex::new(Some(frames));
        let service = tower::service_fn(move |_: Request<()>| {
            let frames = frames.lock().unwrap().take().unwrap();
            async move { Ok::<_, Infallible>(Response::new(Frames(frames))) }
        });
        let request = Request::builder().uri(path).body(()).unwrap();
        layer.layer(service).oneshot(request).await.unwrap().into_body()
    };
    let mut body = call("/a.B/C", frames(Some(Code::DataLoss))).await;
    body.frame().await.unwrap().unwrap();
    telemetry.flush().unwrap();
    assert!(collector.spans().is_empty(), "no span may be exported before the call ends");
    body.frame().await.unwrap().unwrap();
    body.frame().await.unwrap().unwrap();
    // A body that is dropped half-way is cancelled.
    let mut abandoned = call("/a.B/D", frames(Some(Code::Ok))).await;
    abandoned.frame().await.unwrap().unwrap();
    drop(abandoned);
    call("/a.B/E", frames(None)).await.collect().await.unwrap();
    telemetry.flush().unwrap();
    let code = |name| attribute(&collector.span(name).attributes, "rpc.response.status_code").unwrap();
    assert_eq!([code("a.B/C"), code("a.B/D"), code("a.B/E")], ["DATA_LOSS", "CANCELLED", "UNKNOWN"]);
    drop(body);
}

#[tokio::test]
async fn http_span_is_named_after_method_and_route() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let mut app = axum::Router::new()
        .route("/thing/{id}", get(async || "here"))
        .route("/broken", get(async || http::StatusCode::SERVICE_UNAVAILABLE))
        .route("/forever", get(async || std::future::pending::<()>().await))
        .route("/healthcheck", get(async || "ok"))
        .layer(HttpServerLayer::new(telemetry.instruments(), &["/healthcheck"]));
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    for (method, path) in
        [("GET", "/thing/7"), ("GET", "/broken"), ("BREW", "/thing/7"), ("GET", "/nowhere"), ("GET", "/healthcheck")]
    {
        let request = Request::builder().method(method).uri(path).header("traceparent", parent);
        let response = app.call(request.body(axum::body::Body::empty()).unwrap()).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    let request = Request::builder().uri("/forever").body(axum::body::Body::empty()).unwrap();
    let mut waiting = Box::pin(app.call(request));
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(waiting);
    telemetry.flush().unwrap();

    let recorded: Vec<_> = collector
        .spans()
        .iter()
        .map(|span| {
            let status = span.status.clone().unwrap_or_default().code;
            let code = attribute(&span.attributes, "http.response.status_code").unwrap();
            let error = attribute(&span.attributes, "error.type").unwrap_or_default();
            format!("{}: {code} status={status} error={error} parent={}", span.name, !span.parent_span_id.is_empty())
        })
        .collect();
    insta::assert_debug_snapshot!(recorded, @r#"
    [
        "GET /thing/{id}: 200 status=0 error= parent=true",
        "GET /broken: 503 status=2 error=503 parent=true",
        "HTTP /thing/{id}: 405 status=0 error= parent=true",
        "GET: 404 status=0 error= parent=true",
        "GET /forever: 499 status=0 error=cancelled parent=false",
    ]
    "#);
    insta::assert_debug_snapshot!(attributes(&collector.spans()[0].attributes), @r#"
    [
        "http.request.method=GET",
        "http.response.status_code=200",
        "http.route=/thing/{id}",
        "url.path=/thing/7",
        "url.scheme=http",
    ]
    "#);
    assert_eq!(series(collector, "http.server.request.duration").len(), 5);
}

#[tokio::test]
async fn response_to_head_request_is_complete_without_a_body() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let mut app = axum::Router::new()
        .route("/thing", get(async || "here"))
        .layer(HttpServerLayer::new(telemetry.instruments(), &[]));
    let request = Request::builder().method("HEAD").uri("/thing").body(axum::body::Body::empty()).unwrap();
    // hyper does not poll the body of a response to HEAD.
    drop(app.call(request).await.unwrap());
    telemetry.flush().unwrap();
    let span = collector.span("HEAD /thing");
    assert_eq!(attribute(&span.attributes, "http.response.status_code").unwrap(), "200");
    assert_eq!(attribute(&span.attributes, "error.type"), None);
}

#[tokio::test]
async fn etcd_call_is_a_client_span_only_within_a_span() {
    let Fixture { collector, telemetry, .. } = &Fixture::new(&[]);
    let database = Database::etcd(telemetry.instruments());
    let code = |_: &&str| "UNAVAILABLE";
    let call = async {
        database.call(Operation::Txn, "etcd-0:2379", code, async { Ok::<_, &str>(()) }).await.unwrap();
        database.call(Operation::Range, "etcd-0:2379", code, async { Err::<(), _>("away") }).await.unwrap_err();
    };
    call.instrument(tracing::info_span!("work")).await;
    // A call outside any span, such as a replica's own lease, is measured but not traced.
    let mut hanging =
        Box::pin(database.call(Operation::Lease, "[::1]:2379", code, std::future::pending::<Result<(), &str>>()));
    assert!(futures::poll!(&mut hanging).is_pending());
    drop(hanging);
    telemetry.flush().unwrap();
    assert_eq!(collector.names(), ["etcd.txn", "etcd.range", "work"]);
    insta::assert_debug_snapshot!(series(collector, "db.client.operation.duration"), @r#"
    [
        "db.operation.name=lease db.system.name=etcd error.type=cancelled server.address=[::1] server.port=2379: 1",
        "db.operation.name=range db.system.name=etcd error.type=UNAVAILABLE server.address=etcd-0 server.port=2379: 1",
        "db.operation.name=txn db.system.name=etcd server.address=etcd-0 server.port=2379: 1",
    ]
    "#);
}
