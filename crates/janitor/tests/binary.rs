//! The binary: exit codes, environment, signals.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use gauntlet_testing::api::{Deletion, FakeApi, challenge, from_now};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use tokio::{
    net::TcpListener,
    process::{Child, Command},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, async_trait};

fn janitor(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gauntlet-janitor"));
    command
        .args(arguments)
        .env_clear()
        .env("OTEL_SDK_DISABLED", "true")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn run(command: &mut Command) -> (Option<i32>, String) {
    let output: Output = tokio::time::timeout(Duration::from_secs(30), command.output())
        .await
        .expect("the process is still running")
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code(), text)
}

fn one_expired() -> FakeApi {
    FakeApi::new(vec![challenge("a", None, &[("1", from_now(-60))])])
}

#[tokio::test]
async fn single_sweep_exits_with_0() {
    let fake = one_expired();
    let server = fake.serve().await;
    let (code, text) = run(&mut janitor(&["--url", &server.url], &[])).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn environment_of_the_go_janitor_is_accepted() {
    let fake = one_expired();
    let server = fake.serve().await;
    let host_and_port = server.url.strip_prefix("http://").unwrap();
    let environment = [("URL", host_and_port), ("TICKER", ""), ("LOG_LEVEL", "debug")];
    let (code, text) = run(&mut janitor(&[], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn v1_only_never_lists() {
    let fake = one_expired().extended();
    let server = fake.serve().await;
    let (code, text) = run(&mut janitor(&["--url", &server.url], &[])).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.with(|state| (state.lists, state.queries)), (1, 0));
    let (code, text) = run(&mut janitor(&["--url", &server.url, "--v1-only"], &[])).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.with(|state| (state.lists, state.queries)), (1, 1));
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn sweep_that_deleted_nothing_exits_with_1() {
    let fake = one_expired().deletion("1", Deletion::Fails(Code::Internal));
    let server = fake.serve().await;
    let (code, text) = run(&mut janitor(&["--url", &server.url], &[])).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("cannot delete any of the 1 expired instances"), "{text}");
    let (code, text) = run(&mut janitor(&["--url", "127.0.0.1:1"], &[])).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("cannot read the expired instances from http://127.0.0.1:1"), "{text}");
}

#[tokio::test]
async fn invalid_value_exits_with_64_and_is_named() {
    for (arguments, environment, name) in [
        (&["--every", "soon"][..], ("A", ""), "--every"),
        (&[], ("TICKER", "soon"), "soon"),
        (&[], ("URL", "localhost"), "the address has no port"),
        (&["--nonsense"], ("A", ""), "--nonsense"),
        (&["--log-level", "loud"], ("A", ""), "--log-level"),
        (&[], ("OTEL_BSP_MAX_QUEUE_SIZE", "many"), "OTEL_BSP_MAX_QUEUE_SIZE"),
    ] {
        let (code, text) = run(&mut janitor(arguments, &[environment])).await;
        assert_eq!(code, Some(64), "{text}");
        assert!(text.contains(name), "{text}");
    }
    for argument in ["--help", "--version"] {
        assert_eq!(run(&mut janitor(&[argument], &[])).await.0, Some(0));
    }
}

#[tokio::test]
async fn unreachable_collector_does_not_delay_the_exit() {
    let fake = one_expired();
    let server = fake.serve().await;
    let environment = [("OTEL_SDK_DISABLED", "false"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")];
    let (code, text) = run(&mut janitor(&["--url", &server.url], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
}

/// A collector that keeps the names of spans and checks their service.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for batch in request.into_inner().resource_spans {
            let resource = format!("{:?}", batch.resource);
            assert!(resource.contains("gauntlet-janitor"), "{resource}");
            let spans = batch.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| span.name));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn single_sweep_exports_its_telemetry_before_it_exits() {
    let fake = one_expired().extended();
    let server = fake.serve().await;
    let collector = Collector::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(collector.clone());
    let collecting = tokio::spawn(
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let environment = [
        ("OTEL_SDK_DISABLED", "false"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_METRICS_EXPORTER", "none"),
        ("OTEL_LOGS_EXPORTER", "none"),
    ];
    let (code, text) = run(&mut janitor(&["--url", &server.url], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
    let mut names = collector.0.lock().unwrap().clone();
    names.sort();
    assert_eq!(
        names,
        ["gauntlet.v1.Sweeper/DeleteExpired", "gauntlet.v1.Sweeper/ListExpired", "janitor.expire", "janitor.sweep",]
    );
    collecting.abort();
}

#[tokio::test]
async fn hanging_collector_does_not_delay_the_exit() {
    let fake = one_expired();
    let server = fake.serve().await;
    // Connections stay in its backlog: nothing accepts them.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let environment = [("OTEL_SDK_DISABLED", "false"), ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str())];
    let (code, text) = run(&mut janitor(&["--url", &server.url], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("could not be flushed"), "{text}");
}

async fn terminate(mut child: Child) -> ExitStatus {
    let id = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    tokio::time::timeout(Duration::from_secs(30), child.wait()).await.expect("the process is still running").unwrap()
}

#[tokio::test]
async fn service_survives_failures_and_exits_on_sigterm() {
    let fake = one_expired();
    fake.with(|state| state.breaks_after = Some(0));
    let server = fake.serve().await;
    let child = janitor(&["--url", &server.url, "--every", "50ms"], &[]).spawn().unwrap();
    fake.wait_until("two failed queries", |state| state.queries >= 2).await;
    fake.with(|state| state.breaks_after = None);
    fake.wait_until("instance 1 is deleted", |state| state.deleted == ["1"]).await;
    assert_eq!(terminate(child).await.code(), Some(0));
}

#[tokio::test]
async fn sigterm_waits_for_the_deletion_under_way() {
    let fake = one_expired().deletion("1", Deletion::Waits);
    let server = fake.serve().await;
    let child = janitor(&["--url", &server.url], &[]).spawn().unwrap();
    fake.wait_until("a deletion is in flight", |state| state.in_flight == 1).await;
    let ending = tokio::spawn(terminate(child));
    fake.release.notify_one();
    assert_eq!(ending.await.unwrap().code(), Some(0));
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn second_signal_ends_at_once() {
    let fake = one_expired().deletion("1", Deletion::Hangs);
    let server = fake.serve().await;
    let mut child = janitor(&["--url", &server.url], &[]).spawn().unwrap();
    fake.wait_until("a deletion is in flight", |state| state.in_flight == 1).await;
    let id = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    // Two signals sent in quick succession may be delivered as one.
    let status = loop {
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
        if let Ok(ended) = tokio::time::timeout(Duration::from_millis(20), child.wait()).await {
            break ended.unwrap();
        }
        assert!(tokio::time::Instant::now() < deadline, "the process is still running");
    };
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
}
