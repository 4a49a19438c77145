//! The client commands of the real binary, against a fake v1 server in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::{process::Stdio, time::Duration};

use gauntlet_api::{json, v1::challenge as pbc, v1::instance as pbi};
use gauntlet_testing::api::{FakeApi, Serving};
use tokio::{io::AsyncWriteExt as _, process::Command};

/// A server with the challenges "web-1", which has an instance of source 42, and "web-2", which has one of source 43.
struct Api {
    fake: FakeApi,
    serving: Serving,
}

impl Api {
    async fn start() -> Self {
        let fake = FakeApi::new(vec![
            challenge("web-1"),
            pbc::Challenge { instances: vec![instance("web-2", "43")], ..challenge("web-2") },
        ]);
        Self { serving: fake.serve().await, fake }
    }

    /// The address as people write it.
    fn address(&self) -> &str {
        self.serving.url.trim_start_matches("http://")
    }

    /// Runs `gauntlet` with these arguments against the server.
    async fn run(&self, line: &str) -> Exited {
        let mut command = gauntlet(line.split(' '));
        command.env("URL", self.address());
        run(command, "").await
    }
}

struct Exited {
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

/// Runs a command to its end with this standard input.
async fn run(mut command: Command, input: &str) -> Exited {
    let mut child = command.spawn().unwrap();
    // Writing fails if the command exits without reading its input.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
    let output = tokio::time::timeout(Duration::from_secs(30), child.wait_with_output())
        .await
        .expect("the command is still running")
        .unwrap();
    Exited {
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

#[tokio::test]
async fn flags_become_requests() {
    let server = Api::start().await;
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
        let exited = server.run(line).await;
        assert_eq!(exited.code, 0, "{line}: {}", exited.err);
    }
    let (requests, timeouts) = server.fake.with(|state| (state.requests.join("\n"), state.timeouts.len()));
    assert_eq!(timeouts, requests.lines().count(), "every call has a deadline");
    insta::assert_snapshot!(requests);
}

#[tokio::test]
async fn json_output_equals_the_rest_api() {
    let server = Api::start().await;
    let exited = server.run("challenge get web-1 --output json").await;
    assert_eq!(exited.out, json::to_string(&challenge("web-1")).unwrap() + "\n");
    let exited = server.run("-o json challenge list").await;
    assert_eq!(exited.code, 64, "the options belong to the subcommand");
    let exited = server.run("challenge -o json list").await;
    let ids: Vec<_> = exited
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids, ["web-1", "web-2"]);
    let exited = server.run("instance get web-1 42 -o json").await;
    assert_eq!(exited.out, json::to_string(&instance("web-1", "42")).unwrap() + "\n");
    assert_eq!(server.run("instance list none -o json").await.out, "");
    assert_eq!(server.run("instance delete web-1 42 -o json").await.out, "{}\n");
}

#[tokio::test]
async fn tables_are_plain_without_a_terminal() {
    let server = Api::start().await;
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
async fn errors_include_what_to_do() {
    let server = Api::start().await;
    let exited = server.run("challenge get web-3").await;
    assert_eq!((exited.code, exited.out.as_str()), (1, ""));
    insta::assert_snapshot!(exited.err, @"
    error: Challenge not found.
      reason: CHALLENGE_NOT_FOUND (id: web-3)
      Challenge web-3: No challenge has this id.
      fix: list the challenges with `gauntlet challenge list`
    ");
    let exited = server.run("challenge create web-1 --scenario a --min -1").await;
    assert_eq!(exited.code, 1);
    insta::assert_snapshot!(exited.err, @"
    error: Pooler configuration out of bounds.
      reason: CHALLENGE_POOLER_OUT_OF_BOUNDS (max: 0, min: -1)
      min: min is -1; it must be 0 or more.
    ");
    server.fake.with(|state| state.breaks_after = Some(1));
    let exited = server.run("instance list -o json").await;
    assert_eq!((exited.code, exited.out.lines().count()), (1, 1), "what came before the failure is shown");
    assert!(server.run("instance list").await.out.contains("web-1"));
    server.fake.with(|state| (state.breaks_after, state.streams_hang) = (None, true));
    let exited = server.run("instance list --deadline 300ms").await;
    assert_eq!(exited.code, 69);
    assert!(exited.err.contains("no answer within 300ms") && exited.err.contains("--deadline"), "{}", exited.err);
}

#[tokio::test]
async fn unreachable_server_exits_with_69() {
    let exited = run(gauntlet("challenge list --url 127.0.0.1:1".split(' ')), "").await;
    assert_eq!(exited.code, 69);
    let refused = "error: tcp connect error: Connection refused (os error 111)";
    assert!(
        exited.err.contains(refused)
            && exited.err.contains("fix: check that a manager is listening at http://127.0.0.1:1;"),
        "{}",
        exited.err
    );
}

#[tokio::test]
async fn unreachable_collector_does_not_fail_a_command() {
    let server = Api::start().await;
    let mut command = gauntlet("instance renew web-1 42".split(' '));
    command.env("URL", server.address()).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let exited = run(command, "").await;
    assert_eq!(exited.code, 0, "{}", exited.err);
    assert!(exited.out.starts_with("Challenge   web-1"), "{}", exited.out);
}

#[tokio::test]
async fn wrong_usage_exits_with_64_and_is_named() {
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
        let exited = run(gauntlet(line.split(' ')), "").await;
        assert_eq!(exited.code, 64, "{line}: {}", exited.err);
        assert!(exited.err.contains(name), "{line}: {}", exited.err);
    }
}

#[tokio::test]
async fn help_texts() {
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
        "flags --help",
        "token --help",
        "token create --help",
    ] {
        let exited = run(gauntlet(line.split(' ')), "").await;
        assert_eq!(exited.code, 0, "{}", exited.err);
        all.push_str(&format!("$ gauntlet {line}\n{}\n", exited.out));
    }
    insta::assert_snapshot!(all);
}

const VALID: &str = r#"
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
async fn scenarios_are_validated() {
    let scenario_command = async |line: &str| run(gauntlet(line.split(' ')), "").await;
    let (_dir, valid) = scenario(VALID);
    let exited = scenario_command(&format!("scenario validate {valid}")).await;
    assert_eq!(exited.code, 0, "{}", exited.err);
    insta::assert_snapshot!(exited.out, @"
    The scenario is valid: 1 file, 171 bytes.
             171  scenario.yaml
    ");
    let (_dir, invalid) = scenario("version: 1\nnonsense: true\n");
    for line in [format!("scenario validate {invalid}"), format!("scenario push {invalid} r.lan/web:1")] {
        let exited = scenario_command(&line).await;
        assert_eq!((exited.code, exited.out.as_str()), (1, ""));
        assert!(exited.err.starts_with("error: The scenario is invalid.\n  line 1: "), "{}", exited.err);
        assert!(exited.err.contains("line 2: nonsense") && exited.err.contains("fix: "), "{}", exited.err);
    }
    let exited = scenario_command(&format!("scenario validate {valid}/none")).await;
    assert_eq!(exited.code, 1, "{}", exited.err);
    assert!(exited.err.contains("is not a directory"), "{}", exited.err);
    let exited = scenario_command(&format!("scenario push {valid} web")).await;
    assert_eq!(exited.code, 1, "{}", exited.err);
    assert!(exited.err.contains("OCI_REFERENCE_MALFORMED") && exited.err.contains("fix: "), "{}", exited.err);
}

#[tokio::test]
async fn unreachable_registry_exits_with_69_without_the_password() {
    let (_dir, valid) = scenario(VALID);
    let line = format!("scenario push {valid} 127.0.0.1:1/web:1 --insecure --username ci --password-stdin");
    let exited = run(gauntlet(line.split(' ')), "hunter2\n").await;
    assert_eq!(exited.code, 69, "{}", exited.err);
    assert!(!exited.err.contains("hunter2") && exited.err.contains("127.0.0.1:1"), "{}", exited.err);
    let without = run(gauntlet(line.split(' ')), "").await;
    assert_eq!(without.code, 64, "{}", without.err);
    assert!(without.err.contains("OCI_PASSWORD"), "{}", without.err);
}
