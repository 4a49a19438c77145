//! The client commands of the real binary, against a server of the v1 API in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    pin::Pin,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use gauntlet_api::{error, json, v1::challenge as pbc, v1::instance as pbi};
use pbc::challenge_store_server::{ChallengeStore, ChallengeStoreServer};
use pbi::instance_manager_server::{InstanceManager, InstanceManagerServer};
use prost::{Message, Name};
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, async_trait, transport::Server};

/// Answers anything about "web-1", knows nothing else, and remembers what was sent.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Vec<String>>>);

struct Running {
    url: String,
    fake: Fake,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    async fn start() -> Self {
        let fake = Fake::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = listener.local_addr().unwrap().to_string();
        let serving = Server::builder()
            .add_service(ChallengeStoreServer::new(fake.clone()))
            .add_service(InstanceManagerServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move {
            let _ = serving.await;
        });
        Self { url, fake, task }
    }

    async fn run(&self, line: &str) -> Ended {
        let mut command = gauntlet(line.split(' '));
        command.env("URL", &self.url);
        ended(command, "").await
    }

    fn sent(&self) -> String {
        self.fake.0.lock().unwrap().drain(..).collect::<Vec<_>>().join("\n")
    }
}

struct Ended {
    code: i32,
    out: String,
    err: String,
}

fn gauntlet<'a>(arguments: impl Iterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gauntlet"));
    command
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn ended(mut command: Command, input: &str) -> Ended {
    let mut child = command.spawn().unwrap();
    // One that does not read its input is free to.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    let output =
        tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.expect("it never ended").unwrap();
    Ended {
        code: output.status.code().expect("no signal"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn challenge(id: &str) -> pbc::Challenge {
    pbc::Challenge {
        id: id.into(),
        scenario: "registry.lan:5000/web:1".into(),
        timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        instances: vec![instance(id, "42")],
        min: 2,
        max: 10,
        ..Default::default()
    }
}

fn instance(challenge: &str, source: &str) -> pbi::Instance {
    pbi::Instance {
        challenge_id: challenge.into(),
        source_id: source.into(),
        since: Some(prost_types::Timestamp::default()),
        last_renew: Some(prost_types::Timestamp::default()),
        connection_info: "curl http://127.0.0.1:20001".into(),
        flags: vec!["FLAG{one}".into()],
        ..Default::default()
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    fn note<M: Message + Name>(&self, request: Request<M>) -> M {
        assert!(request.metadata().contains_key("grpc-timeout"), "every call tells its deadline");
        let message = request.into_inner();
        self.0.lock().unwrap().push(format!("{} {}", M::NAME, json::to_string(&message).unwrap()));
        message
    }

    fn challenge(id: &str) -> Result<Response<pbc::Challenge>, Status> {
        match id {
            "web-1" => Ok(Response::new(challenge(id))),
            _ => Err(error::challenge_not_found(id)),
        }
    }

    fn instance(challenge: &str, source: &str) -> Result<Response<pbi::Instance>, Status> {
        match challenge {
            "web-1" => Ok(Response::new(instance(challenge, source))),
            _ => Err(error::instance_not_found(challenge, source)),
        }
    }
}

#[async_trait]
impl ChallengeStore for Fake {
    async fn create_challenge(
        &self,
        request: Request<pbc::CreateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        match self.note(request) {
            request if request.min < 0 => Err(error::challenge_pooler_out_of_bounds(request.min, request.max, 1000)),
            request => Self::challenge(&request.id),
        }
    }

    async fn retrieve_challenge(
        &self,
        request: Request<pbc::RetrieveChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        Self::challenge(&self.note(request).id)
    }

    type QueryChallengeStream = Answers<pbc::Challenge>;

    async fn query_challenge(&self, _: Request<()>) -> Result<Response<Self::QueryChallengeStream>, Status> {
        Ok(Response::new(stream::iter([Ok(challenge("web-1")), Ok(challenge("web-2"))]).boxed()))
    }

    async fn update_challenge(
        &self,
        request: Request<pbc::UpdateChallengeRequest>,
    ) -> Result<Response<pbc::Challenge>, Status> {
        Self::challenge(&self.note(request).id)
    }

    async fn delete_challenge(&self, request: Request<pbc::DeleteChallengeRequest>) -> Result<Response<()>, Status> {
        Self::challenge(&self.note(request).id).map(|_| Response::new(()))
    }
}

#[async_trait]
impl InstanceManager for Fake {
    async fn create_instance(
        &self,
        request: Request<pbi::CreateInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.note(request);
        Self::instance(&request.challenge_id, &request.source_id)
    }

    async fn retrieve_instance(
        &self,
        request: Request<pbi::RetrieveInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.note(request);
        Self::instance(&request.challenge_id, &request.source_id)
    }

    type QueryInstanceStream = Answers<pbi::Instance>;

    async fn query_instance(
        &self,
        request: Request<pbi::QueryInstanceRequest>,
    ) -> Result<Response<Self::QueryInstanceStream>, Status> {
        let source = self.note(request).source_id;
        Ok(Response::new(match source.as_str() {
            "none" => stream::empty().boxed(),
            "hangs" => stream::pending().boxed(),
            "breaks" => stream::iter([Ok(instance("web-1", "breaks")), Err(error::internal_error())]).boxed(),
            source => stream::iter([Ok(instance("web-1", source))]).boxed(),
        }))
    }

    async fn renew_instance(
        &self,
        request: Request<pbi::RenewInstanceRequest>,
    ) -> Result<Response<pbi::Instance>, Status> {
        let request = self.note(request);
        Self::instance(&request.challenge_id, &request.source_id)
    }

    async fn delete_instance(&self, request: Request<pbi::DeleteInstanceRequest>) -> Result<Response<()>, Status> {
        let request = self.note(request);
        Self::instance(&request.challenge_id, &request.source_id).map(|_| Response::new(()))
    }
}

#[tokio::test]
async fn what_flags_become() {
    let server = Running::start().await;
    for line in [
        "challenge create web-1 --scenario r.lan/web:1 --timeout 1m30s --until 2026-01-31T19:00:00+01:00 --additional a=b=c --min 2 --max 10",
        "challenge create web-1 --scenario r.lan/web:1",
        "challenge update web-1 --scenario r.lan/web:2 --strategy blue-green --max 0",
        "challenge update web-1 --no-timeout --no-until --no-additional",
        "challenge update web-1 --timeout 10m --additional a=1 --additional b=2 --min 0",
        "challenge update web-1",
        "challenge delete web-1",
        "instance create web-1 42 --additional a=1 --output json",
        "instance renew web-1 42",
        "instance list",
        "instance delete web-1 42",
    ] {
        let ended = server.run(line).await;
        assert_eq!(ended.code, 0, "{line}: {}", ended.err);
    }
    insta::assert_snapshot!(server.sent());
}

#[tokio::test]
async fn json_is_that_of_the_api() {
    let server = Running::start().await;
    let ended = server.run("challenge get web-1 --output json").await;
    assert_eq!(ended.out, json::to_string(&challenge("web-1")).unwrap() + "\n");
    let ended = server.run("-o json challenge list").await;
    assert_eq!(ended.code, 64, "the options belong to the command");
    let ended = server.run("challenge -o json list").await;
    let ids: Vec<_> = ended
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids, ["web-1", "web-2"]);
    let ended = server.run("instance get web-1 42 -o json").await;
    assert_eq!(ended.out, json::to_string(&instance("web-1", "42")).unwrap() + "\n");
    assert_eq!(server.run("instance list none -o json").await.out, "");
    assert_eq!(server.run("instance delete web-1 42 -o json").await.out, "{}\n");
}

#[tokio::test]
async fn tables_are_plain_off_a_terminal() {
    let server = Running::start().await;
    insta::assert_snapshot!(server.run("challenge list").await.out, @"
    ID     INSTANCES  POOL     TIMEOUT  UNTIL  SCENARIO
    web-1  1          2 to 10  10m      -      registry.lan:5000/web:1
    web-2  1          2 to 10  10m      -      registry.lan:5000/web:1
    ");
    insta::assert_snapshot!(server.run("instance list 42").await.out, @"
    CHALLENGE  SOURCE  UNTIL  CONNECTION
    web-1      42      -      curl http://127.0.0.1:20001
    ");
    insta::assert_snapshot!(server.run("instance list none").await.out, @"No instances.");
    insta::assert_snapshot!(server.run("instance delete web-1 42").await.out, @"Deleted instance web-1/42.");
    assert!(!server.run("challenge get web-1").await.out.contains('\u{1b}'));
}

#[tokio::test]
async fn failures_say_what_to_do() {
    let server = Running::start().await;
    let ended = server.run("challenge get web-3").await;
    assert_eq!((ended.code, ended.out.as_str()), (1, ""));
    insta::assert_snapshot!(ended.err, @"
    error: Challenge not found.
      reason: CHALLENGE_NOT_FOUND (id: web-3)
      Challenge web-3: No challenge has this id.
      fix: `gauntlet challenge list` shows those there are
    ");
    let ended = server.run("challenge create web-1 --scenario a --min -1").await;
    assert_eq!(ended.code, 1);
    insta::assert_snapshot!(ended.err, @"
    error: Pooler configuration out of bounds.
      reason: CHALLENGE_POOLER_OUT_OF_BOUNDS (max: 0, min: -1)
      min: min is -1; it must be 0 or more.
    ");
    let ended = server.run("instance list breaks -o json").await;
    assert_eq!((ended.code, ended.out.lines().count()), (1, 1), "what came before is shown");
    assert!(server.run("instance list breaks").await.out.contains("breaks"));
    let ended = server.run("instance list hangs --deadline 300ms").await;
    assert_eq!(ended.code, 69);
    assert!(ended.err.contains("no answer within 300ms") && ended.err.contains("--deadline"), "{}", ended.err);
}

#[tokio::test]
async fn a_server_that_is_away_is_69() {
    let ended = ended(gauntlet("challenge list --url 127.0.0.1:1".split(' ')), "").await;
    assert_eq!(ended.code, 69);
    let refused = "error: tcp connect error: Connection refused (os error 111)";
    assert!(
        ended.err.contains(refused) && ended.err.contains("fix: is a manager listening at http://127.0.0.1:1?"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn a_collector_that_is_away_changes_nothing() {
    let server = Running::start().await;
    let mut command = gauntlet("instance renew web-1 42".split(' '));
    command.env("URL", &server.url).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let ended = ended(command, "").await;
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.out.starts_with("Challenge   web-1"), "{}", ended.out);
}

#[tokio::test]
async fn wrong_usage_is_64_and_names_itself() {
    for (line, name) in [
        ("challenge create web-1", "--scenario"),
        ("challenge create web-1 --scenario a --timeout soon", "expected a duration above zero such as 30s"),
        ("challenge create web-1 --scenario a --until tomorrow", "expected a time in RFC 3339"),
        ("challenge create web-1 --scenario a --additional a", "expected KEY=VALUE"),
        ("challenge update web-1 --timeout 1m --no-timeout", "--no-timeout"),
        ("challenge list --url localhost", "the address has no port"),
        ("challenge list --output xml", "--output"),
        ("scenario push web r.lan/web:1 --password-stdin", "--username"),
        ("nonsense", "nonsense"),
        ("challenge", "Usage"),
    ] {
        let ended = ended(gauntlet(line.split(' ')), "").await;
        assert_eq!(ended.code, 64, "{line}: {}", ended.err);
        assert!(ended.err.contains(name), "{line}: {}", ended.err);
    }
}

#[tokio::test]
async fn helps() {
    let mut all = String::new();
    for line in [
        "--help",
        "dev --help",
        "challenge --help",
        "challenge create --help",
        "challenge update --help",
        "instance --help",
        "instance create --help",
        "scenario --help",
        "scenario push --help",
    ] {
        let ended = ended(gauntlet(line.split(' ')), "").await;
        assert_eq!(ended.code, 0, "{}", ended.err);
        all.push_str(&format!("$ gauntlet {line}\n{}\n", ended.out));
    }
    insta::assert_snapshot!(all);
}

const SOUND: &str = r#"
version: 1
provisioner: process
process:
  command: ["sleep", "60"]
ports:
  main: tcp
ready:
  tcp: { port: main }
connection_info: "http://{{ host }}:{{ ports.main }}"
"#;

fn scenario(document: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("scenario.yaml"), document).unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

#[tokio::test]
async fn scenarios_are_checked() {
    let run = async |line: &str| ended(gauntlet(line.split(' ')), "").await;
    let (_dir, sound) = scenario(SOUND);
    let ended = run(&format!("scenario validate {sound}")).await;
    assert_eq!(ended.code, 0, "{}", ended.err);
    insta::assert_snapshot!(ended.out, @"
    The scenario is sound: 1 file, 171 bytes.
             171  scenario.yaml
    ");
    let (_dir, unsound) = scenario("version: 1\nnonsense: true\n");
    for line in [format!("scenario validate {unsound}"), format!("scenario push {unsound} r.lan/web:1")] {
        let ended = run(&line).await;
        assert_eq!((ended.code, ended.out.as_str()), (1, ""));
        assert!(ended.err.starts_with("error: This is no sound scenario.\n  line 1: "), "{}", ended.err);
        assert!(ended.err.contains("line 2: nonsense") && ended.err.contains("fix: "), "{}", ended.err);
    }
    let ended = run(&format!("scenario validate {sound}/none")).await;
    assert_eq!(ended.code, 1, "{}", ended.err);
    assert!(ended.err.contains("is not a directory"), "{}", ended.err);
    let ended = run(&format!("scenario push {sound} web")).await;
    assert_eq!(ended.code, 1, "{}", ended.err);
    assert!(ended.err.contains("OCI_REFERENCE_MALFORMED") && ended.err.contains("fix: "), "{}", ended.err);
}

#[tokio::test]
async fn a_registry_that_is_away_is_69_and_the_password_stays_out() {
    let (_dir, sound) = scenario(SOUND);
    let line = format!("scenario push {sound} 127.0.0.1:1/web:1 --insecure --username ci --password-stdin");
    let ended = ended(gauntlet(line.split(' ')), "hunter2\n").await;
    assert_eq!(ended.code, 69, "{}", ended.err);
    assert!(!ended.err.contains("hunter2") && ended.err.contains("127.0.0.1:1"), "{}", ended.err);
    let without = self::ended(gauntlet(line.split(' ')), "").await;
    assert_eq!(without.code, 64, "{}", without.err);
    assert!(without.err.contains("OCI_PASSWORD"), "{}", without.err);
}
