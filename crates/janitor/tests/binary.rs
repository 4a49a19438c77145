//! The binary: exit codes, environment, signals.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod fake;

use std::{
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use fake::{Deletion, Fake, at, challenge};
use tokio::process::{Child, Command};
use tonic::Code;

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

async fn ended(command: &mut Command) -> (Option<i32>, String) {
    let output: Output =
        tokio::time::timeout(Duration::from_secs(30), command.output()).await.expect("it never ended").unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code(), text)
}

fn one_expired() -> Fake {
    Fake::new(vec![challenge("a", None, &[("1", at(-60))])])
}

#[tokio::test]
async fn one_shot_sweeps_and_exits_with_0() {
    let fake = one_expired();
    let server = fake.serve().await;
    let (code, text) = ended(&mut janitor(&["--url", &server.url], &[])).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn the_environment_of_the_go_janitor_is_enough() {
    let fake = one_expired();
    let server = fake.serve().await;
    let host_and_port = server.url.strip_prefix("http://").unwrap();
    let environment = [("URL", host_and_port), ("TICKER", ""), ("LOG_LEVEL", "debug")];
    let (code, text) = ended(&mut janitor(&[], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.deleted(), ["1"]);
}

#[tokio::test]
async fn nothing_done_exits_with_1() {
    let fake = one_expired().deletion("1", Deletion::Fails(Code::Internal));
    let server = fake.serve().await;
    let (code, text) = ended(&mut janitor(&["--url", &server.url], &[])).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("none of 1 expired instances could be deleted"), "{text}");
    let (code, text) = ended(&mut janitor(&["--url", "127.0.0.1:1"], &[])).await;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the challenges of http://127.0.0.1:1 could not be read"), "{text}");
}

#[tokio::test]
async fn wrong_values_exit_with_64_and_name_themselves() {
    for (arguments, environment, name) in [
        (&["--every", "soon"][..], ("A", ""), "--every"),
        (&[], ("TICKER", "soon"), "soon"),
        (&[], ("URL", "localhost"), "it has no port"),
        (&["--nonsense"], ("A", ""), "--nonsense"),
        (&["--log-level", "loud"], ("A", ""), "--log-level"),
        (&[], ("OTEL_BSP_MAX_QUEUE_SIZE", "many"), "OTEL_BSP_MAX_QUEUE_SIZE"),
    ] {
        let (code, text) = ended(&mut janitor(arguments, &[environment])).await;
        assert_eq!(code, Some(64), "{text}");
        assert!(text.contains(name), "{text}");
    }
    for argument in ["--help", "--version"] {
        assert_eq!(ended(&mut janitor(&[argument], &[])).await.0, Some(0));
    }
}

#[tokio::test]
async fn a_collector_that_is_away_does_not_hold_up_the_exit() {
    let fake = one_expired();
    let server = fake.serve().await;
    let environment = [("OTEL_SDK_DISABLED", "false"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")];
    let (code, text) = ended(&mut janitor(&["--url", &server.url], &environment)).await;
    assert_eq!(code, Some(0), "{text}");
}

async fn terminated(mut child: Child) -> ExitStatus {
    let id = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    tokio::time::timeout(Duration::from_secs(30), child.wait()).await.expect("it never ended").unwrap()
}

#[tokio::test]
async fn a_service_stays_through_failures_and_stops_at_sigterm() {
    let fake = one_expired();
    fake.with(|state| state.breaks_after = Some(0));
    let server = fake.serve().await;
    let child = janitor(&["--url", &server.url, "--every", "50ms"], &[]).spawn().unwrap();
    fake.until(|state| state.queries >= 2).await;
    fake.with(|state| state.breaks_after = None);
    fake.until(|state| state.deleted == ["1"]).await;
    assert_eq!(terminated(child).await.code(), Some(0));
}

#[tokio::test]
async fn sigterm_lets_a_deletion_under_way_end() {
    let fake = one_expired().deletion("1", Deletion::Waits);
    let server = fake.serve().await;
    let child = janitor(&["--url", &server.url], &[]).spawn().unwrap();
    fake.until(|state| state.under_way == 1).await;
    let ending = tokio::spawn(terminated(child));
    fake.release.notify_one();
    assert_eq!(ending.await.unwrap().code(), Some(0));
    assert_eq!(fake.deleted(), ["1"]);
}
